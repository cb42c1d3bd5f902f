"""Bytes of GGUF tensors: decoded bit for bit as gguf-py does, and got back from planes unchanged."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qcompile import formats
from qcompile.checkpoints.gguf_blocks import BLOCKS, from_blocks, row_bytes, to_blocks
from qcompile.errors import LayoutError, UnknownFormatError
from qcompile.formats import reference

DATA = Path(__file__).parent / "data"
pytestmark = pytest.mark.usefixtures("one_thread")
each_type = pytest.mark.parametrize("name", BLOCKS)
SHAPES = [(1, 256), (37, 1024)]


def random_bytes(name: str, n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * k)
    return torch.randint(0, 256, row_bytes(name, n, k), dtype=torch.uint8, generator=generator)


def by_gguf(name: str, data: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), GGMLQuantizationType[name]))


def decoded(name: str, data: torch.Tensor, n: int, k: int) -> torch.Tensor:
    return reference.decode(formats.get(name), from_blocks(name, data, n, k), n, k)


def floats_of(name: str, data: torch.Tensor) -> list[torch.Tensor]:
    """float16 views [blocks] of the float scales in ``data``, which must be whole blocks."""
    blocks, at, found = data.view(-1, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]), 0, []
    for field in BLOCKS[name]:
        if field.chunks[0].plane in ("d", "m", "dmin"):
            found.append(blocks[:, at : at + 2])
        at += field.size
    return found


@each_type
@pytest.mark.parametrize("n,k", SHAPES)
def test_decoding_any_bytes_equals_gguf(name: str, n: int, k: int) -> None:
    data = random_bytes(name, n, k)
    if name == "MXFP4":  # scale 255 is NaN in the OCP specification, and 2^127 in ggml
        first = data.view(-1, 17)[:, 0]
        first.clamp_(max=254)
    ours, theirs = decoded(name, data, n, k), by_gguf(name, data)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0.0, torch.inf, -torch.inf), theirs.nan_to_num(0.0, torch.inf, -torch.inf))


@each_type
def test_decoding_finite_scales_equals_gguf(name: str) -> None:
    n, k = 48, 2048
    data = random_bytes(name, n, k)
    for scale in floats_of(name, data):
        scale.copy_(
            torch.randn(len(scale), generator=torch.Generator().manual_seed(1)).half().view(torch.uint8).view(-1, 2)
        )
    if name == "MXFP4":
        data.view(-1, 17)[:, 0].clamp_(60, 200)
    ours = decoded(name, data, n, k)
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, by_gguf(name, data))


@each_type
def test_scales_that_are_not_finite_decode_as_in_gguf(name: str) -> None:
    scales = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 2**-24, 65504.0], dtype=torch.float16)
    k = 256 * len(scales)
    data = random_bytes(name, 16, k)
    for shift, scale in enumerate(floats_of(name, data)):
        values = scales.roll(shift).repeat(-(-len(scale) // len(scales)))[: len(scale)].contiguous()
        scale.copy_(values.view(torch.uint8).view(-1, 2))
    if name == "MXFP4":
        data.view(-1, 17)[:, 0].clamp_(max=254)
    ours, theirs = decoded(name, data, 16, k), by_gguf(name, data)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


@each_type
@pytest.mark.parametrize("n,k", SHAPES)
def test_every_pattern_of_bytes_comes_back(name: str, n: int, k: int) -> None:
    data = random_bytes(name, n, k)
    assert torch.equal(to_blocks(name, from_blocks(name, data, n, k), n, k), data)


@each_type
def test_each_bit_of_a_block_belongs_to_one_bit_of_a_plane(name: str) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    spec = formats.get(name)
    assert sum(field.size for field in BLOCKS[name]) == size
    assert all(sum(chunk.bits for chunk in field.chunks) == 8 for field in BLOCKS[name])
    assert spec.bits_per_weight() * block == 8 * size and spec.whole_groups == block
    bits = torch.eye(8 * size, dtype=torch.uint8).view(8 * size, size, 8) << torch.arange(8, dtype=torch.uint8)
    one_bit = bits.sum(-1, dtype=torch.uint8)
    planes = from_blocks(name, one_bit, 8 * size, block)
    assert torch.equal(to_blocks(name, planes, 8 * size, block), one_bit)
    assert sum(_ones(plane) for plane in planes) == 8 * size


def _ones(plane: torch.Tensor) -> int:
    return int(np.unpackbits(plane.view(torch.uint8).numpy()).sum())


@each_type
def test_rows_of_llama_cpp_decode_close_to_their_weight(name: str) -> None:
    rows = np.load(DATA / "gguf_rows.npz")
    weight, data = torch.from_numpy(rows["weight"]), torch.from_numpy(rows[name])
    n, k = weight.shape
    planes = from_blocks(name, data, n, k)
    value = reference.decode(formats.get(name), planes, n, k)
    assert torch.equal(value, by_gguf(name, data))
    assert torch.equal(to_blocks(name, planes, n, k), data)
    assert (value - weight).norm() / weight.norm() < {"Q2_K": 0.35, "Q3_K": 0.2}.get(name, 0.13)


@each_type
def test_what_we_quantize_is_a_gguf_tensor(name: str) -> None:
    spec, (n, k) = formats.get(name), (20, 512)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(2))
    planes = reference.quantize(spec, weight)
    data = to_blocks(name, planes, n, k)
    assert torch.equal(by_gguf(name, data), reference.decode(spec, planes, n, k))
    for ours, again in zip(planes, from_blocks(name, data, n, k), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_chunks_of_rows_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(name, 50, 512)
    planes = from_blocks(name, data, 50, 512)
    monkeypatch.setattr("qcompile.checkpoints.gguf_blocks.CHUNK_ELEMENTS", 16 * 512)
    for whole, chunked in zip(planes, from_blocks(name, data, 50, 512), strict=True):
        assert torch.equal(whole.view(torch.uint8), chunked.view(torch.uint8))
    assert torch.equal(to_blocks(name, planes, 50, 512), data)


@each_type
def test_sizes_that_do_not_fit_are_named(name: str) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    k = block + 16
    with pytest.raises(LayoutError, match=rf"{name}: blocks of {block} weights.*{k}"):
        from_blocks(name, torch.zeros(1, size, dtype=torch.uint8), 1, k)
    with pytest.raises(LayoutError, match=rf"{name}: blocks of {block} weights.*{k}"):
        to_blocks(name, [], 1, k)
    with pytest.raises(LayoutError, match=rf"uint8 \[2, {2 * size}\], found torch.uint8 \[2, {size}\]"):
        from_blocks(name, torch.zeros(2, size, dtype=torch.uint8), 2, 2 * block)
    with pytest.raises(LayoutError, match="found torch.int8"):
        from_blocks(name, torch.zeros(1, size, dtype=torch.int8), 1, block)
    planes = from_blocks(name, random_bytes(name, 1, block), 1, block)
    with pytest.raises(LayoutError, match=rf"1×{2 * block}"):
        to_blocks(name, planes, 1, 2 * block)


def test_types_that_are_not_read_are_named() -> None:
    with pytest.raises(UnknownFormatError, match="Did you mean .*'Q4_K'"):
        from_blocks("Q4_K_M", torch.zeros(1, 1, dtype=torch.uint8), 1, 256)
    with pytest.raises(UnknownFormatError, match="Known: .*IQ4_XS"):
        to_blocks("IQ1_S", [], 1, 256)
