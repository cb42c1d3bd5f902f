"""Stacks of packed matrices: what they are as tensors, their products, and which experts those read."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.codegen.cpp_call import caller
from qcompile.codegen.triton import rows_by_expert
from qcompile.errors import FormatError, LayoutError, UnsupportedOnTensorError, WeightError
from qcompile.experts import Chosen
from qcompile.formats import Scheme, get, reference
from qcompile.formats.layout import check_planes, matrix_shape
from qcompile.ops import grouped_linear
from qcompile.plan import Site
from qcompile.policy import Policy
from qcompile.target import Target
from qcompile.tensor import QuantizedTensor, as_parameter, quantize

SCHEMES = [Scheme(get(name)) for name in ("int4_g128", "int8", "nf4", "Q4_K", "fp8_e4m3", "nvfp4")]
SCHEMES += [Scheme(get("int8"), "int8"), Scheme(get("int4_g32"), "int8")]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
E, N, K = 4, 40, 96
"""N is no multiple of a tile: the rows of every expert are padded."""

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")


def stack(scheme: Scheme, transposed: bool = False) -> QuantizedTensor:
    torch.manual_seed(0)
    weight = torch.randn(E, N, K)
    return quantize(weight.mT.contiguous() if transposed else weight, scheme, transposed=transposed)


def close(actual: torch.Tensor, expected: torch.Tensor, scheme: Scheme) -> None:
    """Activations that are quantized add their own error, of 8 bits."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= (1e-5 if scheme.activations is None else 2e-2) * expected.norm()


@each_scheme
def test_every_matrix_is_quantized_by_itself(scheme: Scheme) -> None:
    packed, spec = stack(scheme), scheme.format
    torch.manual_seed(0)
    weight = torch.randn(E, N, K)
    check_planes(spec, packed.planes, *matrix_shape((E, N, K)))
    for i in range(E):
        own = reference.quantize(spec, weight[i])
        assert all(map(torch.equal, own, packed[i].planes))
        assert torch.equal(packed[i].dequantize(), packed.dequantize()[i])
    one = [reference.sqnr(spec, reference.quantize(spec, w), w) for w in weight]
    assert min(one) <= reference.sqnr(spec, packed.planes, weight) <= max(one)


def test_views_share_the_planes() -> None:
    packed = stack(SCHEMES[0])
    first = packed.planes[0].data_ptr()
    each = packed.planes[0].nbytes // E
    assert packed[2].planes[0].data_ptr() == first + 2 * each and packed[2].shape == (N, K)
    assert packed[torch.tensor(2)].planes[0].data_ptr() == packed[-2].planes[0].data_ptr() == first + 2 * each
    assert [m.planes[0].data_ptr() for m in packed.unbind()] == [first + i * each for i in range(E)]
    assert packed[1:3].planes[0].data_ptr() == first + each and packed[1:3].shape == (2, N, K)
    assert packed.mT.shape == (E, K, N) and packed.mT.planes[0].data_ptr() == first
    chosen = packed[torch.tensor([3, 0, 3])]
    assert isinstance(chosen, Chosen) and chosen.stack.planes[0].data_ptr() == first and chosen.shape == (3, N, K)


@pytest.mark.parametrize("inference", [False, True])
def test_views_decode_to_views_of_the_decoded(inference: bool) -> None:
    packed = stack(SCHEMES[2])
    with torch.inference_mode(inference):
        decoded = packed.dequantize()
        ids = torch.tensor([3, -4, 3])
        for view, wanted in [
            (packed[ids], decoded[ids]),
            (packed[ids].transpose(1, 2), decoded[ids].mT),
            (packed.transpose(-2, -1), decoded.mT),
            (packed[1:], decoded[1:]),
            (packed[::2], decoded[::2]),
            (packed[2], decoded[2]),
        ]:
            assert torch.equal(view.dequantize(), wanted)
    assert torch.equal(packed[:, 16:32].dequantize(), decoded[:, 16:32])
    assert torch.equal(packed.permute(0, 2, 1).dequantize(), decoded.mT)
    assert torch.equal(packed[ids.view(3, 1)], decoded[ids.view(3, 1)])


def test_stacks_are_parameters_like_any_other() -> None:
    module = nn.Module()
    module.experts = as_parameter(stack(SCHEMES[0], transposed=True))
    wanted = module.experts.dequantize()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["experts"]
    copied = copy.deepcopy(module).bfloat16().experts
    assert copied.dtype == torch.bfloat16 and type(copied) is type(module.experts)
    for other in (loaded, copied.float(), module.experts.clone(), module.experts.detach()):
        assert other.shape == (E, K, N) and torch.equal(other.dequantize(), wanted)
    with torch.no_grad():
        copied.copy_(2 * wanted)
    assert torch.allclose(copied.float().dequantize(), 2 * wanted)


