"""The compiled repacker against the tables in PyTorch and the layout's own packer, over sizes that fill no tile or word."""

from __future__ import annotations

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qcompile.checkpoints.gguf_blocks import BLOCKS, from_blocks, row_bytes
from qcompile.checkpoints.repack import Codes, Kind, repack_blocks, repack_codes, unpack
from qcompile.checkpoints.words import pack_stream
from qcompile.errors import CorruptCheckpointError, LayoutError
from qcompile.formats import FormatSpec, get
from qcompile.formats.layout import pack_plane

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, high: int = 256) -> torch.Tensor:
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def blocks(name: str, n: int, k: int) -> torch.Tensor:
    """Any bytes, but floats that are finite."""
    data, (size, at) = random(*row_bytes(name, n, k)), (GGML_QUANT_SIZES[GGMLQuantizationType[name]][1], 0)
    for field in BLOCKS[name]:
        if field.chunks[0].plane in ("d", "m", "dmin"):
            data.view(-1, size)[:, at + 1] &= 0xBF  # the exponent's first bit
        at += field.size
    return data


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("n,k", [(1, 256), (16, 256), (37, 1024), (80, 512)])
def test_blocks_as_by_the_table(name: str, n: int, k: int) -> None:
    data = blocks(name, n, k)
    same(repack_blocks("w", name, data, n, k), from_blocks(name, data, n, k))


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "MXFP4"])
def test_blocks_with_scales_that_are_not_finite_are_named(name: str) -> None:
    data, size, at = blocks(name, 20, 256), GGML_QUANT_SIZES[GGMLQuantizationType[name]][1], 0
    for field in BLOCKS[name]:
        if field.chunks[0].plane in ("d", "m", "dmin"):
            bad = data.clone()
            bad.view(-1, size)[-1, at : at + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
            with pytest.raises(CorruptCheckpointError, match="blk.0.w: scales"):
                repack_blocks("blk.0.w", name, bad, 20, 256)
        at += field.size


def packed(spec: FormatSpec, codes: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    entries = {"q": codes.view(torch.int8) if spec.code.dtype == "i8" else codes, "scale": scale}
    return [part for plane in spec.planes for part in pack_plane(spec, plane, entries[plane.name], *codes.shape)]


SIZES = [(16, 128), (37, 128), (8, 96), (40, 72)]


@pytest.mark.parametrize("n,k", SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_streams(bits: int, n: int, k: int) -> None:
    spec, codes, scale = get(f"int{bits}_sym_g24"), random(n, k, high=2**bits), torch.rand(n, -(-k // 24)).bfloat16()
    words = pack_stream(codes, bits)
    same(repack_codes(spec, Codes(Kind.STREAM, words, n, k, bits), {"scale": ("s", scale)}), packed(spec, codes, scale))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    moved = repack_codes(spec, Codes(Kind.STREAM, words, n, k, bits, order=order), {"scale": ("s", scale)})
    same(moved, [*packed(spec, codes[:, order.long()], scale), order])


@pytest.mark.parametrize("n,k", SIZES)
def test_words_with_unused_bits(n: int, k: int) -> None:
    spec, codes, scale = get("int3_sym_g24"), random(n, k, high=8), torch.rand(n, -(-k // 24)).bfloat16()
    tens = torch.nn.functional.pad(codes, (0, -k % 10)).unflatten(1, (-1, 10)).to(torch.int32)
    words = (tens << (3 * torch.arange(10, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    same(repack_codes(spec, Codes(Kind.PADDED, words, n, k, 3), {"scale": ("s", scale)}), packed(spec, codes, scale))


@pytest.mark.parametrize("n,k", SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_columns(bits: int, n: int, k: int) -> None:
    k = -(-k // 16) * 16
    spec, codes, scale = get(f"int{bits}_zp_g24"), random(n, k, high=2**bits), torch.rand(n, -(-k // 24)).half()
    words, zero = pack_stream(codes, bits).t().contiguous(), torch.zeros(scale.shape, dtype=torch.uint8)
    ours = repack_codes(spec, Codes(Kind.COLUMNS, words, n, k, bits), {"scale": ("s", scale), "zero": ("z", zero)})
    entries = {"q": codes, "scale": scale, "zero": zero}
    same(ours, [part for p in spec.planes for part in pack_plane(spec, p, entries[p.name], n, k)])


@pytest.mark.parametrize("n,k", SIZES)
def test_bytes_and_halves(n: int, k: int) -> None:
    codes, scale = random(n, k), torch.rand(n, 1)
    spec = get("int8")
    same(repack_codes(spec, Codes(Kind.BYTES, codes, n, k, 8), {"scale": ("s", scale)}), packed(spec, codes, scale))
    flipped = Codes(Kind.BYTES, codes, n, k, 8, flip=128)
    same(repack_codes(spec, flipped, {"scale": ("s", scale)}), packed(spec, codes ^ 128, scale))
    nibbles, spec = random(n, k, high=16), get("int4_sym_g24")
    scale = torch.rand(n, -(-k // 24)).bfloat16()
    high_first = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    same(repack_codes(spec, Codes(Kind.NIBBLES_HIGH, high_first, n, k, 4), {"scale": ("s", scale)}), packed(spec, nibbles, scale))


def test_codes_that_must_not_be_there() -> None:
    codes, scale = torch.zeros(20, 40, dtype=torch.uint8), torch.ones(20, 1)
    source = Codes(Kind.BYTES, codes, 20, 40, 8)
    repack_codes(get("int8"), source, {"scale": ("s", scale)}, finite=("w", (127, 255)))
    codes[19, 39] = 255
    with pytest.raises(CorruptCheckpointError, match="w: has codes"):
        repack_codes(get("int8"), source, {"scale": ("s", scale)}, finite=("w", (127, 255)))


@pytest.mark.parametrize("dtype,name", [(torch.bfloat16, "int4_sym_g24"), (torch.float16, "int4_sym_f16_g24"),
                                        (torch.float32, "int4_sym_f32_g24")])  # fmt: skip
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite_are_named(dtype: torch.dtype, name: str, bad: float) -> None:
    codes, scale = Codes(Kind.BYTES, torch.zeros(20, 72, dtype=torch.uint8), 20, 72, 4), torch.ones(3, 20, dtype=dtype)
    scale[0, 0] = torch.finfo(dtype).max
    repack_codes(get(name), codes, {"scale": ("layer.scales", scale.t())})
    scale[2, 19] = bad
    with pytest.raises(CorruptCheckpointError, match="layer.scales: scales have NaN or infinite values"):
        repack_codes(get(name), codes, {"scale": ("layer.scales", scale.t())})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_unpacking_along_rows(bits: int) -> None:
    codes = random(5, 53, high=2**bits)
    assert torch.equal(unpack(Codes(Kind.STREAM, pack_stream(codes, bits), 5, 53, bits)), codes)


@pytest.mark.parametrize("kind", Kind)
def test_too_little_data_is_refused(kind: Kind) -> None:
    n, k = 32, 64
    data = torch.zeros((k // 8 - 1, n) if kind is Kind.COLUMNS else (k - 1, n // 8) if kind is Kind.OUTPUTS else (n, 1),
                       dtype=torch.int32)  # fmt: skip
    spec = get("int8_zp_g32" if kind is Kind.BYTES else "int4_zp_g32")
    entries = {"scale": ("s", torch.ones(n, 2).half()), "zero": ("z", torch.zeros(n, 2, dtype=torch.uint8))}
    with pytest.raises(LayoutError, match="codes of a 32×64 weight take"):
        repack_codes(spec, Codes(kind, data, n, k, spec.code.bits), entries)
    with pytest.raises(LayoutError, match=r"plane 'scale' of int8 needs torch.float32 \[32, 1\]"):
        codes = Codes(Kind.BYTES, torch.zeros(n, k, dtype=torch.int8), n, k, 8)
        repack_codes(get("int8"), codes, {"scale": ("s", torch.ones(1, 1))})
