"""compressed-tensors (llm-compressor, vLLM): integers packed or not, FP8, NVFP4 and MXFP4.

What a layer is follows from its tensors: ``weight_packed`` int32 [N, …] with ``weight_shape`` (codes of a row as a stream of
bits, 2^(bits−1) added; releases before 0.13 left the rest of each word unused where 32 is no multiple of bits), or uint8
[N, K/2] (e2m1), or ``weight`` int8 or float8 [N, K]; ``weight_scale`` [N, G], [N, 1] or [1], ``weight_zero_point``,
``weight_global_scale``, ``weight_g_idx``. weight = scale · (code − zero point).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from ..formats import FormatSpec, Scheme, get
from ..formats.integer import int8, symmetric, zero_point
from .files import Stored, TensorFiles
from .fp4 import mxfp4_weight, nvfp4_weight
from .fp8 import fp8_weight
from .gptq import SCALE_DTYPES, columns_of
from .weight import Checkpoint, Weight, by_layer, finite, pack_rows, part
from .words import unpack_padded, unpack_stream

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
           "mxfp4-pack-quantized", "mixed-precision", "dense")  # fmt: skip
ENDS = ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of a compressed-tensors checkpoint. Raises :class:`UnsupportedCheckpointError` for other layouts (sparse
    ones among them), :class:`CorruptCheckpointError` naming the tensor that does not fit."""
    groups = [g for g in _objects(settings.get("config_groups")) if isinstance(g, dict)]
    layouts = {settings.get("format"), *(g.get("format") for g in groups)} - {None}
    if odd := sorted(str(x) for x in layouts - set(LAYOUTS)):
        raise UnsupportedCheckpointError(f"compressed-tensors layout {odd[0]!r} is not read; {', '.join(LAYOUTS)} are")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedCheckpointError(f"compressed-tensors sparsity {sparsity.get('format')!r} is not read; save it dense")
    if settings.get("transform_config"):
        raise UnsupportedCheckpointError("compressed-tensors with transforms (rotations of activations) is not read")
    bits = {w.get("num_bits") for g in groups if isinstance(w := g.get("weights"), dict)}

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        return _layer(name, parts, sorted(b for b in bits if isinstance(b, int) and 2 <= b <= 8))

    return by_layer("compressed-tensors", files, ("weight_scale",), ENDS, layer)


def _objects(value: Any) -> Iterator[Any]:
    return iter(value.values()) if isinstance(value, dict) else iter(())


def _layer(name: str, parts: Mapping[str, Stored], bits: list[int]) -> Weight:
    scale = part(name, parts, "weight_scale")
    if "weight_packed" not in parts:
        weight = part(name, parts, "weight")
        if weight.dtype.is_floating_point:
            return fp8_weight(weight, scale)
        n, k = weight.expect(torch.int8, None, None).shape
        return _integers(name, parts, Codes(weight, n, k, 8))
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        if "weight_global_scale" in parts:
            return nvfp4_weight(packed, scale, parts["weight_global_scale"], inverse=True)
        return mxfp4_weight(packed, scale)
    return _integers(name, parts, _packed_codes(packed, part(name, parts, "weight_shape"), bits))


@dataclass(frozen=True)
class Codes:
    """The codes of an N×K weight: int8, or packed into words of which ``dense`` ones have no unused bits."""

    stored: Stored
    n: int
    k: int
    bits: int
    dense: bool = True

    def rows(self, at: slice) -> torch.Tensor:
        """uint8 ``[rows, K]``, 2^(bits−1) added."""
        data = self.stored.read()[at]
        if self.stored.dtype == torch.int8:
            return data.view(torch.uint8) ^ 128
        return (unpack_stream(data, self.bits) if self.dense else unpack_padded(data, self.bits, self.k))[:, : self.k]


