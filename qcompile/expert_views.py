"""Views of a stack of packed matrices ``[E, N, K]``: transposes, single matrices, slices, chosen ones.

All but slices through every matrix share the planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import UnsupportedOnTensorError
from .experts import ATEN, FUNCTIONS, Chosen, Stack, gathered, implements
from .formats.reference import matrix_of
from .tensor import QuantizedTensor, tensor_class

aten = torch.ops.aten


@implements(ATEN, aten.transpose.int)
def _transpose(w: Stack, dim0: int, dim1: int) -> Stack:
    dims = {dim0 % 3, dim1 % 3}
    if dims == {1, 2}:
        return Chosen(_turned(w.stack), w.ids) if isinstance(w, Chosen) else _turned(w)
    if len(dims) == 1:
        return w
    raise UnsupportedOnTensorError(f"transpose({dim0}, {dim1}) moves the experts of a packed {list(w.shape)}; call .dequantize() "
                                   "first")  # fmt: skip


def _turned(w: QuantizedTensor) -> QuantizedTensor:
    shape = (w.shape[0], w.shape[2], w.shape[1])
    return tensor_class(w.scheme, not w.transposed)(w.planes, shape, w.dtype)


def _view(function: Any, made: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as ``made`` here where its argument is a stack: PyTorch makes its results as views, which it tracks, and
    cannot in inference mode."""

    def either(w: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(w, Stack) and w.dim() == 3:
            return made(w, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(w, *args, **kwargs)

    return either




@implements(ATEN, aten.permute.default)
def _permute(w: Stack, dims: list[int]) -> Stack:
    order = [d % 3 for d in dims]
    if order[0] != 0:
        raise UnsupportedOnTensorError(f"permute({dims}) moves the experts of a packed {list(w.shape)}; call .dequantize() first")
    return _transpose(w, 1, order.index(1))


@implements(ATEN, aten.detach.default, aten.alias.default, aten.contiguous.default)
def _alias(w: Stack, **_: Any) -> Stack:
    return w if isinstance(w, Chosen) else w.with_planes([p.detach() for p in w.planes])


@implements(ATEN, aten._to_copy.default)
def _to_copy(w: Stack, **to: Any) -> Any:
    """A change of dtype or device, as of any packed weight; of chosen experts, which stay chosen."""
    from .tensor_ops import ATEN as PLAIN

    plain = PLAIN[aten._to_copy.default]
    if not isinstance(w, Chosen):
        return plain(w, **to)
    stack = plain(w.stack, **to)
    return Chosen(stack, w.ids.to(stack.device)) if isinstance(stack, QuantizedTensor) else stack[w.ids]


@implements(ATEN, aten.select.int)
def _select(w: QuantizedTensor, dim: int, index: int) -> torch.Tensor:
    """One expert, packed, which shares the planes; along another dimension a float matrix."""
    if dim % 3 or isinstance(w, Chosen):
        return w.dequantize().select(dim, index)
    if not -w.shape[0] <= index < w.shape[0]:
        raise IndexError(f"expert {index} of {w.shape[0]}")
    return w.with_planes(matrix_of(w.planes, w.shape[0], index % w.shape[0]), w.shape[1:])


@implements(ATEN, aten.unbind.int)
def _unbind(w: QuantizedTensor, dim: int = 0) -> list[torch.Tensor]:
    return [_select(w, dim, i) for i in range(w.shape[dim])]


@implements(ATEN, aten.slice.Tensor)
def _slice(w: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> QuantizedTensor:
    """Some experts, which share the planes; slices of every matrix are stacked anew."""
    if dim % 3:
        cut = [aten.slice.Tensor(m, dim % 3 - 1, start, end, step) for m in _unbind(w)]
        planes = [torch.cat(each) for each in zip(*(m.planes for m in cut), strict=True)]
        return w.with_planes(planes, (len(cut), *cut[0].shape))
    chosen = range(*slice(start, end, step).indices(w.shape[0]))
    planes = [p.unflatten(0, (w.shape[0], -1))[slice(start, end, step)].flatten(0, 1) for p in w.planes]
    return w.with_planes(planes, (len(chosen), *w.shape[1:]))


@implements(ATEN, aten.split.Tensor)
def _split(w: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    return [_slice(w, dim, i, i + size) for i in range(0, w.shape[dim], size)]


@implements(ATEN, aten.index.Tensor)
def _index(w: QuantizedTensor, indices: Sequence[torch.Tensor | None]) -> Any:
    """``w[ids]`` for integer ids [S] copies nothing, and for ids of more dimensions decodes these; for others the stack."""
    first, *rest = indices
    if isinstance(w, Chosen) or rest or first is None or first.dtype not in (torch.int32, torch.int64):
        return w.dequantize()[tuple(slice(None) if i is None else i for i in indices)]
    if first.dim() == 0:
        one = gathered(w, first.view(1))
        return one.with_planes(one.planes, w.shape[1:])
    return Chosen(w, first) if first.dim() == 1 else Chosen(w, first.flatten()).dequantize().unflatten(0, first.shape)


def _getitem(w: QuantizedTensor, at: Any) -> Any:
    if type(at) is torch.Tensor and at.dim() == 0:  # no number while a graph is traced
        at = int(at)
    if isinstance(at, int) and not isinstance(at, bool):
        return _select(w, 0, at)
    if isinstance(at, torch.Tensor):
        return _index(w, [at])
    if isinstance(at, slice):
        return _slice(w, 0, at.start, at.stop, at.step or 1)
    with torch._C.DisableTorchFunctionSubclass():
        return w[at]


@implements(ATEN, aten.index_select.default)
def _index_select(w: QuantizedTensor, dim: int, index: torch.Tensor) -> Any:
    return w.dequantize().index_select(dim, index) if dim % 3 or isinstance(w, Chosen) else Chosen(w, index)


_mT: Any = torch.Tensor.mT
_MADE: dict[Any, Callable[..., Any]] = {
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    _mT.__get__: lambda w: _transpose(w, 1, 2),
    torch.unbind: _unbind,
    torch.Tensor.unbind: _unbind,
    torch.Tensor.__getitem__: _getitem,
}
VIEWS = {function: _view(function, made) for function, made in _MADE.items()}
"""``__torch_function__``: what is made here and not by PyTorch."""
FUNCTIONS.update(VIEWS)
