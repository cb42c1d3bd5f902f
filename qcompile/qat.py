"""Operators of quantization-aware training: weights and inputs as they will be once packed, and planes packed for evaluation.

Nothing is added to a model and none of its parameters replaced. In training a weight W counts as Ŵ = decode(quantize(W)), by
the functions that pack it; its gradient is that of :mod:`~qcompile.formats.surrogate`. In evaluation W is packed when it is first
used and again after it has changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from . import ops
from .errors import WeightError
from .formats import reference, scheme_of, surrogate
from .formats.scheme import ACTIVATIONS

_library = torch.library.Library("qcompile", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define("fake_weight(Tensor weight, str scheme, bool transposed) -> (Tensor, Tensor)", tags=_tags)
_library.define("fake_activations(Tensor x, str kind) -> Tensor")
_library.define("trained_linear(Tensor x, Tensor weight, Tensor? bias, str scheme, bool transposed) -> Tensor", tags=_tags)
_library.define("trained_rows(Tensor weight, Tensor indices, str scheme) -> Tensor", tags=_tags)


def _matrix(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    detached = weight.detach()
    return detached.t() if transposed else detached


def _fake_weight(weight: torch.Tensor, scheme: str, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        made, scales = reference.fake(scheme_of(scheme).format, _matrix(weight, transposed), UNNAMED)
    except WeightError as error:
        raise _named(error, weight) from error
    return (made.t().contiguous() if transposed else made), scales


UNNAMED = "a weight in quantization-aware training"


def _named(error: WeightError, weight: torch.Tensor) -> WeightError:
    """``error`` with the name of the parameter, which is looked for where it costs nothing any more: after a failure."""
    from .owners import Owners

    owners = Owners()
    held = (slots[0] for slots in owners.slots.values())
    parameter = next((p for s in held if (p := s.get()) is not None and p.data_ptr() == weight.data_ptr()), None)
    name = owners.name(parameter) if parameter is not None else None
    return WeightError(str(error).replace(UNNAMED, name)) if name is not None else error


def _fake_activations(x: torch.Tensor, kind: str) -> torch.Tensor:
    """``x [..., K]`` as kernels multiply it: per token, step = max|x| / limit (1 if that is 0), x̂ = step · round(x / step)."""
    limit, wide = ACTIVATIONS[kind], x.to(torch.float32)
    step = wide.abs().amax(-1, keepdim=True) / limit
    step = torch.where(step == 0, 1.0, step)
    ratio = (wide / step).clamp(-limit, limit)
    codes = ratio.round() if kind == "int8" else ratio.to(torch.float8_e4m3fn).to(torch.float32)
    return (codes * step).to(x.dtype).contiguous()


def _trained_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, transposed: bool
) -> torch.Tensor:
    n = weight.shape[1] if transposed else weight.shape[0]
    return ops.linear(x, planes_of(weight, scheme, transposed), bias, scheme, n)


def _trained_rows(weight: torch.Tensor, indices: torch.Tensor, scheme: str) -> torch.Tensor:
    return ops.rows(planes_of(weight, scheme, False), indices, scheme, *weight.shape, weight.dtype)


for _device in ("CPU", "CUDA"):
    _library.impl("fake_weight", _fake_weight, _device)
    _library.impl("fake_activations", _fake_activations, _device)
    _library.impl("trained_linear", _trained_linear, _device)
    _library.impl("trained_rows", _trained_rows, _device)


def _under_autocast(device: str) -> Any:
    """``trained_linear`` in the dtype that autocast gives ``F.linear``; the weight stays as it is, and is packed from it."""

    def cast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, transposed: bool) -> torch.Tensor:
        with torch.autocast(device, enabled=False):
            return trained_linear(x.to(torch.get_autocast_dtype(device)), weight, bias, scheme, transposed)

    return cast


_library.impl("trained_linear", _under_autocast("cpu"), "AutocastCPU")
_library.impl("trained_linear", _under_autocast("cuda"), "AutocastCUDA")


@torch.library.register_fake("qcompile::fake_weight")
def _fake_weight_fake(weight: torch.Tensor, scheme: str, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = reversed(weight.shape) if transposed else weight.shape
    shape = reference.scales_shape(scheme_of(scheme).format, n, k)
    return weight.new_empty(weight.shape), weight.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("qcompile::fake_activations")
def _fake_activations_fake(x: torch.Tensor, kind: str) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("qcompile::trained_linear")
def _trained_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, transposed: bool
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1] if transposed else weight.shape[0]))


@torch.library.register_fake("qcompile::trained_rows")
def _trained_rows_fake(weight: torch.Tensor, indices: torch.Tensor, scheme: str) -> torch.Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, ctx.scheme, ctx.transposed = inputs
    ctx.save_for_backward(weight, *output)


def _weight_backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
    """Plain PyTorch, which Inductor fuses into the backward."""
    weight, made, scales = ctx.saved_tensors
    grad, weight, made = (t.t() if ctx.transposed else t for t in (grad, weight, made))
    found = surrogate.gradient(scheme_of(ctx.scheme).format, grad, weight, made, scales)
    return (found.t() if ctx.transposed else found), None, None


def _pass_through(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    """A token's scale follows from its largest input, so no input is cut off."""
    return grad, None


torch.library.register_autograd("qcompile::fake_weight", _weight_backward, setup_context=_save)
torch.library.register_autograd("qcompile::fake_activations", _pass_through)

fake_weight = torch.ops.qcompile.fake_weight.default
fake_activations = torch.ops.qcompile.fake_activations.default
trained_linear = torch.ops.qcompile.trained_linear.default
trained_rows = torch.ops.qcompile.trained_rows.default


# Planes for evaluation -----------------------------------------------------------------------------------------------

SAMPLE = 4096
"""Values of a weight that are compared, at most, to tell whether something wrote into it unseen (``p.data.copy_``)."""


@dataclass(frozen=True)
class _Kept:
    """``planes`` of a weight in one format, and what the weight looked like when they were packed."""

    planes: list[torch.Tensor]
    seen: tuple[int, int]
    sample: torch.Tensor


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight → scheme key and orientation → planes; an entry goes with its weight, and all at an optimizer's step."""


def planes_of(weight: torch.Tensor, scheme: str, transposed: bool) -> list[torch.Tensor]:
    """Planes of ``weight`` as it is now, packed again if it was written to since, or an optimizer made a step.

    Raises :class:`WeightError`, naming the parameter, for NaN and infinite values.
    """
    spec = scheme_of(scheme).format
    by_scheme: dict[tuple[str, bool], _Kept] = _kept.setdefault(weight, {})
    found, seen, sample = by_scheme.get((scheme, transposed)), _seen(weight), _sampled(weight)
    if found is None or found.seen != seen or not _same_bits(found.sample, sample):
        try:
            planes = reference.quantize(spec, _matrix(weight, transposed), UNNAMED)
        except WeightError as error:
            raise _named(error, weight) from error
        found = by_scheme[scheme, transposed] = _Kept(planes, seen, sample.clone())
    return found.planes


def _seen(weight: torch.Tensor) -> tuple[int, int]:
    """Version, which tensors made in inference mode do not have, and address."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: (flat.numel() // SAMPLE) | 1][:SAMPLE]  # an odd stride meets every column


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    words = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(words), b.view(words))


def _forget(*_: Any) -> None:
    """After a step planes are those of other weights, and training has its memory back."""
    _kept.clear()


_watching: list[Any] = []


def watch() -> None:
    """Has optimizers of this process tell when they have made a step; once."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_forget))
