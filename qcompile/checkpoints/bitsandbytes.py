"""bitsandbytes: 4 bits by table (nf4, fp4) with an absolute maximum for each block, themselves in 8 bits if nested; and int8.

4 bits (Dettmers et al., "QLoRA", 2023): ``weight`` holds two codes in a byte, the first in the upper half, of the row-major
weight cut into blocks of ``blocksize``; weight = absmax[block] · table[code]. Nested: absmax = nested_quant_map[code] ·
nested_absmax[code's block of 256] + nested_offset. 8 bits ("LLM.int8()", 2022): weight = int8 · ``SCB``[row] / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from ..formats import Codebook, Scheme, get
from ..formats.codebook import FP4, NF4
from .files import Stored, TensorFiles, parse_json
from .repack import Codes, Kind, repack_codes
from .weight import Checkpoint, Weight, by_layer, finite, part

STATE = "weight.quant_state.bitsandbytes__"
BOOKS: dict[str, Codebook] = {"nf4": NF4, "fp4": FP4}
ENDS = ("weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *(STATE + b for b in BOOKS),
        "weight_format")  # fmt: skip
MAX_STATE = 1 << 16
"""Bytes of the JSON that describes a weight."""


def read(files: TensorFiles, settings: Mapping[str, Any]) -> Checkpoint:
    """The weights of a bitsandbytes checkpoint of 4 or 8 bits. Raises :class:`UnsupportedCheckpointError` for blocks that reach
    over rows and for another table, :class:`CorruptCheckpointError` naming the tensor that does not fit."""

    def layer(name: str, parts: Mapping[str, Stored]) -> Weight:
        return _int8(name, parts) if "SCB" in parts else _four(name, parts)

    return by_layer("bitsandbytes", files, ("weight.absmax", "SCB"), ENDS, layer)


def _int8(name: str, parts: Mapping[str, Stored]) -> Weight:
    weight = part(name, parts, "weight").expect(torch.int8, None, None)
    n, k = weight.shape
    scale = parts["SCB"].expect((torch.float32, torch.float16, torch.bfloat16), n)
    order = parts.get("weight_format")
    if order is not None and order.nbytes and bool(order.read().any()):
        raise UnsupportedCheckpointError(f"{order.name}: only rows in their own order are read; save it again with bitsandbytes "
                                         "of 0.45 or later")  # fmt: skip
    spec = get("int8")

    def planes() -> list[torch.Tensor]:
        scales = (scale.read().to(torch.float32) / 127).unsqueeze(1)
        return repack_codes(spec, Codes(Kind.BYTES, weight.read(), n, k, 8), {"scale": (scale.name, scales)})

    return Weight((n, k), (weight, scale, *((order,) if order is not None else ())), planes, Scheme(spec))


def _four(name: str, parts: Mapping[str, Stored]) -> Weight:
    weight, absmax = part(name, parts, "weight"), part(name, parts, "weight.absmax")
    book, state, source = _state(name, parts)
    shape, block = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and 0 < s < 2**31 for s in shape)
            and type(block) is int and block > 1 and block % 2 == 0):  # fmt: skip
        raise CorruptCheckpointError(f"{source.name}: expected a shape [N, K] and a blocksize, found {shape} and {block!r}")
    n, k = shape
    if weight.nbytes != -(-n * k // 2):
        raise CorruptCheckpointError(f"{weight.name}: {weight.nbytes} bytes for {n}×{k} codes of 4 bits")
    if k % block:
        raise UnsupportedCheckpointError(f"{weight.name}: blocks of {block} weights reach over rows of {k}; quantize with a "
                                         "blocksize that divides them, or leave the layer out")  # fmt: skip
    nested = "weight.nested_absmax" in parts
    absmax.expect(torch.uint8 if nested else torch.float32, n * k // block)
    table = part(name, parts, "weight.quant_map").expect(torch.float32, 16)
    if not torch.equal(table.read(), torch.tensor(book.values)):
        raise UnsupportedCheckpointError(f"{table.name}: not the table of {book.name} that bitsandbytes has")
    more = _nested_parts(name, parts, n * k // block, state) if nested else ()
    spec = get(book.name.lower() if block == 64 else f"{book.name.lower()}_g{block}")

    def planes() -> list[torch.Tensor]:
        scales = _absmax(absmax, more, state).view(n, k // block)
        codes = weight.read().reshape(-1).view(torch.uint8).view(n, k // 2)
        return repack_codes(spec, Codes(Kind.NIBBLES_HIGH, codes, n, k, 4), {"absmax": (absmax.name, scales)})

    return Weight((n, k), (weight, absmax, table, source, *more), planes, Scheme(spec))


def _state(name: str, parts: Mapping[str, Stored]) -> tuple[Codebook, dict[str, Any], Stored]:
    """The table that a weight is in, and what its JSON says."""
    kind = next((kind for kind in BOOKS if STATE + kind in parts), None)
    if kind is None:
        raise CorruptCheckpointError(f"{name}.{STATE}…: not in the file, or of another kind than {' and '.join(BOOKS)}")
    source = parts[STATE + kind].expect(torch.uint8, None)
    if source.nbytes > MAX_STATE:
        raise CorruptCheckpointError(f"{source.name}: {source.nbytes} bytes; a description takes less than {MAX_STATE}")
    state = parse_json(bytes(source.read().tolist()), source.name)
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{source.name}: expected a JSON object")
    return BOOKS[kind], state, source


def _nested_parts(name: str, parts: Mapping[str, Stored], count: int, state: Mapping[str, Any]) -> tuple[Stored, Stored]:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float):
        raise CorruptCheckpointError(f"{name}: expected nested_blocksize and nested_offset, found {block!r} and {offset!r}")
    scale = parts["weight.nested_absmax"].expect(torch.float32, -(-count // block))
    return scale, part(name, parts, "weight.nested_quant_map").expect(torch.float32, 256)


def _absmax(absmax: Stored, more: tuple[Stored, ...], state: Mapping[str, Any]) -> torch.Tensor:
    """float32 ``[blocks]``."""
    if not more:
        return absmax.read()
    scale, table = (finite(s.name, s.read()) for s in more)
    codes = absmax.read()
    each = scale.repeat_interleave(min(int(state["nested_blocksize"]), len(codes)))[: len(codes)]
    return table[codes.int()] * each + float(state["nested_offset"])
