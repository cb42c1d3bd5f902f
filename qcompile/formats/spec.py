"""A weight format is data: bit planes, and a sympy expression for the value of one weight."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import sympy
import torch

from ..errors import FormatError

ROW = 0
"""``Plane.per`` of a plane with one entry for a whole row of the weight (per output channel)."""

TILE_N = 16
"""Rows interleaved in storage; see :mod:`qcompile.formats.layout`."""

CODE_BITS = {"u1": 1, "u2": 2, "u4": 4, "u8": 8, "i8": 8}
SCALE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plane:
    """One plane of a format: ``dtype`` is u1, u2, u4, u8, i8 (codes) or f32, f16, bf16 (scales and offsets).

    ``per`` says how many consecutive weights of a row one entry covers: 1 for codes, a group size for scales,
    :data:`ROW` for one entry per row.
    """

    name: str
    dtype: str
    per: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in CODE_BITS and self.dtype not in SCALE_DTYPES:
            known = ", ".join([*CODE_BITS, *SCALE_DTYPES])
            raise FormatError(f"plane {self.name!r}: unknown dtype {self.dtype!r}; use one of {known}")
        if (self.dtype in CODE_BITS) != (self.per == 1):
            raise FormatError(f"plane {self.name!r}: dtype {self.dtype} with per={self.per}; integer planes have per=1, "
                              "float planes have per=ROW or a group size of 2 or more")  # fmt: skip
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise FormatError(f"plane name {self.name!r}: use lower-case letters, digits and _")

    @property
    def is_code(self) -> bool:
        return self.dtype in CODE_BITS

    @property
    def bits(self) -> int:
        """Bits of one entry."""
        return CODE_BITS[self.dtype] if self.is_code else 8 * SCALE_DTYPES[self.dtype].itemsize

    @property
    def storage_dtype(self) -> torch.dtype:
        """dtype of the stored tensor: int32 words for codes, the plane's own dtype for scales."""
        return torch.int32 if self.is_code else SCALE_DTYPES[self.dtype]


@dataclass(frozen=True)
class Codebook:
    """A function of one code given by its table. ``values[c]`` is the value of code c (NaN: no such value).

    ``minifloat=(exponent bits, mantissa bits)`` marks an 8-bit float with a sign, so that printers may decode it with
    integer shifts; ``cast`` names a torch dtype whose conversion rounds to it (nearest, ties to even).
    Used in a value as ``NF4(q)``.
    """

    name: str
    values: tuple[float, ...]
    minifloat: tuple[int, int] | None = None
    cast: torch.dtype | None = None

    def __call__(self, code: sympy.Expr) -> sympy.Expr:
        return sympy.Function(self.name)(code)


Quantizer = Callable[["FormatSpec", torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class FormatSpec:
    """One weight format; everything else (packer, reference, kernels, size) follows from it.

    ``value`` is a sympy expression over symbols named as the planes and calls of ``codebooks``, for example
    ``scale*(q - 8) + zero``. ``quantizer`` turns float weights into plane entries (see
    :mod:`qcompile.formats.reference`); without one, round-to-nearest is derived from ``value``.
    Raises :class:`FormatError` when planes and value do not fit together.
    """

    name: str
    planes: tuple[Plane, ...]
    value: sympy.Expr
    codebooks: tuple[Codebook, ...] = ()
    quantizer: Quantizer | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        names = [p.name for p in self.planes]
        used = {s.name for s in self.value.free_symbols}
        if len(set(names)) != len(names):
            raise FormatError(f"format {self.name!r}: two planes have one name in {names}")
        if used != set(names):
            raise FormatError(
                f"format {self.name!r}: value uses {sorted(used)}, planes are {sorted(names)}; they must agree"
            )
        calls = {f.func.__name__ for f in self.value.atoms(sympy.Function)}
        if unknown := calls - {c.name for c in self.codebooks}:
            raise FormatError(f"format {self.name!r}: value calls {sorted(unknown)}, which is not in codebooks=")
        if not any(p.is_code for p in self.planes):
            raise FormatError(f"format {self.name!r}: no plane holds codes (integer dtype with per=1)")

    @cached_property
    def codes(self) -> tuple[Plane, ...]:
        return tuple(p for p in self.planes if p.is_code)

    @cached_property
    def scales(self) -> tuple[Plane, ...]:
        return tuple(p for p in self.planes if not p.is_code)

    @cached_property
    def period(self) -> int:
        """Weights over which every scale is constant: the smallest group, or :data:`ROW` if all are per row."""
        groups = [p.per for p in self.scales if p.per != ROW]
        return min(groups) if groups else ROW

    @cached_property
    def k_multiple(self) -> int:
        """K is padded in storage to a multiple of this (groups, whole words, and 32 for wide tiles)."""
        return math.lcm(32, *(p.per for p in self.scales if p.per != ROW), *(32 // p.bits for p in self.codes))

    def padded(self, n: int, k: int) -> tuple[int, int]:
        """(N, K) of the stored planes of an N×K weight."""
        return -(-n // TILE_N) * TILE_N, -(-k // self.k_multiple) * self.k_multiple

    def plane_shape(self, plane: Plane, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the stored tensor of ``plane`` for an N×K weight: ``[N/16, entries or words along K, 16]``."""
        rows, cols = self.padded(n, k)
        if plane.is_code:
            return rows // TILE_N, cols * plane.bits // 32, TILE_N
        return rows // TILE_N, 1 if plane.per == ROW else cols // plane.per, TILE_N

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of the stored planes of an N×K weight, padding included."""
        return sum(math.prod(self.plane_shape(p, n, k)) * p.storage_dtype.itemsize for p in self.planes)

    def bits_per_weight(self, k: int | None = None) -> sympy.Expr:
        """Exact bits per weight; planes per row add bits/K, with K left symbolic unless given."""
        cols = sympy.Symbol("K", positive=True) if k is None else sympy.Integer(k)
        return sympy.Add(*(sympy.Rational(p.bits) / (cols if p.per == ROW else p.per) for p in self.planes))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every field that decides a value: name, planes, expression, tables."""
        text = repr((self.name, self.planes, sympy.srepr(self.value), self.codebooks))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def codebook(self, name: str) -> Codebook:
        return next(c for c in self.codebooks if c.name == name)


def symbols(names: str) -> tuple[sympy.Symbol, ...]:
    """Real sympy symbols for plane names, as ``value`` uses them."""
    made = sympy.symbols(names, real=True)
    return made if isinstance(made, tuple) else (made,)


Planes = Mapping[str, torch.Tensor]
