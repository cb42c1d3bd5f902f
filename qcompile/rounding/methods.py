"""Methods of calibration by name: what each needs to see, which formats it serves, and how it packs layers of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import OptionError, nearest
from ..formats import Scheme, reference
from ..formats.search import has_search
from . import factors, gptq
from .layers import Found, Layer
from .seen import Seen

NEAREST = "nearest"


@dataclass(frozen=True)
class Method:
    """``why_not(scheme)``: why it cannot serve one, or None. ``pack(layers, seen)`` packs layers that take the same inputs, whose
    H it needs if ``with_hessian``, and what they are in the float model if ``with_float``."""

    name: str
    with_hessian: bool
    why_not: Callable[[Scheme], str | None]
    pack: Callable[[Sequence[Layer], Seen], list[Found]]
    with_float: bool = False


def to_nearest(layer: Layer, reason: str) -> Found:
    """The layer rounded to nearest, or by the format's own quantizer, and why."""
    return Found(layer.scheme, reference.quantize(layer.scheme.format, layer.matrix, layer.name), NEAREST, reason)


def _by_gptq(layers: Sequence[Layer], seen: Seen) -> list[Found]:
    assert seen.hessian is not None
    made = gptq.quantize_all([(layer.scheme.format, layer.matrix, layer.name) for layer in layers], seen.hessian)
    return [Found(layer.scheme, planes, "gptq", f"damping {damping:g}" if damping > gptq.DAMPING else "")
            for layer, (planes, damping) in zip(layers, made, strict=True)]  # fmt: skip


def _why_no_importance(scheme: Scheme) -> str | None:
    spec = scheme.format
    if spec.quantizer is not None:
        return f"format {spec.name} has its own quantizer"
    return None if has_search(spec) else f"the scales of {spec.name} follow from ranges and are not searched for"


def _by_importance(layers: Sequence[Layer], seen: Seen) -> list[Found]:
    """Scales that minimize Σ mean(x²)·(w − ŵ)², as llama.cpp's importance matrices do."""
    return [Found(layer.scheme, reference.quantize(layer.scheme.format, layer.matrix, layer.name, seen.mean_square), "imatrix")
            for layer in layers]  # fmt: skip


METHODS = {
    m.name: m
    for m in (
        Method("gptq", True, lambda scheme: gptq.why_not(scheme.format), _by_gptq),
        Method("awq", True, factors.why_no_factors, factors.awq, with_float=True),
        Method("awq+gptq", True, lambda s: gptq.why_not(s.format) or factors.why_no_factors(s), factors.awq_gptq),
        Method("smoothquant", False, factors.why_no_smoothing, factors.smoothquant),
        Method("imatrix", False, _why_no_importance, _by_importance),
    )
}


def method_named(name: str) -> Method:
    """Raises :class:`~qcompile.errors.OptionError` with the names that there are."""
    if name not in METHODS:
        raise OptionError(f"method {name!r} is no way to calibrate. {nearest(str(name), METHODS)}")
    return METHODS[name]
