"""What PyTorch functions mean on a stack of packed matrices ``[E, N, K]``, the experts of a layer.

Products run by expert, and only of those that rows are given to. ``w[ids]`` copies nothing: it is :class:`Chosen`, which a
product then reads in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from .errors import UnsupportedOnTensorError
from .formats.reference import matrix_of
from .tensor import QuantizedTensor, tensor_class

aten = torch.ops.aten
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""``__torch_function__``: functions that PyTorch would decompose into copies of the stack."""
ATEN: dict[Any, Callable[..., Any]] = {}
"""``__torch_dispatch__``: ATen operators."""
NAMED: dict[str, Callable[..., Any]] = {}
"""The same by name: of operators that other libraries register, or that some releases of PyTorch lack."""


def implementation(func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
    """What an ATen operator means if one of its arguments is a stack; None: what it means on any packed weight, or nothing."""
    if not any(isinstance(a, Chosen) or (isinstance(a, QuantizedTensor) and a.dim() == 3) for a in args):
        return None
    return ATEN.get(func) or NAMED.get(func.name())


class Chosen(torch.Tensor):
    """Matrices ``ids`` ``[S]`` of a packed ``stack``: behaves as ``stack[ids]``, ``[S, N, K]`` or ``[S, K, N]``.

    Takes part in products and may be transposed; any other function needs :meth:`dequantize`, which decodes these alone.
    """

    @staticmethod
    def __new__(cls: type[Chosen], stack: QuantizedTensor, ids: torch.Tensor) -> Chosen:
        made = torch.Tensor._make_wrapper_subclass(cls, (ids.shape[0], *stack.shape[1:]), dtype=stack.dtype, device=stack.device)
        made.stack, made.ids = stack, ids
        return made

    stack: QuantizedTensor
    ids: torch.Tensor

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The float tensor that this stands for."""
        return gathered(self.stack, self.ids).dequantize()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["stack", "ids"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], ctx: None, outer_size: object, outer_stride: object) -> Chosen:
        return Chosen(inner["stack"], inner["ids"])  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FUNCTIONS:
            return FUNCTIONS[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = implementation(func, args)
        if found is None:
            raise UnsupportedOnTensorError(f"{func} is not defined on chosen experts of a packed weight, only products are; call "
                                           ".dequantize() for a float tensor")  # fmt: skip
        return found(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Chosen({self.ids!r} of {self.stack!r})"


Stack = QuantizedTensor | Chosen


def gathered(stack: QuantizedTensor, ids: torch.Tensor) -> QuantizedTensor:
    """Matrices ``ids`` as a stack of their own: a copy of their planes."""
    planes = [p.unflatten(0, (stack.shape[0], -1))[ids].flatten(0, 1) for p in stack.planes]
    return stack.with_planes(planes, (ids.shape[0], *stack.shape[1:]))


def _implements(table: dict[Any, Callable[..., Any]], *keys: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(keys, implementation))
        return implementation

    return register


# Products ----------------------------------------------------------------------------------------------------------


def _grouped(x: torch.Tensor, w: QuantizedTensor, groups: torch.Tensor, ends: bool) -> torch.Tensor:
    """Rows of ``x [T, K]`` by the experts of ``w``, in whichever orientation it is presented."""
    n, k = w.nk
    if x.shape[-1] != k:
        raise RuntimeError(f"experts: input has {x.shape[-1]} features, the {w.scheme.label} weight is {list(w.shape)} and takes "
                           f"{k}")  # fmt: skip
    return ops.grouped_linear(x, w.planes, groups, ends, w.key, w.shape[0], n)


@_implements(NAMED, "aten::_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped_mm(
    x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [T, K], sorted by expert, · w [E, K, N]; the rows of expert e end at offs[e]."""
    if not isinstance(w, QuantizedTensor) or isinstance(x, Stack) or x.dim() != 2 or offs is None or bias is not None:
        raise UnsupportedOnTensorError("grouped_mm takes a float input [T, K], a packed stack of experts as its second factor, "
                                       "and offs; call .dequantize() on the weight for anything else")  # fmt: skip
    if w.transposed:
        y = _grouped(x, w, offs, ends=True)
    else:
        y = ops.grouped_mm(x, w.planes, offs, True, w.key, w.shape[0], w.shape[2])
    return y if out_dtype is None else y.to(out_dtype)


@_implements(ATEN, aten.bmm.default)
def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [S, M, K] · w [S, K, N], or w [S, N, K] · b [S, K, M]."""
    if isinstance(a, Stack) and isinstance(b, Stack):
        return torch.bmm(a.dequantize(), b.dequantize())
    if isinstance(b, Stack):
        return _by_each(a, b) if _of(b).transposed else torch.bmm(a, b.dequantize().to(a.dtype))
    assert isinstance(a, Stack)
    return torch.bmm(a.dequantize().to(b.dtype), b) if _of(a).transposed else _by_each(b.mT, a).mT


def _of(w: Stack) -> QuantizedTensor:
    return w.stack if isinstance(w, Chosen) else w


def _by_each(x: torch.Tensor, w: Stack) -> torch.Tensor:
    """x [S, M, K], M rows for each of the S matrices of ``w``: [S, M, N]."""
    count, rows, k = x.shape
    if count != w.shape[0]:
        raise RuntimeError(f"bmm: {count} matrices of inputs for {w.shape[0]} of weights")
    flat = x.reshape(count * rows, k)
    if isinstance(w, Chosen):
        ids = w.ids if rows == 1 else w.ids.repeat_interleave(rows, output_size=count * rows)
        y = _grouped(flat, w.stack, ids, ends=False)
    else:
        y = _grouped(flat, w, torch.arange(1, count + 1, device=x.device) * rows, ends=True)
    return y.view(count, rows, y.shape[-1])


@_implements(FUNCTIONS, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of up to three dimensions: a factor of fewer, or with one matrix, meets every expert."""
    if not any(isinstance(t, Stack) and t.dim() == 3 for t in (a, b)):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.matmul(a, b)
    left, right = (t if isinstance(t, Stack) else _spread(t, b if t is a else a) for t in (a, b))
    return torch.bmm(left, right)


ATEN[aten.matmul.default] = _matmul


@_implements(FUNCTIONS, torch.Tensor.__rmatmul__)
def _rmatmul(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a, b)


def _spread(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x`` with a matrix for every one of ``w``."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] not in (1, w.shape[0])):
        raise UnsupportedOnTensorError(f"matmul of {list(x.shape)} and packed experts {list(w.shape)}: the input must be a "
                                       f"matrix, or a stack of 1 or {w.shape[0]}; call .dequantize() on the weight for "
                                       "others")  # fmt: skip
    return x.expand(w.shape[0], *x.shape[-2:])


# Views -------------------------------------------------------------------------------------------------------------


@_implements(ATEN, aten.transpose.int)
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


for _function in (torch.transpose, torch.Tensor.transpose):
    FUNCTIONS[_function] = _view(_function, _transpose)
_mT: Any = torch.Tensor.mT
FUNCTIONS[_mT.__get__] = _view(_mT.__get__, lambda w: _transpose(w, 1, 2))


@_implements(ATEN, aten.permute.default)
def _permute(w: Stack, dims: list[int]) -> Stack:
    order = [d % 3 for d in dims]
    if order[0] != 0:
        raise UnsupportedOnTensorError(f"permute({dims}) moves the experts of a packed {list(w.shape)}; call .dequantize() first")
    return _transpose(w, 1, order.index(1))


@_implements(ATEN, aten.detach.default, aten.alias.default, aten.contiguous.default)
def _alias(w: Stack, **_: Any) -> Stack:
    return w if isinstance(w, Chosen) else w.with_planes([p.detach() for p in w.planes])


@_implements(ATEN, aten._to_copy.default)
def _to_copy(w: Stack, **to: Any) -> Any:
    """A change of dtype or device, as of any packed weight; of chosen experts, which stay chosen."""
    from .tensor_ops import ATEN as PLAIN

    plain = PLAIN[aten._to_copy.default]
    if not isinstance(w, Chosen):
        return plain(w, **to)
    stack = plain(w.stack, **to)
    return Chosen(stack, w.ids.to(stack.device)) if isinstance(stack, QuantizedTensor) else stack[w.ids]


@_implements(ATEN, aten.select.int)
def _select(w: QuantizedTensor, dim: int, index: int) -> torch.Tensor:
    """One expert, packed, which shares the planes; along another dimension a float matrix."""
    if dim % 3 or isinstance(w, Chosen):
        return w.dequantize().select(dim, index)
    if not -w.shape[0] <= index < w.shape[0]:
        raise IndexError(f"expert {index} of {w.shape[0]}")
    return w.with_planes(matrix_of(w.planes, w.shape[0], index % w.shape[0]), w.shape[1:])


@_implements(ATEN, aten.unbind.int)
def _unbind(w: QuantizedTensor, dim: int = 0) -> list[torch.Tensor]:
    return [_select(w, dim, i) for i in range(w.shape[dim])]


@_implements(ATEN, aten.slice.Tensor)
def _slice(w: QuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> QuantizedTensor:
    """Some experts, which share the planes; slices of every matrix are stacked anew."""
    if dim % 3:
        cut = [aten.slice.Tensor(m, dim % 3 - 1, start, end, step) for m in _unbind(w)]
        planes = [torch.cat(each) for each in zip(*(m.planes for m in cut), strict=True)]
        return w.with_planes(planes, (len(cut), *cut[0].shape))
    chosen = range(*slice(start, end, step).indices(w.shape[0]))
    planes = [p.unflatten(0, (w.shape[0], -1))[slice(start, end, step)].flatten(0, 1) for p in w.planes]
    return w.with_planes(planes, (len(chosen), *w.shape[1:]))


@_implements(ATEN, aten.split.Tensor)
def _split(w: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    return [_slice(w, dim, i, i + size) for i in range(0, w.shape[dim], size)]


@_implements(ATEN, aten.index.Tensor)
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


FUNCTIONS[torch.Tensor.__getitem__] = _view(torch.Tensor.__getitem__, _getitem)
for _function in (torch.unbind, torch.Tensor.unbind):
    FUNCTIONS[_function] = _view(_function, _unbind)


@_implements(ATEN, aten.index_select.default)
def _index_select(w: QuantizedTensor, dim: int, index: torch.Tensor) -> Any:
    return w.dequantize().index_select(dim, index) if dim % 3 or isinstance(w, Chosen) else Chosen(w, index)
