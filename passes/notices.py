"""What users are told as a model is compiled, so that nothing is left in floating point unsaid."""

from __future__ import annotations

import warnings

from qcompile.plan import Site
from qcompile.recorder import Recorder

GRAD = "the weight requires grad in grad mode; call under torch.no_grad(), or model.requires_grad_(False)"

TRAINED = ("it requires grad beside frozen weights, so it is trained and stays in floating point; after requires_grad_(False) it "
           "is packed")  # fmt: skip


def warn_of_grad(sites: list[Site]) -> None:
    """A forgotten ``no_grad`` must not look like a model that was quantized."""
    left = [s.name for s in sites if s.is_linear and s.unsupported == GRAD]
    if left:
        warnings.warn(f"qcompile left {len(left)} linear layers in floating point ({left[0]}, …): {GRAD}", stacklevel=2)


def note_failure(recorder: Recorder, parameter: str, layer: str, reason: str) -> None:
    """Must not hold the compilation, which holds the float weights."""
    recorder.failures[parameter] = f"it cannot be packed: {reason}"
    warn_of_fallback([layer], recorder.failures[parameter])


def warn_of_fallback(layers: list[str], reason: str) -> None:
    text = f"fallback='float': qcompile left {len(layers)} layers in floating point ({some(layers)}): {reason}"
    warnings.warn(text, stacklevel=2)


def some(layers: list[str]) -> str:
    return ", ".join(layers[:4]) + (", …" if len(layers) > 4 else "")


def warn_of_nearest(left: list[str]) -> None:
    """Layers that the call did not reach must not look as if they were fitted to its inputs."""
    if left:
        warnings.warn(f"rounding='gptq': qcompile rounded {len(left)} weights to nearest ({left[0]}, …). qcompile.explain tells "
                      "why of each; layers that are compiled one by one are seen only if the whole model is compiled",
                      stacklevel=2)  # fmt: skip


def warn_of_uncalibrated(left: list[str]) -> None:
    """Layers that a calibration does not have must not look as if they were calibrated."""
    if left:
        warnings.warn(f"qcompile rounded {len(left)} weights to nearest that the calibration does not have ({some(left)}): no "
                      "sample of its data reached them", stacklevel=2)  # fmt: skip
