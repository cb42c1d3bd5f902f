"""A weight format is data: bit planes, and a sympy expression for the value of one weight."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import sympy
import torch

from ..errors import FormatError

ROW = 0
"""``Plane.per`` of a plane with one entry for a whole row of the weight (per output channel)."""

ALL = 0
"""``Plane.rows`` of a plane whose entries serve every row of the weight; with ``per=ROW``: one entry per tensor."""

TILE_N = 16
"""Rows interleaved in storage; see :mod:`qcompile.formats.layout`."""

SCALED = "_scaled"
"""What names of formats with a factor for each column end in."""

INTEGERS = {**{f"u{bits}": bits for bits in range(1, 9)}, "i8": 8}
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plane:
    """One plane of a format: codes, scales or offsets.

    ``dtype`` is an integer of 1 to 8 bits (u1 … u8, i8) or a float (f32, f16, bf16). ``per`` says how many consecutive
    weights of a row one entry covers: 1 for codes, a group size for scales, :data:`ROW` for one entry per row. ``rows``
    says how many rows share an entry: 1, a multiple of 16 (a block), or :data:`ALL`.
    """

    name: str
    dtype: str
    per: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in INTEGERS and self.dtype not in FLOATS:
            known = ", ".join([*INTEGERS, *FLOATS])
            raise FormatError(f"plane {self.name!r}: unknown dtype {self.dtype!r}; use one of {known}")
        if self.per == 1 and (self.dtype in FLOATS or self.rows != 1):
            raise FormatError(f"plane {self.name!r}: dtype {self.dtype} with per=1, rows={self.rows}; planes with an entry for "
                              "each weight hold integer codes; scales have per=ROW or a group size of 2 or more")  # fmt: skip
        if self.rows < 0 or (self.rows != 1 and self.rows % TILE_N):
            raise FormatError(f"plane {self.name!r}: rows={self.rows}; use 1, a multiple of {TILE_N}, or ALL")
        if self.per < 0 or (self.per == ROW and self.bits < 8):
            raise FormatError(f"plane {self.name!r}: per={self.per} with {self.bits} bits; entries per row need 8 bits or a "
                              "float")  # fmt: skip
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise FormatError(f"plane name {self.name!r}: use lower-case letters, digits and _")

    @property
    def is_code(self) -> bool:
        return self.per == 1

    @property
    def is_integer(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def bits(self) -> int:
        """Bits of one entry."""
        return INTEGERS[self.dtype] if self.is_integer else 8 * FLOATS[self.dtype].itemsize

    @property
    def entry_dtype(self) -> torch.dtype:
        """dtype of unpacked entries: uint8 or int8 for integers, the plane's own dtype for floats."""
        if self.is_integer:
            return torch.int8 if self.dtype == "i8" else torch.uint8
        return FLOATS[self.dtype]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The stored tensors: one, or for 3, 5, 6 and 7 bits one for each power of two of which the bits are the sum."""
        if not self.is_integer:
            return (Part(self.name, self, self.bits, 0),)
        found, shift = [], 0
        for bits in (8, 4, 2, 1):
            if self.bits & bits:
                found.append(Part(f"{self.name}_{shift}" if shift else self.name, self, bits, shift))
                shift += bits
        return tuple(found)


@dataclass(frozen=True)
class Part:
    """One stored tensor of a plane: ``bits`` bits of every entry, from its bit ``shift`` on."""

    name: str
    plane: Plane
    bits: int
    shift: int

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored tensor: int32 words of codes, bytes of integer scales, the plane's own dtype for floats."""
        if self.plane.is_code:
            return torch.int32
        return torch.uint8 if self.plane.is_integer else FLOATS[self.plane.dtype]

    @property
    def entries(self) -> int:
        """Entries in one element of the stored tensor: of a word, of a byte, or 1."""
        return (32 if self.plane.is_code else 8) // self.bits if self.plane.is_integer else 1


