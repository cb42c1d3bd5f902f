"""What PyTorch functions mean on a stack of packed matrices ``[E, N, K]``, the experts of a layer.

Products run by expert, and only of those that rows are given to. ``w[ids]`` copies nothing: it is :class:`Chosen`, which a
product then reads in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from .einsum import terms
from .errors import UnsupportedOnTensorError
from .tensor import QuantizedTensor

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

    def _stable_hash_for_caching(self) -> str:
        return hashlib.sha256(f"{self.stack._stable_hash_for_caching()} {tuple(self.ids.shape)}".encode()).hexdigest()

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


def implements(table: dict[Any, Callable[..., Any]], *keys: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has the decorated function stand for ``keys`` in one of the tables above."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(keys, implementation))
        return implementation

    return register


def _grouped(x: torch.Tensor, w: QuantizedTensor, groups: torch.Tensor, ends: bool) -> torch.Tensor:
    """Rows of ``x [T, K]`` by the experts of ``w``, in whichever orientation it is presented."""
    n, k = w.nk
    if x.shape[-1] != k:
        raise RuntimeError(f"experts: input has {x.shape[-1]} features, the {w.scheme.label} weight is {list(w.shape)} and takes "
                           f"{k}")  # fmt: skip
    return ops.grouped_linear(x, w.planes, groups, ends, w.key, w.shape[0], n)


@implements(FUNCTIONS, torch._grouped_mm)
@implements(NAMED, "aten::_grouped_mm", "transformers::grouped_mm_fallback")
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


@implements(ATEN, aten.bmm.default)
def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [S, M, K] · w [S, K, N], or w [S, N, K] · b [S, K, M]."""
    if isinstance(a, Stack) and isinstance(b, Stack):
        return torch.bmm(a.dequantize(), b.dequantize())
    if isinstance(b, Stack):
        return _by_each(a, b) if _of(b).transposed else torch.bmm(a, b.dequantize().to(a.dtype))
    assert isinstance(a, Stack)
    return torch.bmm(a.dequantize().to(b.dtype), b) if _of(a).transposed else _by_each(b.mT, a).mT


@implements(FUNCTIONS, torch.bmm, torch.Tensor.bmm)
def _bmm_function(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Seen before autocast is."""
    if kwargs or not (isinstance(a, Stack) or isinstance(b, Stack)):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.bmm(a, b, **kwargs)
    if torch.is_autocast_enabled(a.device.type):
        a, b = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (a, b))
    return _bmm(a, b)


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


@implements(FUNCTIONS, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of up to three dimensions: a factor of fewer, or with one matrix, meets every expert."""
    if not any(isinstance(t, Stack) and t.dim() == 3 for t in (a, b)):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.matmul(a, b)
    left, right = (t if isinstance(t, Stack) else _spread(t, b if t is a else a) for t in (a, b))
    return torch.bmm(left, right)


ATEN[aten.matmul.default] = _matmul


@implements(FUNCTIONS, torch.einsum)
def _einsum(equation: str, *factors: Any, **kwargs: Any) -> torch.Tensor:
    """Products by every expert; ``x`` may have the experts' letter, or meets each of them."""
    given = factors[0] if len(factors) == 1 and isinstance(factors[0], (list, tuple)) else factors
    at = next((i for i, t in enumerate(given) if isinstance(t, Stack) and t.dim() == 3), None)
    if at is None:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.einsum(equation, *given, **kwargs)
    found = terms(equation, at) if len(given) == 2 and not isinstance(given[1 - at], Stack) else None
    if found is None:
        raise UnsupportedOnTensorError(f"einsum {equation!r} is no product of one input by packed experts "
                                       f"{list(given[at].shape)}: call .dequantize() on the weight")  # fmt: skip
    w, x = given[at], given[1 - at]
    own = found.expert if found.expert in found.x else ""
    x = x.permute([found.x.index(c) for c in own + found.rows + found.into])
    rows = x.shape[len(own) : -1]
    y = torch.matmul(x.reshape(*x.shape[: len(own)], -1, x.shape[-1]), w.transpose(1, 2) if found.turned else w)
    made = found.expert + found.rows + found.onto
    return y.reshape(y.shape[0], *rows, y.shape[-1]).permute([made.index(c) for c in found.out])


@implements(FUNCTIONS, torch.Tensor.__rmatmul__)
def _rmatmul(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a, b)


def _spread(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x`` with a matrix for every one of ``w``."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] not in (1, w.shape[0])):
        raise UnsupportedOnTensorError(f"matmul of {list(x.shape)} and packed experts {list(w.shape)}: the input must be a "
                                       f"matrix, or a stack of 1 or {w.shape[0]}; call .dequantize() on the weight for "
                                       "others")  # fmt: skip
    return x.expand(w.shape[0], *x.shape[-2:])