def _packed_codes(packed: Stored, shape: Stored, bits: list[int]) -> Codes:
    """Which of the configuration's numbers of bits gives words of that width."""
    shape.expect((torch.int64, torch.int32), 2)
    n, k = shape.read().tolist()
    words = packed.expect(torch.int32, None, None).shape[1]
    if n != packed.shape[0] or not 0 < k <= 32 * words:
        raise CorruptCheckpointError(f"{shape.name}: says {n}×{k}, but {packed.name} is {list(packed.shape)}")
    dense = [b for b in bits if -(-k * b // 32) == words]
    loose = [b for b in bits if -(-k // (32 // b)) == words and b not in dense]
    if len(dense) + len(loose) != 1:
        known = " or ".join(map(str, bits)) or "an unknown number of"
        raise CorruptCheckpointError(f"{packed.name}: {list(packed.shape)} does not tell {n}×{k} codes of {known} bits")
    return Codes(packed, n, k, (dense or loose)[0], bool(dense))


def _integers(name: str, parts: Mapping[str, Stored], codes: Codes) -> Weight:
    scale, zero, order = part(name, parts, "weight_scale"), parts.get("weight_zero_point"), parts.get("weight_g_idx")
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
    zeros = _zeros(zero, n, groups, bits) if zero is not None else None
    spec = _spec(bits, group, SCALE_DTYPES[scale.dtype], zeros is not None, columns is not None, groups == 1)
    sources = tuple(s for s in (codes.stored, scale, zero, order, parts.get("weight_shape")) if s is not None)
    return Weight((n, k), sources, lambda: _planes(spec, codes, scale, zeros, columns), Scheme(spec))


def _spec(bits: int, group: int, scale: str, asymmetric: bool, permuted: bool, whole_row: bool) -> FormatSpec:
    if asymmetric:
        return get(zero_point(bits, group, permuted, scale).name)
    if bits != 8:
        return get(symmetric(bits, group, scale, permuted).name)
    if permuted:
        raise UnsupportedCheckpointError("8-bit symmetric weights in activation order are not read; save them with zero points")
    return get("int8") if whole_row else get(int8(group, scale).name)


def _zeros(zero: Stored, n: int, groups: int, bits: int) -> torch.Tensor:
    """uint8 [N, G], 2^(bits−1) added: int8 as they are, or packed along N."""
    half = 2 ** (bits - 1)
    if zero.dtype == torch.int8:
        if zero.shape not in ((n, groups), (1,), ()):
            raise CorruptCheckpointError(f"{zero.name}: {list(zero.shape)} for {n} outputs in {groups} groups")
        values = zero.read().to(torch.int16).reshape(-1, groups).expand(n, groups) + half
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
            raise CorruptCheckpointError(f"{zero.name}: zero points outside of {bits} bits")
        return values.to(torch.uint8)
    words = zero.expect(torch.int32, None, groups).read().t()
    dense, loose = -(-n * bits // 32), -(-n // (32 // bits))
    if words.shape[1] not in (dense, loose):
        raise CorruptCheckpointError(f"{zero.name}: {list(zero.shape)} for {n} outputs; expected [{dense}, {groups}]")
    codes = unpack_stream(words, bits)[:, :n] if words.shape[1] == dense else unpack_padded(words, bits, n)
    return codes.t().contiguous()


def _planes(
    spec: FormatSpec, codes: Codes, scale: Stored, zeros: torch.Tensor | None, columns: torch.Tensor | None
) -> list[torch.Tensor]:
    dtype = spec.scales[0].entry_dtype
    scales = finite(scale.name, scale.read()).to(dtype)
    scales = scales.reshape(1, 1).expand(codes.n, 1) if scales.numel() == 1 else scales
    signed = spec.code.dtype == "i8"
    order = columns.long() if columns is not None else None

    def entries(at: slice) -> dict[str, torch.Tensor]:
        found = codes.rows(at)
        found = found if order is None else found.index_select(1, order)
        planes = {"q": (found ^ 128).view(torch.int8) if signed else found, "scale": scales[at]}
        return planes if zeros is None else planes | {"zero": zeros[at]}

    planes = pack_rows(spec, codes.n, codes.k, entries)
    return planes if columns is None else [*planes, columns]
