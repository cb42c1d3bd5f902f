"""QuantizedTensor as a parameter: eager arithmetic, state_dict, save and load, deepcopy, .to, slicing, gradients."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile import formats
from qcompile.errors import LayoutError, UnsupportedOnTensorError
from qcompile.formats import Scheme
from qcompile.tensor import QuantizedTensor, as_parameter, quantize, tensor_class

SCHEMES = [Scheme(spec) for spec in formats.REGISTRY.values()]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
INT4 = Scheme(formats.get("int4_g32"))


def packed_linear(scheme: Scheme = INT4, k: int = 100, n: int = 37, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(k + n)
    linear = nn.Linear(k, n).to(dtype)
    linear.weight = as_parameter(quantize(linear.weight, scheme))
    return linear


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[expected.dtype]
    assert (actual.double() - expected.double()).norm() <= bound * expected.double().norm()


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (1,), (3, 5), (0,), (2, 1, 9)])
def test_eager_linear_is_linear_with_the_decoded_weight(
    scheme: Scheme, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    linear = packed_linear(scheme, dtype=dtype)
    x = torch.randn(*leading, 100).to(dtype)
    with torch.no_grad():
        exact = F.linear(x.double(), linear.weight.dequantize().double(), linear.bias.double()).to(dtype)
        close(linear(x), exact)
        close(F.linear(x, linear.weight), F.linear(x.double(), linear.weight.dequantize().double()).to(dtype))
    with torch.inference_mode():
        close(linear(x), exact)


def test_other_spellings_of_a_product() -> None:
    weight, x, bias = packed_linear().weight, torch.randn(6, 100), torch.randn(37)
    exact = x @ weight.dequantize().t()
    with torch.no_grad():
        spellings = [x @ weight.t(), torch.matmul(x, weight.T), torch.mm(x, weight.transpose(0, 1)), x @ weight.permute(1, 0)]
        spellings += [(weight @ x.t()).t(), x.view(2, 3, 100).matmul(weight.t()).view(6, 37)]
        for product in spellings:
            close(product, exact)
        close(torch.addmm(bias, x, weight.t()), exact + bias)
        close(torch.addmm(bias, x, weight.t(), beta=0.5, alpha=2), 2 * exact + 0.5 * bias)
        conv1d = quantize(weight.dequantize().t().contiguous(), INT4, transposed=True)
        assert conv1d.shape == (100, 37)
        close(torch.addmm(bias, x, conv1d), F.linear(x, conv1d.dequantize().t(), bias))
        close(x @ conv1d, x @ conv1d.dequantize())


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="99 features.*takes 100"):
        packed_linear()(torch.randn(2, 99))


def test_it_is_a_parameter_of_its_module() -> None:
    linear = packed_linear()
    assert isinstance(linear.weight, nn.Parameter) and isinstance(linear.weight, QuantizedTensor)
    assert [n for n, _ in linear.named_parameters()] == ["weight", "bias"]
    assert linear.weight.packed_nbytes == INT4.format.nbytes(37, 100)
    assert not linear.weight.requires_grad
    assert "int4_g32" in repr(linear.weight)


@each_scheme
def test_save_and_load_with_weights_only(scheme: Scheme) -> None:
    linear, x = packed_linear(scheme), torch.randn(2, 100)
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = packed_linear(scheme)
    with torch.no_grad():
        fresh.weight.copy_(torch.randn(37, 100))
        assert not torch.equal(fresh(x), linear(x))
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), linear(x))
        assign = nn.Linear(100, 37)
        assign.load_state_dict(state, assign=True)
        assert isinstance(assign.weight, QuantizedTensor) and torch.equal(assign(x), linear(x))
    assert torch.equal(pickle.loads(pickle.dumps(linear.weight)), linear.weight)


def test_a_saved_file_loads_in_a_fresh_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    linear = packed_linear()
    torch.save(linear.state_dict(), tmp_path / "w.pt")
    program = (
        "import sys, torch, qcompile.tensor; s = torch.load(sys.argv[1], weights_only=True);"
        "print(type(s['weight']).__name__, float(s['weight'].dequantize().double().sum()))"
    )
    out = subprocess.run([sys.executable, "-c", program, tmp_path / "w.pt"], capture_output=True, text=True, check=True)
    name, total = out.stdout.split()
    assert name == "Quantized_int4_g32"
    assert float(total) == pytest.approx(float(linear.weight.dequantize().double().sum()), rel=1e-9)


def test_damaged_planes_are_refused_on_load() -> None:
    weight = packed_linear().weight
    function, arguments = weight.__reduce_ex__(2)
    broken = [arguments[2][0][:1], *arguments[2][1:]]
    with pytest.raises(LayoutError, match="plane 'scale'"):
        function(*arguments[:2], broken, *arguments[3:])


def test_loading_floats_requantizes() -> None:
    linear, source = packed_linear(), nn.Linear(100, 37)
    linear.load_state_dict(source.state_dict())
    assert isinstance(linear.weight, QuantizedTensor)
    assert torch.equal(linear.weight, quantize(source.weight, INT4))
    with torch.no_grad():
        target = torch.empty(37, 100)
        target.copy_(linear.weight)
        assert torch.equal(target, linear.weight.dequantize())
    with pytest.raises(RuntimeError, match="copy_"):
        linear.weight.copy_(torch.zeros(3, 3))


def test_deepcopy_is_independent_and_keeps_ties() -> None:
    model = nn.ModuleList([packed_linear(), packed_linear()])
    model[1].weight = model[0].weight
    copied = copy.deepcopy(model)
    assert copied[0].weight is copied[1].weight and isinstance(copied[0].weight, nn.Parameter)
    with torch.no_grad():
        before = model[0].weight.dequantize()
        copied[0].weight.copy_(torch.zeros(37, 100))
        assert torch.equal(model[0].weight.dequantize(), before)


def test_to_dtype_aliases_planes_and_to_device_moves_them() -> None:
    linear, x = packed_linear(), torch.randn(2, 100)
    planes = [p.data_ptr() for p in linear.weight.planes]
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16 == linear.weight.dequantize().dtype
    assert [p.data_ptr() for p in linear.weight.planes] == planes
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    meta = linear.to("meta")
    assert meta.weight.device.type == "meta" and all(p.device.type == "meta" for p in meta.weight.planes)
    assert linear.weight.half().dtype == torch.float16


def test_autocast_is_followed() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed_linear()(torch.randn(2, 100)).dtype == torch.bfloat16


def test_rows_and_whole_groups_can_be_sliced() -> None:
    weight = packed_linear(k=256, n=70).weight
    floats = weight.dequantize()
    for index in (slice(3, 40), slice(0, 70, 3), slice(16, 32), slice(60, 99)):
        assert torch.equal(weight[index].dequantize(), floats[index])
    assert torch.equal(weight[:, 32:96].dequantize(), floats[:, 32:96])
    assert torch.equal(weight.t()[32:96, 5:9].dequantize(), floats.t()[32:96, 5:9])
    assert torch.equal(weight[7], floats[7])
    assert [w.shape[0] for w in weight.split(32)] == [32, 32, 6]
    index = torch.tensor([5, 69, 5])
    assert torch.equal(weight.index_select(0, index).dequantize(), floats[index])
    with pytest.raises(UnsupportedOnTensorError, match="cuts a group of 32"):
        weight[:, 16:96]


def test_slices_of_whole_tiles_are_views_and_no_other_slice_takes_values() -> None:
    weight = packed_linear(k=128, n=70).weight
    with torch.no_grad():
        for part in (slice(16, 48), slice(64, 70)):
            new = quantize(torch.randn(weight[part].shape), INT4)
            weight[part].copy_(new)
            assert torch.equal(weight[part], new) and torch.equal(weight.dequantize()[part], new.dequantize())
        for part in ((slice(3, 40),), (slice(None), slice(32, 96)), (slice(0, 70, 2),)):
            with pytest.raises(UnsupportedOnTensorError, match="would leave the weight as it is"):
                weight[part].detach().copy_(torch.zeros(weight[part].shape))
            weight[part].clone().copy_(torch.zeros(weight[part].shape))


@each_scheme
def test_embedding_gathers_rows(scheme: Scheme) -> None:
    table = packed_linear(scheme, k=64, n=50).weight
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(F.embedding(ids, table), F.embedding(ids, table.dequantize()))
    with pytest.raises(IndexError, match="50 rows"):
        F.embedding(torch.tensor([50]), table)


def test_unsupported_functions_say_what_to_do() -> None:
    with pytest.raises(UnsupportedOnTensorError, match="dequantize"):
        torch.sin(packed_linear().weight)


@pytest.mark.parametrize("name", ["int8", "int4_g32", "fp8_e4m3"])
def test_gradients_reach_the_input_and_the_bias(name: str) -> None:
    linear = packed_linear(Scheme(formats.get(name)))
    x = torch.randn(2, 4, 100, requires_grad=True)
    linear(x).square().sum().backward()
    reference = copy.deepcopy(linear)
    reference.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
    reference.bias.grad = None
    y = x.detach().clone().requires_grad_()
    reference(y).square().sum().backward()
    close(x.grad, y.grad)
    close(linear.bias.grad, reference.bias.grad)
    assert linear.weight.grad is None


def test_operators_pass_opcheck() -> None:
    from qcompile import ops

    weight = packed_linear().weight
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    x = torch.randn(3, 100, requires_grad=True)
    torch.library.opcheck(ops.linear, (x, weight.planes, torch.randn(37), weight.key, 37), test_utils=checks)
    torch.library.opcheck(ops.decode, (weight.planes, weight.key, 37, 100, torch.float32), test_utils=checks[:3])


def test_equal_and_shared_memory() -> None:
    linear = packed_linear()
    assert torch.equal(linear.weight, linear.weight.clone())
    assert not torch.equal(linear.weight, packed_linear(k=100, n=37, scheme=Scheme(formats.get("int4_g64"))).weight)
    linear.share_memory()
    assert linear.weight.is_shared() and all(p.is_shared() for p in linear.weight.planes)


def test_stable_hash_tells_apart_whatever_decides_a_graph() -> None:
    base = packed_linear(k=128, n=64).weight
    others = [
        base.t(),
        base.to(torch.bfloat16),
        base[:32],
        packed_linear(Scheme(formats.get("int4_g64")), 128, 64).weight,
    ]
    assert len({w._stable_hash_for_caching() for w in [base, *others]}) == 5
    assert base.clone()._stable_hash_for_caching() == base._stable_hash_for_caching()


def test_classes_are_found_by_name_on_demand() -> None:
    import qcompile.tensor as module

    assert module.Quantized_int8__act_int8__t is tensor_class(Scheme(formats.get("int8"), "int8"), transposed=True)
    with pytest.raises(AttributeError, match="Quantized_int9"):
        getattr(module, "Quantized_int9")  # noqa: B009


@pytest.mark.parametrize("kind", ["self", "cross", "separate", "single", "causal", "bool mask", "heads' masks", "padding",
                                  "weights", "every head's weights"])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_is_that_of_the_decoded_weights(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    size = {"kdim": 24, "vdim": 40} if kind == "separate" else {}
    attend = nn.MultiheadAttention(32, 4, bias=bias, **size).eval()
    packed = copy.deepcopy(attend)
    for name, p in list(attend.named_parameters()):
        if p.dim() == 2:
            module = packed.out_proj if name.startswith("out_proj") else packed
            made = quantize(p, Scheme(formats.get("int8")))
            module._parameters[name.rpartition(".")[2]] = as_parameter(made)
            p.data.copy_(made.dequantize())
    x, other = torch.randn(5, 3, 32), torch.randn(7, 3, 32)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    inputs, words = (x, x, x), {"need_weights": False}
    if kind == "cross":
        inputs = (x, other, other)
    elif kind == "separate":
        inputs = (x, torch.randn(7, 3, 24), torch.randn(7, 3, 40))
    elif kind == "single":
        inputs = (x[:, 0],) * 3
        inputs = (inputs[0],) * 3
    elif kind == "causal":
        words |= {"attn_mask": mask, "is_causal": True}
    elif kind == "bool mask":
        words |= {"attn_mask": mask}
    elif kind == "heads' masks":
        words |= {"attn_mask": torch.randn(12, 5, 5)}
    elif kind == "padding":
        words |= {"attn_mask": mask, "key_padding_mask": torch.arange(5) >= torch.tensor([[5], [4], [2]])}
    elif "weights" in kind:
        words = {"need_weights": True, "average_attn_weights": kind == "weights"}
    with torch.no_grad():
        for got, want in zip(packed(*inputs, **words), attend(*inputs, **words), strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
