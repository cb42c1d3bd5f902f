"""What PyTorch functions mean on a :class:`~qcompile.tensor.QuantizedTensor`.

Linear algebra runs on the packed planes. Rows and columns are :mod:`qcompile.tensor_parts`, stacks of matrices
:mod:`qcompile.experts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import expert_views, experts, handover, ops, tensor_parts
from .errors import UnsupportedOnTensorError
from .experts import implements
from .formats import reference
from .formats.layout import empty_planes
from .formats.spec import TILE_N
from .multihead import multi_head
from .tensor import QuantizedTensor, tensor_class

aten = torch.ops.aten
FUNCTIONS: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head, **experts.FUNCTIONS,
                                              **expert_views.VIEWS}  # fmt: skip
"""``__torch_function__``: functions that must be seen before PyTorch decomposes them."""
ATEN: dict[Any, Callable[..., Any]] = dict(tensor_parts.ATEN)
"""``__torch_dispatch__``: ATen operators."""


@implements(FUNCTIONS, F.linear)
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, QuantizedTensor) or isinstance(input, QuantizedTensor):
        raise UnsupportedOnTensorError(
            "F.linear takes a packed tensor as its weight only; call .dequantize() on the input"
        )
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    return _matmul(input, weight, bias)


@implements(ATEN, aten.linear.default)
def _aten_linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _matmul(x, weight, bias)


def _matmul(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias. A weight that is used the other way around is decoded chunk by chunk."""
    n, k = weight.nk
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"linear: input has {x.shape[-1]} features, the {weight.scheme.label} weight is "
                           f"{list(weight.shape)} and takes {weight.shape[1]}")  # fmt: skip
    if weight.transposed:
        product = ops.linear_grad(x, weight.planes, weight.key, n, k)
        return product if bias is None else (product + bias).to(x.dtype)
    return ops.linear(x, weight.planes, bias, weight.key, n)


@implements(ATEN, aten.mm.default, aten.matmul.default)
def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if isinstance(a, QuantizedTensor):
        return a.dequantize() @ _float(b)
    assert isinstance(b, QuantizedTensor)
    return _matmul(a, _transpose(b))


@implements(ATEN, aten.addmm.default)
def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if beta == 1 and alpha == 1 and bias.dim() == 1 and isinstance(b, QuantizedTensor) and type(a) is not type(b):
        return _matmul(a, _transpose(b), bias)
    return alpha * _mm(a, b) + beta * bias


@implements(ATEN, aten.t.default)
def _transpose(w: QuantizedTensor, *_: int) -> QuantizedTensor:
    return tensor_class(w.scheme, not w.transposed)(w.planes, w.shape[::-1], w.dtype)


