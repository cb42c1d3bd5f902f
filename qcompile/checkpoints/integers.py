"""Weights of integers with a scale, and a zero point or none, for each group of a row: what several layouts come down to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from ..formats import FormatSpec, Scheme, get
from ..formats.integer import int8, symmetric, zero_point
from .files import Stored
from .gptq import SCALE_DTYPES, columns_of
from .repack import Codes, Kind, repack_codes, unpack
from .weight import Weight


@dataclass(frozen=True)
class Integers:
    """The codes of an N×K weight: int8, or words of unsigned ones with 2^(bits−1) added, without unused bits if ``dense``."""

    stored: Stored
    n: int
    k: int
    bits: int
    dense: bool = True

    def read(self, signed: bool) -> Codes:
        """For a plane of ``signed`` bytes or of unsigned codes. Raises :class:`CorruptCheckpointError` for int8 that do not
        fit into ``bits``."""
        data, half = self.stored.read(), 2 ** (self.bits - 1)
        if data.dtype != torch.int8:
            return Codes(Kind.STREAM if self.dense else Kind.PADDED, data, self.n, self.k, self.bits, 128 if signed else 0)
        if self.bits < 8 and data.numel() and not -half <= int(data.min()) <= int(data.max()) < half:
            raise CorruptCheckpointError(f"{self.stored.name}: codes outside of {self.bits} bits")
        return Codes(Kind.BYTES, data, self.n, self.k, self.bits, 0 if signed else half)


def integer_weight(
    codes: Integers, scale: Stored, zero: Stored | None = None, order: Stored | None = None, more: tuple[Stored, ...] = ()
) -> Weight:
    """weight = ``scale`` · (code − ``zero``): ``scale`` [N, G], [N, 1] or [1], ``zero`` int8 of that shape, or packed int32
    along N; ``order`` int32 [K] is the group of each column. ``more``: further tensors that were used."""
    n, k, bits = codes.n, codes.k, codes.bits
    scale.expect(tuple(SCALE_DTYPES), *scale.shape)
    per_tensor = scale.shape in ((), (1,), (1, 1)) and n != 1
    if not per_tensor and (len(scale.shape) != 2 or scale.shape[0] != n or scale.shape[1] < 1):
        raise CorruptCheckpointError(f"{scale.name}: {list(scale.shape)} for a {n}×{k} weight; expected [{n}, groups] or one")
    groups = 1 if per_tensor else scale.shape[1]
    group = -(-k // groups)
    if group < 2 or -(-k // group) != groups:
        raise CorruptCheckpointError(f"{scale.name}: {groups} groups do not divide {k} inputs")
    columns = columns_of(order.expect(torch.int32, k), k, group) if order is not None and groups > 1 else None
    if zero is not None:
        _check_zeros(zero, n, groups, bits)
    spec = _spec(bits, group, SCALE_DTYPES[scale.dtype], zero is not None, columns is not None, groups == 1)
    sources = (*(s for s in (codes.stored, scale, zero, order) if s is not None), *more)
    return Weight((n, k), sources, lambda: _planes(spec, codes, scale, zero, groups, columns), Scheme(spec))


def _spec(bits: int, group: int, scale: str, asymmetric: bool, permuted: bool, whole_row: bool) -> FormatSpec:
    if asymmetric:
        return get(zero_point(bits, group, permuted, scale).name)
    if bits != 8:
        return get(symmetric(bits, group, scale, permuted).name)
    if permuted:
        raise UnsupportedCheckpointError("8-bit symmetric weights in activation order are not read; save them with zero points")
    return get("int8") if whole_row else get(int8(group, scale).name)


def _check_zeros(zero: Stored, n: int, groups: int, bits: int) -> None:
    """int8 [N, G] or one, or words along N of G columns."""
    dense, loose = -(-n * bits // 32), -(-n // (32 // bits))
    if zero.dtype == torch.int8 and zero.shape in ((n, groups), (1,), ()):
        return
    if zero.dtype != torch.int32 or zero.shape not in ((dense, groups), (loose, groups)):
        raise CorruptCheckpointError(f"{zero.name}: {zero.dtype} {list(zero.shape)} for {n} outputs in {groups} groups; expected "
                                     f"int8 [{n}, {groups}] or int32 [{dense}, {groups}]")  # fmt: skip


def _zeros(zero: Stored, n: int, groups: int, bits: int) -> torch.Tensor:
    """uint8 [N, G], 2^(bits−1) added: int8 as they are, or packed along N."""
    half, values = 2 ** (bits - 1), zero.read()
    if zero.dtype == torch.int8:
        wide = values.to(torch.int16).reshape(-1, groups if values.numel() > 1 else 1).expand(n, groups) + half
        if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < 2**bits:
            raise CorruptCheckpointError(f"{zero.name}: zero points outside of {bits} bits")
        return wide.to(torch.uint8)
    kind = Kind.STREAM if len(values) == -(-n * bits // 32) else Kind.PADDED
    return unpack(Codes(kind, values.t().contiguous(), groups, n, bits)).t()


def _planes(
    spec: FormatSpec, codes: Integers, scale: Stored, zero: Stored | None, groups: int, columns: torch.Tensor | None
) -> list[torch.Tensor]:
    scales = scale.read().to(spec.scales[0].entry_dtype)
    scales = scales.reshape(1, 1).expand(codes.n, 1) if scales.numel() == 1 else scales
    found, entries = replace(codes.read(spec.code.dtype == "i8"), order=columns), {"scale": (scale.name, scales)}
    if zero is not None:
        entries["zero"] = zero.name, _zeros(zero, codes.n, groups, codes.bits)
    return repack_codes(spec, found, entries)