@each_scheme
def test_products(scheme: Scheme) -> None:
    packed, other = stack(scheme), stack(scheme, transposed=True)
    w, x, rows = packed.dequantize(), torch.randn(E, 3, K), torch.randn(7, K)
    for product, wanted in [
        (torch.bmm(x, packed.mT), x @ w.mT),
        (torch.bmm(x, other), x @ w.mT),
        (packed @ x.mT, w @ x.mT),
        (rows @ packed.transpose(1, 2), rows @ w.mT),
        (torch.matmul(x[:1], other), x[:1] @ w.mT),
        (F.linear(rows, packed[1]), rows @ w[1].t()),
        (rows @ other[1], rows @ w[1].t()),
    ]:
        close(product, wanted, scheme)
    ids = torch.tensor([3, 1, 1, 0, -1, 1, 0])
    wanted = torch.stack([w[i] @ row for i, row in zip(ids, rows, strict=True)])
    close(torch.bmm(packed[ids], rows.unsqueeze(-1)).squeeze(-1), wanted, scheme)
    close(torch.bmm(rows.unsqueeze(1), other[ids.int()]).squeeze(1), wanted, scheme)
    two = torch.randn(7, 2, K)
    close(torch.bmm(two, packed[ids].mT), torch.bmm(two, w[ids].mT), scheme)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("equation", ["eck,enk->ecn", "tk,enk->ten", "enk,tk->ent", "bsk,enk->bsen", "btek,enk->tben"])
