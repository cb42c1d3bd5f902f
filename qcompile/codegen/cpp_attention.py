"""CPU kernels of attention over a packed KV cache: one C++ source for a format of keys and one of values.

A page of a cache is, for every head, a weight whose rows are tokens: the same planes, layout and printed decoding as for
linear layers. Keys are multiplied by queries as weights are by few rows; values are summed with the softmax as their factor.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch

from ..errors import LayoutError
from ..formats.layout import center_of, pages
from ..formats.scheme import Scheme
from ..formats.spec import FormatSpec
from ..formats.turning import turned_together
from .cpp import DTYPES
from .cpp_build import load_library
from .cpp_cache import cache_struct
from .cpp_format import format_struct
from .cpp_scale import element_type
from .kept import kept_source

NO_PAGE = 2
"""What the C functions return for tokens beyond the cache."""

_HEADERS = ("simd.h", "convert.h", "dot.h", "layer.h", "job.h")


def source(keys: FormatSpec, values: FormatSpec) -> str:
    """The whole C++ source. Raises :class:`FormatError` for formats that a cache cannot be written in."""
    folder = resources.files(__package__) / "include"
    before = "\n".join((folder / name).read_text() for name in (*_HEADERS, "cache.h"))
    structs = "\n".join(f"namespace {name} {{\n{format_struct(Scheme(spec))}\n{cache_struct(spec)}\n}}\n"
                        for name, spec in (("keys", keys), ("values", values)))  # fmt: skip
    after = "\n".join((folder / name).read_text() for name in ("rows.h", "queries.h", "attend.h"))
    return f"{before}\n{structs}\n{after}\n{_exports(keys, values)}"


def _parameters(spec: FormatSpec, name: str) -> tuple[str, str]:
    """(C++ parameters, initializer of ``Planes``)."""
    planes = [(element_type(p), f"{name}_{p.name}") for p in spec.parts]
    return ", ".join(f"const {kind}* {p}" for kind, p in planes), "{" + ", ".join(p for _, p in planes) + "}"


def _exports(keys: FormatSpec, values: FormatSpec) -> str:
    (key_parameters, key_planes), (value_parameters, value_planes) = _parameters(keys, "key"), _parameters(values, "value")
    return f"""#define QC_EXPORT extern "C" __attribute__((visibility("default")))