@implements(ATEN, aten.transpose.int)
def _transpose_dims(w: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    return _transpose(w) if dim0 % 2 != dim1 % 2 else w.with_planes(w.planes)


@implements(ATEN, aten.permute.default)
def _permute(w: QuantizedTensor, dims: list[int]) -> QuantizedTensor:
    return _transpose_dims(w, 0, 1 if dims[0] % 2 == 1 else 0)


@implements(ATEN, aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(w: QuantizedTensor) -> QuantizedTensor:
    made = w.with_planes([p.detach() for p in w.planes])
    made.apart = w.apart
    return made


@implements(ATEN, aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(w: QuantizedTensor, shape: list[int]) -> QuantizedTensor:
    if list(shape) == [-1]:  # FSDP2 keeps its part so; as_strided makes it a matrix again
        return w.with_planes(w.planes, (w.numel(),))
    if list(w.shape) != [s if s != -1 else w.numel() // max(1, -torch.Size(shape).numel()) for s in shape]:
        raise UnsupportedOnTensorError(
            f"view of a packed weight {list(w.shape)} as {list(shape)}: call .dequantize() first"
        )
    return _alias(w)


@implements(ATEN, aten.clone.default)
def _clone(w: QuantizedTensor, *, memory_format: Any = None) -> QuantizedTensor:
    return w.with_planes([p.clone() for p in w.planes])


@implements(ATEN, aten.contiguous.default)
def _contiguous(w: QuantizedTensor, *, memory_format: Any = None) -> QuantizedTensor:
    return w


@implements(ATEN, aten._to_copy.default)
def _to_copy(
    w: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Any:
    """A change of float dtype aliases the planes (they do not depend on it); a change of device moves them."""
    if dtype is not None and not dtype.is_floating_point:
        return w.dequantize().to(dtype=dtype, device=device)
    planes = [p.to(device=device, non_blocking=non_blocking) if device is not None else p for p in w.planes]
    return w.with_planes(planes, dtype=dtype)


@implements(ATEN, aten.empty_like.default, aten.zeros_like.default)
def _like(w: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> QuantizedTensor:
    return w.with_planes([torch.zeros_like(p, device=device) for p in w.planes], dtype=dtype)


@implements(ATEN, aten.new_zeros.default)
def _new_zeros(w: QuantizedTensor, size: list[int], **_: Any) -> QuantizedTensor:
    """A matrix of the same format whose planes are zero."""
    n, k = size[::-1] if w.transposed else size
    return w.with_planes([torch.zeros_like(p) for p in empty_planes(w.scheme.format, n, k, w.device)], size)


@implements(ATEN, aten.as_strided.default)
def _as_strided(w: QuantizedTensor, size: list[int], stride: list[int], offset: int | None = None) -> QuantizedTensor:
    """The same planes as a contiguous matrix, which is the one way that strides can mean here."""
    if len(size) != 2 or math.prod(size) != w.numel() or list(stride) != [size[1], 1] or offset:
        raise UnsupportedOnTensorError(f"as_strided of a packed weight {list(w.shape)} as {list(size)}, strides {list(stride)}: "
                                       "call .dequantize() first")  # fmt: skip
    return w.with_planes(w.planes, size)


@implements(ATEN, aten.is_pinned.default)
def _is_pinned(w: QuantizedTensor, device: Any = None) -> bool:
    return all(p.is_pinned() for p in w.planes)


@implements(ATEN, aten.copy_.default)
def _copy_(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Packed to packed of one class copies planes; anything else goes through float and is quantized again."""
    if not isinstance(dst, QuantizedTensor):
        assert isinstance(src, QuantizedTensor)
        return dst.copy_(src.dequantize(), non_blocking)
    if dst.apart:
        raise UnsupportedOnTensorError(
            f"copy_ into a slice of a packed {dst.scheme.label} weight that cuts tiles of {TILE_N} rows or lies along K would "
            "leave the weight as it is; copy into the whole, or .clone() the slice"
        )
    if src.shape != dst.shape:
        raise RuntimeError(f"copy_: the packed weight is {list(dst.shape)}, the source is {list(src.shape)}")
    if type(src) is type(dst):
        planes = src.planes  # type: ignore[attr-defined]
    else:
        planes = _packed_as(dst, _float(src).to(dst.device))
    for mine, theirs in zip(dst.planes, planes, strict=True):
        mine.copy_(theirs, non_blocking)
    return dst


def _packed_as(w: QuantizedTensor, floats: torch.Tensor) -> list[torch.Tensor]:
    """Planes of ``floats``, rounded to nearest in the format of ``w`` under its factors for columns."""
    spec = w.scheme.format
    matrix = floats.mT if w.transposed else floats
    return reference.quantize(spec, matrix, factors=w.planes[-1] if spec.scaled else None)


@implements(ATEN, aten.add_.Tensor)
def _add_(w: torch.Tensor, other: Any, *, alpha: float = 1) -> torch.Tensor:
    """Packs the sum again, as merging an adapter asks: what is less than half a step of the format may be lost."""
    return _copy_(w, _sum(w, other, alpha=alpha)) if isinstance(w, QuantizedTensor) else w.add_(_float(other), alpha=alpha)


@implements(ATEN, aten.sub_.Tensor)
def _sub_(w: torch.Tensor, other: Any, *, alpha: float = 1) -> torch.Tensor:
    return _add_(w, other, alpha=-alpha)


@implements(ATEN, aten.add.Tensor)
def _sum(a: Any, b: Any, *, alpha: float = 1) -> torch.Tensor:
    """A float tensor."""
    return torch.add(_float(a), _float(b), alpha=alpha)


@implements(FUNCTIONS, torch.isfinite)
def _isfinite(w: QuantizedTensor) -> torch.Tensor:
    return torch.isfinite(w.dequantize())


def _float(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


@implements(FUNCTIONS, torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(w: QuantizedTensor, value: torch.Tensor) -> None:
    """``w.data = value``: takes the planes of a packed tensor of this class; packs floats of this shape."""
    if value.shape != w.shape or not value.is_floating_point():
        raise UnsupportedOnTensorError(f".data of a {w.scheme.label} weight {list(w.shape)} takes floats of its shape, "
                                       f"found {value.dtype} {list(value.shape)}; make a new parameter")  # fmt: skip
    made = value if type(value) is type(w) else w.with_planes(_packed_as(w, _float(value)), dtype=value.dtype)
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(w, made)  # type: ignore[attr-defined]
    handover.settle()
    for name in w.scheme.format.part_names:
        setattr(w, f"_{name}", getattr(made, f"_{name}"))


@implements(ATEN, aten.equal.default)
def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if type(a) is type(b) and a.shape == b.shape:
        return all(torch.equal(p, q) for p, q in zip(a.planes, b.planes, strict=True))  # type: ignore[attr-defined]
    return torch.equal(_float(a), _float(b))