def test_einsum(equation: str, turned: bool) -> None:
    packed, sizes = stack(SCHEMES[2], transposed=turned), {"e": E, "c": 3, "k": K, "t": 5, "b": 2, "s": 3}
    equation = equation.replace("enk", "ekn") if turned else equation
    letters = equation.split("->")[0].split(",")
    weight, decoded = packed, packed.dequantize()
    x = torch.randn([sizes[c] for c in next(f for f in letters if "n" not in f)])
    pairs = [(x, w) if "n" in letters[1] else (w, x) for w in (weight, decoded)]
    close(torch.einsum(equation, *pairs[0]), torch.einsum(equation, *pairs[1]), SCHEMES[2])
    for other in ("ek,enk->ekn", "tn,enk->tk", "tk,enk->tn"):
        with pytest.raises(UnsupportedOnTensorError, match="is no product"):
            torch.einsum(other, x, packed)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(scheme: Scheme, dtype: torch.dtype) -> None:
    """Many rows and one, experts without rows, and rows of no expert."""
    packed, spare = stack(scheme), 2
    w = packed.dequantize()
    for ends in ([40, 40, 41, 60], [0, 0, 0, 1], [0, 3, 3, 3]):
        x = torch.randn(ends[-1] + spare, K).to(dtype)
        offs = torch.tensor(ends, dtype=torch.int32)
        y = torch._grouped_mm(x, packed.transpose(-2, -1), offs=offs)
        parts = [x[a:b].float() @ w[i].t() for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
        assert y.dtype == dtype and not y[ends[-1] :].any()
        error = (y[: ends[-1]].float() - torch.cat(parts)).norm() / torch.cat(parts).norm()
        assert error <= (6e-3 if dtype == torch.bfloat16 else 1e-5) + (2e-2 if scheme.activations else 0)


def test_products_under_autocast() -> None:
    packed, x, ids = stack(SCHEMES[0]), torch.randn(E, 3, K), torch.tensor([2, 2, 0, 1])
    for weight, decoded in ((packed.mT, packed.dequantize().mT), (packed[ids].mT, packed.dequantize()[ids].mT)):
        with torch.autocast("cpu", torch.bfloat16):
            product, wanted = torch.bmm(x, weight), torch.bmm(x, decoded)
        assert product.dtype == wanted.dtype == torch.bfloat16
        assert (product.float() - wanted.float()).norm() <= 1e-2 * wanted.float().norm()


def test_gradients_of_inputs() -> None:
    packed, x = stack(SCHEMES[0]), torch.randn(6, K, requires_grad=True)
    w, offs, ids = packed.dequantize(), torch.tensor([1, 1, 4, 6]), torch.tensor([3, 1, 1, 0, 2, 1])
    with torch.enable_grad():
        for y, own in (
            (grouped_linear(x, packed.planes, offs, True, packed.key, E, N), torch.tensor([0, 2, 2, 2, 3, 3])),
            (grouped_linear(x, packed.planes, ids, False, packed.key, E, N), ids),
        ):
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            want = torch.bmm(2 * y.detach().unsqueeze(1), w[own]).squeeze(1)
            assert (grad - want).norm() <= 1e-5 * want.norm()


def test_only_experts_with_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = stack(SCHEMES[0])
    kernels = qcompile.kernels.for_key(packed.key, "cpu")
    counted: list[int] = []
    monkeypatch.setattr(kernels, "_grouped", lambda *arguments: counted.append(caller().grouped(*arguments)))
    for ids in ([2], [1, 1, 1], [0, 3, 0, 3], [0, 1, 2, 3]):
        grouped_linear(torch.randn(len(ids), K), packed.planes, torch.tensor(ids), False, packed.key, E, N)
    grouped_linear(torch.randn(5, K), packed.planes, torch.tensor([0, 5, 5, 5]), True, packed.key, E, N)
    assert counted == [1, 1, 2, 4, 1]


PROTECTED = """
import ctypes, mmap, sys
import torch
from qcompile.formats import Scheme, get
from qcompile.tensor import quantize

experts, used, n, k = 4, 2, 1024, 1024
packed = quantize(torch.randn(experts, n, k), Scheme(get("int8")))
planes = []
for plane in packed.planes:
    each = plane.nbytes // experts
    memory = mmap.mmap(-1, experts * max(each, mmap.PAGESIZE))
    held = torch.frombuffer(memory, dtype=plane.dtype, count=plane.numel()).view(plane.shape)
    held.copy_(plane)
    planes.append(held)
    for expert in range(experts):  # scales of an expert may be smaller than a page: then none is closed
        if (expert != used or "all" in sys.argv) and each % mmap.PAGESIZE == 0:
            start = held.data_ptr() + expert * each
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(each), 0) == 0
x = torch.randn(3, k)
y = torch.ops.qcompile.grouped_linear(x, planes, torch.full((3,), used), False, packed.key, experts, n)
want = x @ packed[used].dequantize().t()
assert (y - want).norm() < 1e-5 * want.norm()
print("read")
"""


def test_memory_of_other_experts_is_not_touched() -> None:
    """Every page of theirs is closed: a read would end the process, as the second one shows."""
    ran = [subprocess.run([sys.executable, "-c", PROTECTED, *a], capture_output=True, text=True) for a in ([], ["all"])]
    assert ran[0].returncode == 0 and ran[0].stdout == "read\n", ran[0].stderr
    assert ran[1].returncode < 0 and not ran[1].stdout


def test_mistakes_are_told() -> None:
    packed, x = stack(SCHEMES[0]), torch.randn(3, K)

    def call(groups: torch.Tensor, ends: bool = False, x: torch.Tensor = x) -> None:
        grouped_linear(x, packed.planes, groups, ends, packed.key, E, N)

    with pytest.raises(IndexError, match="number of an expert is out of range .4 experts, 3 rows"):
        call(torch.tensor([0, 4, 1]))
    for ends in ([0, 2, 1, 3], [1, 2, 3, 4]):
        with pytest.raises(IndexError, match="must rise"):
            call(torch.tensor(ends), ends=True)
    with pytest.raises(LayoutError, match="numbers of experts must be int32 or int64 .3."):
        call(torch.zeros(3))
    with pytest.raises(LayoutError, match="ends of experts must be int32 or int64 .4."):
        call(torch.zeros(3, dtype=torch.int32), ends=True)
    with pytest.raises(LayoutError, match=r"x must be \[T, K\]"):
        call(torch.zeros(3, dtype=torch.int32), x=x[0])
    with pytest.raises(RuntimeError, match="input has 97 features"):
        torch.bmm(torch.randn(E, 1, K + 1), packed.mT)
    with pytest.raises(UnsupportedOnTensorError, match="only products are"):
        packed[torch.tensor([1])].sum()
    with pytest.raises(UnsupportedOnTensorError, match="moves the experts"):
        packed.transpose(0, 1)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        packed[4]
    with pytest.raises(FormatError, match="keeps factors of the columns of one matrix"):
        quantize(torch.randn(2, 16, 64), Scheme(get("int8_scaled")))
    broken = torch.randn(2, 16, 64)
    broken[1, 3, 5] = torch.nan
    with pytest.raises(WeightError, match=r"mlp.experts\[1\]: the weight has NaN"):
        quantize(broken, SCHEMES[0], layer="mlp.experts")


def test_a_format_for_single_matrices_leaves_experts_with_a_reason() -> None:
    site = Site("mlp.experts", "matmul", weight="w", shape=(2, 16, 64), parameter="w")
    (decision,) = Policy.parse("int8_scaled").decide([site], Target("cpu", "avx2"))
    assert decision.scheme is None and "keeps factors of the columns of one matrix" in (decision.reason or "")


def test_rows_by_expert() -> None:
    """What launches on GPUs go by."""
    order, bounds = rows_by_expert(torch.tensor([3, 1, -3, 0]), False, 4, 4)
    assert order is not None and order.tolist() == [3, 1, 2, 0] and bounds == [0, 1, 3, 3, 4]
    assert rows_by_expert(torch.tensor([0, 2, 2, 3]), True, 4, 5) == (None, [0, 0, 2, 2, 3])
    for groups, ends in (([4, 0], False), ([-5, 0], False), ([2, 1, 2, 2], True), ([0, 0, 0, 3], True)):
        with pytest.raises(IndexError):
            rows_by_expert(torch.tensor(groups), ends, 4, 2)