QC_EXPORT int qc_attend(const Attention* job, {key_parameters}, {value_parameters}) {{
  return attend<keys::Format, values::Format>(*job, {key_planes}, {value_planes});
}}
QC_EXPORT int qc_append_keys(const Append* job, {key_parameters}) {{
  return append<keys::Cache>(*job, {key_planes}) ? NO_FAILURE : NO_PAGE;
}}
QC_EXPORT int qc_append_values(const Append* job, {value_parameters}) {{
  return append<values::Cache>(*job, {value_planes}) ? NO_FAILURE : NO_PAGE;
}}
"""


class _Fields(ctypes.Structure):
    """A C struct whose members are given by keyword."""

    @classmethod
    def of(cls, **members: object) -> _Fields:
        made = cls()
        for name, value in members.items():
            setattr(made, name, value)
        return made


def _fields(pointers: str, numbers: str) -> list[tuple[str, Any]]:
    return [(n, ctypes.c_void_p) for n in pointers.split()] + [(n, ctypes.c_int64) for n in numbers.split()]


class _Attention(_Fields):
    _fields_ = [
        *_fields("out q center", "q_batch q_head q_row batch heads group length dim padded value_dim value_padded"),
        *_fields("start table", "table_row page pages"),
        *_fields("mask", "mask_batch mask_head mask_row mask_token mask_tokens tokens window key_turn value_turn"),
        *((n, ctypes.c_float) for n in ("scale", "softcap")),
        *((n, ctypes.c_int) for n in ("dtype", "mask_kind", "mask_dtype", "causal", "threads")),
    ]


class _Append(_Fields):
    _fields_ = [
        *_fields("x", "x_batch x_head x_row batch heads length dim padded"),
        *_fields("start table", "table_row page pages turn"),
        *((n, ctypes.c_int) for n in ("dtype", "threads")),
    ]


class CpuAttention:
    """``write`` and ``attend`` for keys and values of two formats. Raises :class:`FormatError` for formats that a cache cannot
    be written in and :class:`KernelBuildError` when the compiler fails. See :mod:`qcompile.attention` for the planes.
    """

    def __init__(self, keys: Scheme, values: Scheme, isa: str = "native") -> None:
        self.keys, self.values = keys.format, values.format
        self.source = kept_source("cpp attention", (keys.key, values.key), lambda: source(self.keys, self.values))
        library, self.path = load_library(self.source, isa)
        key_planes, value_planes = ([ctypes.c_void_p] * len(f.parts) for f in (self.keys, self.values))
        self._attend = library.qc_attend
        self._attend.argtypes = [ctypes.POINTER(_Attention), *key_planes, *value_planes]
        self._attend.restype = ctypes.c_int
        self._append = (library.qc_append_keys, library.qc_append_values)
        for function, planes in zip(self._append, (key_planes, value_planes), strict=True):
            function.argtypes = [ctypes.POINTER(_Append), *planes]
            function.restype = ctypes.c_int

    def write(
        self, key_planes: Sequence[torch.Tensor], value_planes: Sequence[torch.Tensor], k: torch.Tensor, v: torch.Tensor,
        start: torch.Tensor, table: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Quantizes k ``[B, H, L, D]`` and v ``[B, H, L, Dv]`` (fp32, fp16, bf16) into the planes, as tokens ``start[b]`` …
        ``start[b] + L − 1`` of sequence b; ``start`` is int64 ``[B]``, ``table`` int32 ``[B, pages]``."""
        sides = zip(self._append, (self.keys, self.values), (key_planes, value_planes), (k, v), strict=True)
        for function, spec, planes, x in sides:
            batch, heads, length, dim = x.shape
            if x.stride(-1) != 1 and dim > 1:
                x = x.contiguous()
            job = _Append.of(
                x=x.data_ptr(), x_batch=x.stride(0), x_head=x.stride(1), x_row=x.stride(2), batch=batch, heads=heads,
                length=length, dim=dim, padded=spec.padded(1, dim)[1], turn=turned_together(spec, dim), dtype=DTYPES[x.dtype],
                threads=torch.get_num_threads(), **_pages(spec, planes, start, table),
            )  # fmt: skip
            if function(job, *(p.data_ptr() for p in planes)):
                raise _no_page(planes, start, length, table)

    def attend(
        self, q: torch.Tensor, key_planes: Sequence[torch.Tensor], value_planes: Sequence[torch.Tensor],
        start: torch.Tensor, tokens: int, value_dim: int, mask: torch.Tensor | None = None,
        table: torch.Tensor | None = None, causal: bool = True, scale: float | None = None, softcap: float = 0.0,
        window: int = 0, center: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """q ``[B, Hq, L, D]`` over ``tokens`` tokens at most: ``[B, Hq, L, Dv]`` in q's dtype; see :meth:`KVCache.attend`.
        ``center [B, H, 1, D]`` is added to every key."""
        batch, query_heads, length, dim = q.shape
        heads = key_planes[0].shape[1]
        if q.stride(-1) != 1 and dim > 1:
            q = q.contiguous()
        out = torch.empty(batch, query_heads, length, value_dim, dtype=q.dtype)
        if not out.numel():
            return out
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        members: dict[str, object] = {}
        if mask is not None:
            b, h, r, t = mask.expand(batch, query_heads, length, mask.shape[-1]).stride()
            members = {"mask": mask.data_ptr(), "mask_batch": b, "mask_head": h, "mask_row": r, "mask_token": t,
                       "mask_tokens": mask.shape[-1], "mask_dtype": DTYPES.get(mask.dtype, 0)}  # fmt: skip
        center = None if center is None else center.expand(batch, heads, 1, dim).float().contiguous()
        job = _Attention.of(
            out=out.data_ptr(), q=q.data_ptr(), q_batch=q.stride(0), q_head=q.stride(1), q_row=q.stride(2),
            center=None if center is None else center.data_ptr(), batch=batch, heads=heads, group=query_heads // heads,
            length=length, dim=dim, padded=self.keys.padded(1, dim)[1],
            value_dim=value_dim, value_padded=self.values.padded(1, value_dim)[1], tokens=tokens,
            **_pages(self.keys, key_planes, start, table), window=window, softcap=softcap,
            key_turn=turned_together(self.keys, dim), value_turn=turned_together(self.values, value_dim),
            scale=1 / math.sqrt(dim) if scale is None else scale, dtype=DTYPES[q.dtype],
            mask_kind=kind, causal=int(causal), threads=torch.get_num_threads(), **members,
        )  # fmt: skip
        failed = self._attend(job, *(p.data_ptr() for p in key_planes), *(p.data_ptr() for p in value_planes))
        if failed == NO_PAGE:
            raise _no_page(key_planes, start, length, table)
        if failed:
            raise MemoryError(f"attention over {self.keys.name} and {self.values.name}: no scratch memory for {list(q.shape)}")
        return out

    def sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
        softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        """Packs k and v into pages of their own, then attends to them."""
        (batch, heads, tokens, dim), value_dim = k.shape, v.shape[-1]
        key_planes = pages(self.keys, batch, heads, tokens, dim, k.device)
        value_planes = pages(self.values, batch, heads, tokens, value_dim, k.device)
        start = torch.zeros(batch, dtype=torch.int64)
        center = center_of(k)
        self.write(key_planes, value_planes, k - center, v, start)
        if not causal:
            start += tokens - q.shape[2]
        return self.attend(q, key_planes, value_planes, start, tokens, value_dim, mask, None, causal, scale, softcap,
                           center=center if softcap else None)  # fmt: skip


def _pages(
    spec: FormatSpec, planes: Sequence[torch.Tensor], start: torch.Tensor, table: torch.Tensor | None
) -> dict[str, object]:
    """Members that say where tokens lie. Raises :class:`LayoutError` for planes that are not contiguous on the CPU."""
    for plane in planes:
        if not plane.is_cpu or not plane.is_contiguous():
            raise LayoutError(f"KV cache of {spec.name}: planes must be contiguous CPU tensors, found strides {plane.stride()} "
                              f"on {plane.device}; call .contiguous() on them")  # fmt: skip
    members: dict[str, object] = {"start": start.data_ptr(), "page": 16 * planes[0].shape[2], "pages": planes[0].shape[0]}
    if table is not None:
        members |= {"table": table.data_ptr(), "table_row": table.stride(0)}
    return members


def _no_page(
    planes: Sequence[torch.Tensor], start: torch.Tensor, length: int, table: torch.Tensor | None
) -> LayoutError:
    pages, tokens = planes[0].shape[0], 16 * planes[0].shape[2]
    where = "one for each sequence" if table is None else f"numbered by a table {list(table.shape)}"
    return LayoutError(f"KV cache: {length} tokens from {start.tolist()} on do not lie in its {pages} pages of {tokens} tokens, "
                       f"{where}; give it a larger capacity")  # fmt: skip


@functools.cache
def cpu_attention(keys: Scheme, values: Scheme) -> CpuAttention:
    """The kernels for this machine, built once in a process."""
    return CpuAttention(keys, values)
