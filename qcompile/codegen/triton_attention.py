"""Attention kernels for a pair of formats on CUDA: launches of what :mod:`.triton_attend` and its siblings print."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from ..errors import FormatError, KernelBuildError
from ..formats.algebra import codebook_of_gen
from ..formats.layout import center_of, pages
from ..formats.scheme import Scheme
from ..formats.spec import ROW, TILE_N, FormatSpec
from ..formats.turning import turned_together
from ..target import Target
from .kept import kept_source
from .triton_attend import Axes, attend, merge
from .triton_attend_launch import OPERANDS, Attend, Mask, Planes, power_of_two, room_of, target_of
from .triton_attend_prefill import TritonPrefill, triton_prefill
from .triton_attend_read import Pair, reader
from .triton_attend_store import check_stores, store, storer
from .triton_attend_tiles import AttendTile
from .triton_launch import ceil
from .triton_load import content_hash, load
from .triton_print import Printer, minifloat_gen
from .triton_text import module
from .triton_turn import BLOCK, turn_rows, turning

STORE_FROM = 8
"""New tokens from which a program stores a whole tile of 16 rows and not one token."""


@functools.cache
def triton_attention(keys: Scheme, values: Scheme) -> TritonAttention:
    """The kernels for keys and values in these formats. Raises :class:`~qcompile.errors.FormatError` for one that has none."""
    return TritonAttention(keys, values)


class TritonAttention:
    """``attend`` and ``write`` for keys and values in two formats, on CUDA or under Triton's interpreter on the CPU.

    Planes are those of one weight for each page and head, ``[pages, heads, *part_shape(part, page, D)]`` in spec order:
    tokens are its rows, ``page`` (a multiple of 16) of them. Results do not depend on scheduling.
    """

    permutes = torch.version.hip is None

    def __init__(self, keys: Scheme, values: Scheme) -> None:
        self.formats = keys.format, values.format
        self.printers = Printer(keys.format, self.permutes), Printer(values.format, self.permutes)
        for scheme, printer in zip((keys, values), self.printers, strict=True):
            _check(scheme, printer)
        self.tag = content_hash(f"{keys.key}/{values.key}")[:8]
        self.label = f"keys {keys.label}, values {values.label}"
        self.scheme_keys = keys.key, values.key

    @functools.cached_property
    def source(self) -> str:
        """The text of the kernels that read packed planes."""
        return kept_source(f"triton attention{'' if self.permutes else ' by bits'}", self.scheme_keys, self.readers)

    @functools.cached_property
    def store_source(self) -> str:
        """The text of the kernel that writes them. Raises :class:`~qcompile.errors.FormatError` where scales need a search."""
        return kept_source("triton cache", self.scheme_keys, self.writers)

    def readers(self) -> str:
        """:attr:`source`, printed anew."""
        tags = [content_hash(s.fingerprint)[:8] for s in self.formats]
        pair = Pair(*self.printers, f"keys_{tags[0]}", f"values_{tags[1]}")
        kernels = [*turning(), reader(pair.keys, pair.read_keys, False), reader(pair.values, pair.read_values, True),
                   attend(pair, f"few_{self.tag}", Axes(True)), attend(pair, f"many_{self.tag}", Axes(False)),
                   merge(f"merge_{self.tag}"), turn_rows(f"turn_{self.tag}")]  # fmt: skip
        return module(self.label, kernels, any(p.imports for p in self.printers))

    def writers(self) -> str:
        """:attr:`store_source`, printed anew."""
        names = {s: f"store_{content_hash(s.fingerprint)[:8]}" for s in self.formats}
        kernels = [*turning(), *(storer(s, name) for s, name in names.items())]
        kernels.append(store(*self.formats, f"write_{self.tag}", *(names[s] for s in self.formats)))
        return module(self.label, kernels, False)

    @functools.cached_property
    def module(self) -> ModuleType:
        return load(self.source)

    @functools.cached_property
    def store_module(self) -> ModuleType:
        return load(self.store_source)

    def kernel(self, name: str) -> Any:
        """The jitted function few, many, merge, turn or write."""
        return getattr(self.store_module if name == "write" else self.module, f"{name}_{self.tag}")

    def attend(
        self, q: torch.Tensor, key_planes: Planes, value_planes: Planes, start: torch.Tensor, tokens: int, value_dim: int,
        mask: torch.Tensor | None = None, table: torch.Tensor | None = None, causal: bool = True, scale: float | None = None,
        softcap: float = 0.0, window: int = 0, center: torch.Tensor | None = None, *, tile: AttendTile | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Softmax attention of ``q`` [B, Hq, L, D] over the packed tokens: ``[B, Hq, L, Dv]`` in ``q``'s dtype.

        Query i of sequence b stands at ``start[b]`` + i (int64 [B]) and sees tokens 0 … start[b] + L − 1; if ``causal``, those
        up to its own position, with ``window`` > 0 those above position − window. ``tokens`` bounds start + L from above. Token
        t of sequence b lies in page ``table[b, t // page]`` (int32 [B, pages]), or in page b. ``mask`` (True: may attend; or
        added to scores) is broadcast to [B, Hq, L, T]; tokens beyond T are not seen. ``scale`` None is 1/√D; scores s become
        softcap·tanh(s/softcap) if ``softcap`` > 0. ``center`` [B, H, 1, D] is added to every key. Dv is ``value_dim``. Queries
        that see nothing give zeros, and sequences longer than their planes NaN. ``tile`` overrides the table's choice.
        """
        target = self._target(q)
        if q.dtype not in OPERANDS:
            raise KernelBuildError(f"no Triton attention kernel for queries of {q.dtype}; use float16, bfloat16 or float32")
        out = torch.empty(*q.shape[:3], value_dim, dtype=q.dtype, device=q.device)
        if out.numel():
            with torch.cuda.device_of(q):
                each = turned_together(self.formats[0], q.shape[3])
                Attend(self, self.turned(q, each), key_planes, value_planes, start, table, causal, softcap, window,
                       int(target.arch), None if center is None else self.turned(center.float(), each)).run(
                    out, tokens, Mask.of(mask, (q.shape[0], q.shape[1], q.shape[2])),
                    q.shape[3] ** -0.5 if scale is None else scale, tile)  # fmt: skip
        return out

    def write(
        self, key_planes: Planes, value_planes: Planes, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor,
        table: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Quantizes ``k`` [B, H, L, D] and ``v`` [B, H, L, Dv] and stores them as tokens start[b] … start[b] + L − 1, those that
        the planes have room for.

        Raises :class:`~qcompile.errors.FormatError` for formats whose scales one token does not decide.
        """
        self._target(k)
        if not k.shape[0] * k.shape[1] * k.shape[2]:
            return
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        batch, heads, length = k.shape[:3]
        block = TILE_N if length >= STORE_FROM else 1
        stored = self.formats[0].padded(TILE_N, k.shape[3])[1], self.formats[1].padded(TILE_N, v.shape[3])[1]
        grid = (ceil(length, block) + (block > 1), batch * heads)
        dot, terms = self.exact(torch.promote_types(k.dtype, v.dtype))
        with torch.cuda.device_of(k):
            self.kernel("write")[grid](
                k, v, *key_planes, *value_planes, start, table, length, heads, *k.stride()[:3], *v.stride()[:3],
                table.stride(0) if table is not None else 0, key_planes[0].shape[2], room_of(key_planes, table),
                D=k.shape[3], DV=v.shape[3], KP=stored[0],
                VP=stored[1], BK=power_of_two(stored[0]), BV=power_of_two(stored[1]), TOK=block, PAGED=table is not None,
                TURN_K=turned_together(self.formats[0], k.shape[3]), TURN_V=turned_together(self.formats[1], v.shape[3]),
                DOT=dot, TERMS=terms, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip

    def sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float,
        softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of ``q`` [B, Hq, L, D] over ``k`` [B, H, T, D] and ``v`` [B, H, T, Dv]; if ``causal``, query i sees the first
        i + 1 tokens. Products are in 8 bits where both formats are e4m3, e3m4 or int8; else k and v are packed first."""
        if (kind := self._eight_bits()) is not None:
            return triton_prefill(kind).prefill(q, k, v, mask, causal, scale, softcap)
        (batch, heads, tokens, dim), value_dim = k.shape, v.shape[3]
        planes = [pages(s, batch, heads, tokens, d, k.device) for s, d in zip(self.formats, (dim, value_dim), strict=True)]
        start = torch.zeros(batch, dtype=torch.int64, device=k.device)
        center = center_of(k)
        self.write(planes[0], planes[1], k - center, v, start)
        if not causal:
            start += tokens - q.shape[2]
        return self.attend(q, planes[0], planes[1], start, tokens, value_dim, mask, None, causal, scale, softcap,
                           center=center if softcap else None)  # fmt: skip

    def _eight_bits(self) -> str | None:
        """The kind of products in which both formats' codes are multiplied as they are; e3m4, which no matrix unit multiplies,
        in int8, which loses about as much as e3m4 itself: 1.7% of normal outputs, and 1.9%."""
        kinds = set()
        for spec in self.formats:
            book, minifloat = codebook_of_gen(spec), minifloat_gen(spec)
            if book is not None and book.cast == torch.float8_e4m3fn:
                kinds.add("fp8")
            elif minifloat is not None and minifloat.minifloat == (3, 4) and spec.period == ROW:
                kinds.add("int8_both")
            elif spec.code.dtype == "i8" and spec.period == ROW:
                kinds.add("int8")
            else:
                kinds.add("")
        (kind,) = kinds if len(kinds) == 1 else ("",)
        return kind or None

    def type(self, name: str) -> Any:
        """``tl.{name}``."""
        return getattr(self.module.tl, name)

    def turned(self, x: torch.Tensor, each: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [B, H, L, D], ``each`` neighbouring channels turned together, contiguous or in ``out``; ``x`` if that is 1."""
        x = x if x.stride(3) == 1 else x.contiguous()
        if each == 1:
            return x
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        dot, terms = self.exact(x.dtype)
        rows = x.shape[0] * x.shape[1] * x.shape[2]
        self.kernel("turn")[(ceil(rows, BLOCK),)](
            x, out, rows, *x.shape[1:3], *x.stride()[:3], D=x.shape[3], B=power_of_two(x.shape[3]), TURN=each, DOT=dot,
            TERMS=terms, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return out

    def exact(self, dtype: torch.dtype) -> tuple[Any, int]:
        """The type, and how many terms of it, that products take for numbers of ``dtype``."""
        name, terms = OPERANDS[dtype]
        return self.type(name), terms

    def _target(self, x: torch.Tensor) -> Target:
        return target_of(x)


def _check(scheme: Scheme, printer: Printer) -> None:
    """Raises :class:`FormatError` for a format that rows of tokens cannot have."""
    spec, name = scheme.format, scheme.label
    printer.check()
    if scheme.activations is not None:
        raise FormatError(f"{name}: keys and values are stored, not multiplied by quantized activations; use {spec.name}")
    if shared := [p.name for p in spec.scales if p.rows != 1]:
        raise FormatError(f"format {spec.name!r}: plane {shared[0]!r} is shared by rows, which are tokens of a cache and come "
                          "one by one; use a format with rows=1")  # fmt: skip
    if spec.columns:
        raise FormatError(f"format {spec.name!r}: its columns are stored in another order or scaled; use {spec.plain.name!r} for "
                          "keys and values")  # fmt: skip


def check_format(spec: FormatSpec) -> None:
    """Raises :class:`~qcompile.errors.FormatError` unless tokens can be written in ``spec`` and read from it."""
    _check(Scheme(spec), Printer(spec))
    check_stores(spec)


__all__ = ["TritonAttention", "TritonPrefill", "check_format", "triton_attention", "triton_prefill"]
