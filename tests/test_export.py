"""Quantized models without the compiler: packages of AOTInductor, Dynamo's aot_compile, modes of torch.compile."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import trained_decoder
from torch import nn
from torch.torch_version import TorchVersion

import qcompile
from qcompile import formats, inductor
from qcompile.deployment import check, unwrapping
from qcompile.errors import OptionError, PackageError
from qcompile.formats import Scheme
from qcompile.tensor import QuantizedTensor, as_parameter, quantize

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

LOADED_ALONE = """
import sys, torch
found = torch._inductor.aoti_load_package(sys.argv[1])
results = [found(*inputs) for inputs in torch.load(sys.argv[2])]
assert not [name for name in sys.modules if name.startswith(("qcompile", "transformers"))]
torch.save(results, sys.argv[3])
"""


def alone(path: Path, *calls: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What a package computes in a process that knows nothing of qcompile; ``import torch`` would look for its log names."""
    inputs, results = path.with_suffix(".inputs"), path.with_suffix(".results")
    torch.save(calls, inputs)
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", LOADED_ALONE, path, inputs, results], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[torch.Tensor] = torch.load(results)
    return found


class Logits(nn.Module):
    """The decoder, as a function of token ids ``[batch, tokens]`` alone."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(ids, use_cache=False).logits


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.12", reason="this torch exports float decoders of any length neither")
def test_a_decoder_runs_from_its_package_without_qcompile(tmp_path: Path) -> None:
    decoder, tokenizer, text = trained_decoder()
    model, ids = Logits(decoder), torch.tensor([tokenizer.encode(text)[:48]])
    tokens = torch.export.Dim("tokens", min=2, max=128)
    policy = {"embed_tokens": "int8", "lm_head": "int8", "*": "int4"}
    path = qcompile.package(model, (ids[:, :16],), tmp_path / "decoder.pt2", policy=policy, dynamic_shapes=({1: tokens},))
    assert path == tmp_path / "decoder.pt2" and isinstance(decoder.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert isinstance(decoder.model.embed_tokens.weight, QuantizedTensor)
    for got, inputs in zip(alone(path, (ids[:, :16],), (ids,)), (ids[:, :16], ids), strict=True):
        torch.testing.assert_close(got, model(inputs), rtol=1e-4, atol=1e-4)


class Zoo(nn.Module):
    """Packed weights in every way that a graph uses them, in several schemes of which some have factors or an order."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = packed((50, 128), "int8", dtype)
        self.scaled_table = packed((50, 128), "int4_g32_scaled", dtype)
        names = ("int4_g32", "int8+int8", "int4_g32_scaled", "nf4", next(s.name for s in formats.BUILT_IN if s.permuted))
        self.layers = nn.ParameterList(packed((128, 128), name, dtype) for name in names)
        self.conv1d = as_parameter(quantize(torch.randn(128, 48).to(dtype) / 12, Scheme(formats.get("int8")), transposed=True))
        self.bias = nn.Parameter(torch.randn(128), requires_grad=False)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = x + F.embedding(ids, self.table) + F.embedding(ids, self.scaled_table)
        for layer in self.layers:
            x = x + F.linear(F.silu(x), layer, self.bias)
        return torch.cat([x[:, -1] @ self.conv1d, F.linear(x[:, 1:], self.layers[0])[:, -1]], -1)


