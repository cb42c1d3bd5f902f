"""The ``options=`` of ``torch.compile(model, backend="qcompile", options={…})``, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .calibration import Calibration
from .errors import OptionError, nearest
from .kv_cache import formats_of
from .policy import Policy

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """policy
        What to quantize and how; see :meth:`qcompile.policy.Policy.parse`. None: fp8 where the device computes it, else int8.
        A :class:`~qcompile.calibration.Calibration`: its policy, and the weights as it found them.
    strict
        Raise ``StrictError`` when a site that the policy meant cannot be quantized.
    weights
        ``"free"``: a float weight is released once it is packed. ``"keep"``: kept, for :func:`qcompile.restore_`.
    rounding
        ``"nearest"``: each weight to the nearest value of its format. ``"gptq"``: so that layers' outputs change least on
        the inputs of the first call, which should therefore be a few thousand tokens like those to come, with little
        padding. Layers that are compiled one by one get it for the first of them alone; compile the whole model.
    fallback
        What happens when a weight cannot be packed (it holds NaN) or a kernel cannot be built: ``"error"`` raises and names the
        layers; ``"float"`` leaves those layers in floating point, with a warning and a reason in the plan.
    kv_cache
        Format of keys and values in the caches of a Hugging Face model: "fp8", "int8", "int4" or any that
        :func:`qcompile.kv_cache.formats_of` takes. None: caches stay as they are.
    qat
        Quantization-aware training: under grad, weights that require grad count as what they would be packed to, with
        straight-through gradients; where grad is off they are packed beside the float weights, which stay. Weights that do
        not require grad are packed for good. See docs/training.md.
    mode
        A mode of ``torch.compile``: default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs.
    inductor
        Further Inductor settings, by their names in ``torch._inductor.config``.
    """

    policy: Policy
    strict: bool = False
    weights: str = "free"
    rounding: str = "nearest"
    fallback: str = "error"
    kv_cache: Any = None
    qat: bool = False
    mode: str = "default"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = field(default=None, init=False)
    """That given as ``policy``."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Raises :class:`OptionError` for an unknown or ill-typed setting, ``PolicyError`` for a bad policy."""
        given = dict(options or {})
        known = {name for name, f in cls.__dataclass_fields__.items() if f.init}
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option {name!r} of backend 'qcompile'. {nearest(name, known)} "
                                  "Inductor's own settings go under options={'inductor': {…}}")  # fmt: skip
        if mode is not None:
            given["mode"] = mode
        policy = given.get("policy")
        found = policy if isinstance(policy, Calibration) else None
        made = cls(**{**given, "policy": Policy.parse(policy if found is None else found.policy)})
        object.__setattr__(made, "calibration", found)
        made._check()
        return made

    def _check(self) -> None:
        if not isinstance(self.strict, bool):
            raise OptionError(f"option 'strict' must be True or False, found {self.strict!r}")
        if self.weights not in ("free", "keep"):
            raise OptionError(f"option 'weights' must be 'free' or 'keep', found {self.weights!r}")
        if self.rounding not in ("nearest", "gptq"):
            raise OptionError(f"option 'rounding' must be 'nearest' or 'gptq', found {self.rounding!r}")
        if self.rounding != "nearest" and self.calibration is not None:
            raise OptionError(f"rounding={self.rounding!r} with a calibration, whose weights are rounded already; leave it out")
        if self.fallback not in ("error", "float"):
            raise OptionError(f"option 'fallback' must be 'error' or 'float', found {self.fallback!r}")
        if self.kv_cache is not None:
            formats_of(self.kv_cache)
        self._check_qat()
        if self.mode not in MODES:
            raise OptionError(f"option 'mode': {nearest(str(self.mode), MODES)} Found {self.mode!r}")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(
                f"option 'inductor' must be a dict of Inductor settings, found {type(self.inductor).__name__}"
            )
        from torch._inductor import config

        settings = config.get_config_copy()
        for name in self.inductor:
            if name not in settings:
                raise OptionError(
                    f"option 'inductor': no setting {name!r} in torch._inductor.config. {nearest(name, settings)}"
                )

    def _check_qat(self) -> None:
        if not isinstance(self.qat, bool):
            raise OptionError(f"option 'qat' must be True or False, found {self.qat!r}")
        if not self.qat:
            return
        if self.rounding != "nearest":
            raise OptionError(f"option 'qat' with rounding={self.rounding!r}: weights in training are rounded to nearest; "
                              "calibrate the trained model")  # fmt: skip
        if self.calibration is not None:
            raise OptionError("option 'qat' with a calibration as policy: its weights are not those in training; "
                              "give its .policy")  # fmt: skip
        if self.kv_cache is not None:
            raise OptionError("option 'qat' with kv_cache: a cache is for generation; give it when you compile the trained model")

    def inductor_patches(self) -> dict[str, Any]:
        """Settings for Inductor: ours, those of the mode, then the user's own. Ours leaves out the part of each compiled
        file that makes random inputs to time it by: as long to load as all the rest, and of planes it would make nonsense."""
        from torch._inductor import list_mode_options

        return {"benchmark_harness": False, **list_mode_options(self.mode), **self.inductor}
