"""The custom operators that compiled graphs and eager code call: real, fake and backward.

Planes are operator inputs, never constants of a graph, so a graph that Dynamo reuses for another module computes with
that module's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import kernels
from .formats import Scheme, register_scheme, scheme_of
from .formats.reference import matrix_of
from .gradient import times_weight

_library = torch.library.Library("qcompile", "FRAGMENT")
_library.define("linear(Tensor x, Tensor[] planes, Tensor? bias, str scheme, int n) -> Tensor")
_library.define("linear_grad(Tensor grad, Tensor[] planes, str scheme, int n, int k) -> Tensor")
_WAITS = (torch.Tag.cudagraph_unsafe,)
"""Of operators for which the host waits on a GPU: it must know which experts have rows."""
_library.define("grouped_linear(Tensor x, Tensor[] planes, Tensor groups, bool ends, str scheme, int experts, int n) -> Tensor",
                tags=_WAITS)  # fmt: skip
_library.define("grouped_mm(Tensor x, Tensor[] planes, Tensor groups, bool ends, str scheme, int experts, int k) -> Tensor",
                tags=_WAITS)  # fmt: skip
_library.define("rows(Tensor[] planes, Tensor indices, str scheme, int n, int k, ScalarType dtype) -> Tensor")
_library.define("decode(Tensor[] planes, str scheme, int n, int k, ScalarType dtype) -> Tensor")
_library.define("kv_write(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor k, Tensor v, Tensor start, Tensor? table, "
                "str key_scheme, str value_scheme) -> ()")  # fmt: skip
_library.define("attend(Tensor q, Tensor[] keys, Tensor[] values, Tensor start, SymInt tokens, SymInt value_dim, Tensor? mask, "
                "Tensor? table, str key_scheme, str value_scheme, bool causal, float scale, float softcap, SymInt window, "
                "Tensor? center=None) -> Tensor")  # fmt: skip
_library.define("sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, float softcap, str key_scheme, "
                "str value_scheme) -> Tensor")  # fmt: skip

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _linear(
    x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, scheme: str, n: int
) -> torch.Tensor:
    return kernels.for_key(scheme, x.device.type).linear(x, planes, bias, n)


def _linear_grad(grad: torch.Tensor, planes: Sequence[torch.Tensor], scheme: str, n: int, k: int) -> torch.Tensor:
    return times_weight(grad, planes, scheme, n, k)


def _grouped_linear(
    x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, scheme: str, experts: int, n: int
) -> torch.Tensor:
    return kernels.for_key(scheme, x.device.type).grouped(x, planes, groups, ends, experts, n)


def _grouped_mm(
    x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, scheme: str, experts: int, k: int
) -> torch.Tensor:
    """Each row of ``x [T, N]`` times its expert's ``[N, K]``, which is decoded in x's dtype: ``[T, K]``. What gradients of
    :func:`grouped_linear` are. Experts without rows are not decoded."""
    found, rows = kernels.for_key(scheme, x.device.type), torch.arange(len(x), device=x.device)
    own = torch.searchsorted(groups, rows, right=True) if ends else torch.where(groups < 0, groups + experts, groups)
    out = x.new_zeros(len(x), k)
    for expert in own[own < experts].unique().tolist():
        here = own == expert
        out[here] = x[here] @ found.decode(matrix_of(planes, experts, expert), x.shape[1], k, x.dtype)
    return out


def _decode(planes: Sequence[torch.Tensor], scheme: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return kernels.for_key(scheme, planes[0].device.type).decode(planes, n, k, dtype)


def _rows(
    planes: Sequence[torch.Tensor], indices: torch.Tensor, scheme: str, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    if indices.is_cuda:
        torch._assert_async(((indices >= 0) & (indices < n)).all(), f"embedding: an index is outside 0 … {n - 1}")
    elif indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise IndexError(f"embedding: indices reach from {int(indices.min())} to {int(indices.max())}, the table has {n} rows")
    return kernels.for_key(scheme, planes[0].device.type).rows(planes, indices, n, k, dtype)


def _kv_write(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], k: torch.Tensor, v: torch.Tensor, start: torch.Tensor,
    table: torch.Tensor | None, key_scheme: str, value_scheme: str,
) -> None:  # fmt: skip
    kernels.attention_for(key_scheme, value_scheme, k.device.type).write(keys, values, k, v, start, table)


def _attend(
    q: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], start: torch.Tensor, tokens: int,
    value_dim: int, mask: torch.Tensor | None, table: torch.Tensor | None, key_scheme: str, value_scheme: str, causal: bool,
    scale: float, softcap: float, window: int, center: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    found = kernels.attention_for(key_scheme, value_scheme, q.device.type)
    return found.attend(q, keys, values, start, tokens, value_dim, mask, table, causal, scale, softcap, window, center)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float, softcap: float,
    key_scheme: str, value_scheme: str,
) -> torch.Tensor:  # fmt: skip
    found = kernels.attention_for(key_scheme, value_scheme, q.device.type)
    return found.sdpa(q, k, v, mask, causal, scale, softcap)


for _device in ("CPU", "CUDA"):
    _library.impl("kv_write", _kv_write, _device)
    _library.impl("attend", _attend, _device)
    _library.impl("sdpa", _sdpa, _device)
    _library.impl("linear", _linear, _device)
    _library.impl("linear_grad", _linear_grad, _device)
    _library.impl("grouped_linear", _grouped_linear, _device)
    _library.impl("grouped_mm", _grouped_mm, _device)
    _library.impl("rows", _rows, _device)
    _library.impl("decode", _decode, _device)


@torch.library.register_fake("qcompile::linear")
def _linear_fake(
    x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, scheme: str, n: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("qcompile::linear_grad")
def _linear_grad_fake(grad: torch.Tensor, planes: Sequence[torch.Tensor], scheme: str, n: int, k: int) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


@torch.library.register_fake("qcompile::grouped_linear")
def _grouped_linear_fake(
    x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, scheme: str, experts: int, n: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


@torch.library.register_fake("qcompile::grouped_mm")
def _grouped_mm_fake(
    x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, scheme: str, experts: int, k: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], k))


@torch.library.register_fake("qcompile::rows")
def _rows_fake(
    planes: Sequence[torch.Tensor], indices: torch.Tensor, scheme: str, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    return planes[0].new_empty((*indices.shape, k), dtype=dtype)


@torch.library.register_fake("qcompile::decode")
def _decode_fake(planes: Sequence[torch.Tensor], scheme: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return planes[0].new_empty((n, k), dtype=dtype)


@torch.library.register_fake("qcompile::kv_write")
def _kv_write_fake(*arguments: Any) -> None:
    return None


@torch.library.register_fake("qcompile::attend")
def _attend_fake(q: torch.Tensor, keys: Any, values: Any, start: Any, tokens: Any, value_dim: Any, *rest: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], value_dim))


@torch.library.register_fake("qcompile::sdpa")
def _sdpa_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, planes, bias, scheme, n = inputs
    ctx.save_for_backward(*planes)
    ctx.scheme, ctx.n, ctx.k = scheme, n, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Gradients of x (grad · W, see :func:`~qcompile.gradient.times_weight`) and of the bias; packed weights have none."""
    planes = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_grad(grad, planes, ctx.scheme, ctx.n, ctx.k)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.n).sum(0, dtype=ctx.bias_dtype)
    return grad_x, [None] * len(planes), grad_bias, None, None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, planes, scheme, n, _ = inputs
    ctx.save_for_backward(*planes)
    ctx.scheme, ctx.n = scheme, n