@dataclass(frozen=True)
class Codebook:
    """A function of one integer plane given by its table. ``values[c]`` is the value of code c (NaN: no such value).

    ``minifloat=(exponent bits, mantissa bits)`` marks a float of that shape, with a sign if one bit is left, so that
    printers may decode it with shifts and ties are rounded to even; ``cast`` names a torch dtype whose conversion rounds
    to it (nearest, ties to even). Used in a value as ``NF4(q)``.
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
    ``scale*(q - 8) + zero``. Exactly one plane holds codes. ``quantizer(spec, weight)`` turns float32 ``[n, K']`` into
    entries ``[n, entries]`` (``[ceil(n/rows), entries]``) by plane name; without one, a search over scales is derived from
    ``value`` (:mod:`qcompile.formats.search`), which tries the shares ``shrinks`` of a group's range (None: by the bits of
    a code; (): the range itself, unrefined). A ``permuted`` format stores the weight's columns in another order, which
    is kept in a further tensor ``order`` int32 ``[K]``: stored column i is column ``order[i]`` of the weight (GPTQ's
    activation order). A ``scaled`` one, made by :func:`scaled`, holds the weight divided by a factor for each column; the
    factors, which inputs are multiplied by, are a further tensor ``factors`` float32 ``[K]``.
    Raises :class:`FormatError` when planes and value do not fit together.
    """

    name: str
    planes: tuple[Plane, ...]
    value: sympy.Expr
    codebooks: tuple[Codebook, ...] = ()
    quantizer: Quantizer | None = field(default=None, compare=False)
    permuted: bool = False
    shrinks: tuple[float, ...] | None = field(default=None, compare=False)
    scaled: bool = False

    def __post_init__(self) -> None:
        names = [p.name for p in self.planes]
        parts = [part.name for part in self.parts] + ["order", "factors"]
        used = {s.name for s in self.value.free_symbols}
        if len(set(names)) != len(names) or len(set(parts)) != len(parts):
            raise FormatError(f"format {self.name!r}: two planes have one name in {names} (stored as {parts})")
        if used != set(names):
            raise FormatError(
                f"format {self.name!r}: value uses {sorted(used)}, planes are {sorted(names)}; they must agree"
            )
        calls = {f.func.__name__ for f in self.value.atoms(sympy.Function)}
        if unknown := calls - {c.name for c in self.codebooks}:
            raise FormatError(f"format {self.name!r}: value calls {sorted(unknown)}, which is not in codebooks=")
        if len(codes := [p.name for p in self.planes if p.is_code]) != 1:
            raise FormatError(f"format {self.name!r}: exactly one plane holds codes (per=1), found {codes}; codes of 3, 5, 6 or "
                              "7 bits are one plane u3, u5, u6 or u7")  # fmt: skip
        if not re.fullmatch(r"\w+", self.name):
            raise FormatError(f"format name {self.name!r}: use letters, digits and _")
        if self.name.endswith(SCALED) != self.scaled:
            raise FormatError(f"format name {self.name!r}: names of formats with a factor for each column, and no others, end in "
                              f"{SCALED!r}")  # fmt: skip

    @cached_property
    def code(self) -> Plane:
        """The plane of codes."""
        return next(p for p in self.planes if p.is_code)

    @cached_property
    def scales(self) -> tuple[Plane, ...]:
        return tuple(p for p in self.planes if not p.is_code)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The stored tensors in their order, without those of :attr:`columns`."""
        return tuple(part for plane in self.planes for part in plane.parts)

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """Names of all stored tensors."""
        return (*(part.name for part in self.parts), *self.columns)

    @cached_property
    def columns(self) -> dict[str, torch.dtype]:
        """Stored tensors ``[K]`` after the parts, which say what is done to inputs before they meet the parts."""
        return ({"order": torch.int32} if self.permuted else {}) | ({"factors": torch.float32} if self.scaled else {})

    @cached_property
    def plain(self) -> FormatSpec:
        """The format of the parts alone: what kernels are made for."""
        if not self.columns:
            return self
        return dataclasses.replace(self, name=self.name.removesuffix(SCALED), permuted=False, scaled=False)

    @cached_property
    def period(self) -> int:
        """Weights over which every scale is constant: what all groups are multiples of, or :data:`ROW` if there are none."""
        return math.gcd(*(p.per for p in self.scales if p.per != ROW))

    @cached_property
    def k_multiple(self) -> int:
        """K is padded in storage to a multiple of this: the smallest group, and 32 for whole words. The last entry of a larger
        group, and the last byte of small scales, may cover less."""
        return math.lcm(32, self.period) if self.period else 32

    @cached_property
    def whole_groups(self) -> int:
        """A multiple of every group: what K is padded to for quantizers."""
        return math.lcm(self.k_multiple, *(p.per for p in self.scales if p.per != ROW))

    def whole(self, k: int) -> int:
        """``k`` rounded up to whole groups of every size."""
        return -(-k // self.whole_groups) * self.whole_groups

    @cached_property
    def row_multiple(self) -> int:
        """Rows that share scales, and so are quantized together."""
        return math.lcm(TILE_N, *(p.rows for p in self.scales if p.rows != ALL))

    def padded(self, n: int, k: int) -> tuple[int, int]:
        """(N, K) of the stored planes of an N×K weight."""
        return -(-n // TILE_N) * TILE_N, -(-k // self.k_multiple) * self.k_multiple

    def entry_shape(self, plane: Plane, n: int, k: int) -> tuple[int, int]:
        """(rows, entries along K) of the unpacked plane of an N×K weight."""
        cols = self.padded(n, k)[1]
        rows = 1 if plane.rows == ALL else -(-n // plane.rows)
        return rows, 1 if plane.per == ROW else -(-cols // plane.per)

    def part_shape(self, part: Part, n: int, k: int) -> tuple[int, int, int]:
        """Shape of a stored tensor of an N×K weight: ``[N/16, words, bytes or entries along K, 16]``, with a last dimension
        of 1 where rows share entries: those are stored once for every tile of 16 rows."""
        rows, cols = self.padded(n, k)
        along = 1 if part.plane.per == ROW else -(-cols // (part.plane.per * part.entries))
        return rows // TILE_N, along, TILE_N if part.plane.rows == 1 else 1

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of the stored planes of an N×K weight, padding included."""
        stored = sum(math.prod(self.part_shape(p, n, k)) * p.dtype.itemsize for p in self.parts)
        return stored + sum(dtype.itemsize * k for dtype in self.columns.values())

    def bits_per_weight(self, n: int | None = None, k: int | None = None) -> sympy.Expr:
        """Exact bits per weight; what comes once a row, a column or a tensor adds bits/K, bits/N or bits/(N·K), with N and K
        left symbolic unless given."""
        height = sympy.Symbol("N", positive=True) if n is None else sympy.Integer(n)
        width = sympy.Symbol("K", positive=True) if k is None else sympy.Integer(k)
        each = [sympy.Rational(p.bits) / (width if p.per == ROW else p.per) / (height if p.rows == ALL else p.rows)
                for p in self.planes]  # fmt: skip
        return sympy.Add(*each, *(8 * dtype.itemsize / height for dtype in self.columns.values()))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every field that decides a value: name (which tells of factors), planes, expression, tables,
        order."""
        text = repr((self.name, self.planes, sympy.srepr(self.value), self.codebooks, self.permuted))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def codebook(self, name: str) -> Codebook:
        return next(c for c in self.codebooks if c.name == name)


def scaled(spec: FormatSpec) -> FormatSpec:
    """``spec`` with a factor for each column: value(planes) · factors[k] is the weight, and inputs are multiplied by the
    factors before the product (Xiao et al., "SmoothQuant", 2023; Lin et al., "AWQ", 2024)."""
    return spec if spec.scaled else dataclasses.replace(spec, name=spec.name + SCALED, scaled=True)


def symbols(names: str) -> tuple[sympy.Symbol, ...]:
    """Real sympy symbols for plane names, as ``value`` uses them."""
    made = sympy.symbols(names, real=True)
    return made if isinstance(made, tuple) else (made,)