def packed(shape: tuple[int, int], name: str, dtype: torch.dtype) -> nn.Parameter:
    spec, _, activations = name.partition("+")
    return as_parameter(quantize(torch.randn(shape).to(dtype) / 12, Scheme(formats.get(spec), activations or None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_use_of_a_packed_weight_goes_into_a_package(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids, x = Zoo(dtype), torch.tensor([[3, 49, 0], [1, 1, 7]]), torch.randn(2, 3, 128).to(dtype)
    inductor.install()
    program = torch.export.export(model, (ids, x))
    path = tmp_path / "zoo.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))  # PyTorch's own way, which takes it too
    (got,), want = alone(path, (ids, x)), model(ids, x)
    assert got.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.float(), want.float(), rtol=bound, atol=bound * float(want.float().abs().max()))
    with pytest.raises(RuntimeError):
        torch._inductor.aoti_load_package(str(path))(ids + 50, x)


def checked(model: nn.Module, *inputs: torch.Tensor) -> None:
    check(unwrapping(torch.export.export(model, inputs)))


def test_what_has_no_kernel_in_cpp_is_refused_by_name(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(64, 64)).double()
    layer[0].weight = packed((64, 64), "int8", torch.float64)
    with pytest.raises(PackageError, match=r"x and bias of 0, in int8, must be float32.*found torch.float64"):
        checked(layer, torch.randn(2, 64).double())
    with pytest.raises(OptionError, match=r"ends in .pt2, found '.*a.so'; name it a.pt2"):
        qcompile.package(layer, (torch.randn(2, 64),), tmp_path / "a.so")

    class Attention(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            from qcompile import ops

            key = formats.register_scheme(Scheme(formats.get("int8")))
            return ops.sdpa(q, q, q, None, False, 1.0, 0.0, key, key)

    with pytest.raises(PackageError, match=r"computes qcompile.sdpa, which has no kernel in C\+\+; leave out kv_cache"):
        checked(Attention(), torch.randn(1, 2, 4, 16))
    with pytest.raises(PackageError, match=r"decodes rows of .* whose columns are in another order"):
        table = nn.Embedding(50, 64)
        table.weight = packed((50, 64), next(s.name for s in formats.BUILT_IN if s.permuted), torch.float32)
        checked(table, torch.tensor([1]))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)))


@pytest.fixture
def aot_compile_enabled() -> Iterator[None]:
    with torch._dynamo.config.patch(enable_aot_compile=True):
        yield


@pytest.mark.usefixtures("aot_compile_enabled")
@pytest.mark.parametrize("backend", ["qcompile", "inductor"])
def test_dynamos_aot_compile_takes_packed_models(backend: str, tmp_path: Path) -> None:
    if backend != "inductor" and TorchVersion(torch.__version__) < "2.12":
        pytest.skip("this torch saves functions of Inductor's backend only")
    model, x = Small(), torch.randn(3, 64)
    qcompile.quantize_(model, x, policy="int4_g32")
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend=backend).forward.aot_compile(((x,), {}))
    torch.testing.assert_close(compiled(model, x), want)
    compiled.save_compiled_function(str(tmp_path / "compiled"))
    with (tmp_path / "compiled").open("rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    other = Small()
    other.up.weight.data.neg_()
    qcompile.quantize_(other, x, policy="int4_g32")
    torch.testing.assert_close(loaded(other, x), other(x))  # weights are inputs, not constants of the code


@pytest.mark.usefixtures("aot_compile_enabled")
def test_dynamos_aot_compile_of_a_float_model_says_what_to_do() -> None:
    model = torch.compile(Small(), fullgraph=True, backend="qcompile", options={"policy": "int8"})
    with pytest.raises(PackageError, match="pack them before, by qcompile.quantize_"):
        model.forward.aot_compile(((torch.randn(3, 64),), {}))


def test_reduce_overhead_replays_on_new_inputs() -> None:
    model, inputs = Small(), [torch.randn(3, 64) for _ in range(4)]
    compiled = torch.compile(model, backend="qcompile", mode="reduce-overhead")
    results = [compiled(x).clone() for x in inputs]
    assert isinstance(model.up.weight, QuantizedTensor)
    for x, got in zip(inputs, results, strict=True):
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    example, names = text.split("```python\n")[1].split("```")[0], {}
    monkeypatch.chdir(tmp_path)
    exec(example, names)
    assert names["y"].shape == (9, 64) and isinstance(names["model"][0].weight, QuantizedTensor)
    x = torch.randn(9, 256)
    torch.testing.assert_close(names["loaded"](x), names["model"](x), rtol=1e-4, atol=1e-4)