def _linear_grad_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Of second order: grad · W is linear in grad, so what arrives is multiplied as inputs are that nobody quantizes."""
    planes = list(ctx.saved_tensors)
    exact = register_scheme(Scheme(scheme_of(ctx.scheme).format))
    return linear(grad, planes, None, exact, ctx.n), [None] * len(planes), None, None, None


def _save_grouped(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, planes, groups, ctx.ends, ctx.scheme, ctx.experts, _ = inputs
    ctx.save_for_backward(groups, *planes)
    ctx.k = x.shape[-1]


def _grouped_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Gradient of x; packed weights have none."""
    groups, *planes = ctx.saved_tensors
    own = torch.ops.qcompile.grouped_mm(grad, planes, groups, ctx.ends, ctx.scheme, ctx.experts, ctx.k)
    return own, [None] * len(planes), None, None, None, None, None


torch.library.register_autograd("qcompile::linear", _linear_backward, setup_context=_save)
torch.library.register_autograd("qcompile::linear_grad", _linear_grad_backward, setup_context=_save_grad)
torch.library.register_autograd("qcompile::grouped_linear", _grouped_gradient, setup_context=_save_grouped)

linear = torch.ops.qcompile.linear.default
linear_grad = torch.ops.qcompile.linear_grad.default
grouped_linear = torch.ops.qcompile.grouped_linear.default
grouped_mm = torch.ops.qcompile.grouped_mm.default
rows = torch.ops.qcompile.rows.default
decode = torch.ops.qcompile.decode.default
kv_write = torch.ops.qcompile.kv_write.default
attend = torch.ops.qcompile.attend.default
sdpa = torch.ops.qcompile.sdpa.default
