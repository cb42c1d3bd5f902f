"""Quantization-aware training: what is trained is what is packed, whatever trains it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backend import Stack, decoded, packed_names, stack
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile import qat
from qcompile.errors import OptionError, PolicyError, WeightError
from qcompile.formats import REGISTRY, FormatSpec, Plane, Scheme, find, register_scheme, symbols
from qcompile.formats.reference import decode, fake, quantize
from qcompile.recorder import recorder_of
from qcompile.tensor import QuantizedTensor

SPECS = sorted(REGISTRY.values(), key=lambda s: s.name)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, policy: Any = "int4_g32", **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", options={"qat": True, "policy": policy, **options})


def packed(model: nn.Module, *inputs: Any, policy: Any = "int4_g32") -> nn.Module:
    """A copy of ``model``, packed."""
    made = copy.deepcopy(getattr(model, "_orig_mod", model))
    qcompile.quantize_(made, *inputs, policy=policy)
    return made


def planes(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {n: p.planes for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


# The arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_is_decode_of_quantize_bit_for_bit(spec: FormatSpec, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, k in ((40, 512), (5, 300)):
        weight = torch.randn(n, k).to(dtype)
        weight[3] = 0
        made, kept = fake(spec, weight)
        assert made.dtype == dtype and torch.equal(made, decode(spec, quantize(spec, weight), n, k, dtype))
        assert kept.shape == weight.shape and kept.dtype == torch.bool and kept[3].all() and kept.float().mean() > 0.6


def test_fake_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.formats.reference.CHUNK_ELEMENTS", 16 * 256)
    weight = torch.randn(150, 256)
    for name in ("int4_g128", "fp8_e4m3_b128", "fp8_e4m3_tensor", "nvfp4", "Q4_K"):
        spec = find(name)
        assert spec is not None and torch.equal(fake(spec, weight)[0], decode(spec, quantize(spec, weight), 150, 256))


def test_what_the_format_cuts_off_has_no_gradient() -> None:
    scale, q = symbols("scale q")
    spec = FormatSpec("test_qat_u2", (Plane("scale", "f32", 8), Plane("q", "u2")), value=scale * (q - 2), shrinks=(),
                      quantizer=_ones)  # fmt: skip
    weight = torch.tensor([[-3.0, -2.6, -2.5, -2.4, 0.0, 1.4, 1.5, 1.6]])  # values −2 … 1, half a step further
    made, kept = fake(spec, weight)
    assert made.tolist() == [[-2.0, -2.0, -2.0, -2.0, 0.0, 1.0, 1.0, 1.0]]
    assert kept.tolist() == [[False, False, True, True, True, True, True, False]]
    weight.requires_grad_()
    qat.fake_quantize(weight, register_scheme(Scheme(spec)), False)[0].backward(torch.arange(1.0, 9.0)[None])
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]]


def _ones(spec: FormatSpec, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = (weight + 2).round().clamp(0, 3).to(torch.uint8)
    return {"scale": torch.ones(len(weight), weight.shape[1] // 8), "q": codes}


@pytest.mark.parametrize("name", ["int4_g32", "nf4", "Q4_K", "fp8_e4m3_b128"])
def test_groups_are_cut_off_at_ends_of_their_own(name: str) -> None:
    """Against the decoded values themselves: a weight has no gradient if it is further than half a step from the last one."""
    spec = find(name)
    assert spec is not None
    weight = torch.randn(16, 256)
    made, kept = fake(spec, weight)
    gap = (weight - made).abs()
    assert not kept.all() or gap.max() < 0.5
    assert (gap[~kept] > 0).all() and (gap[~kept].mean() > gap[kept].mean() if (~kept).any() else True)


def test_the_operators_stand_torchs_own_checks() -> None:
    key = register_scheme(Scheme(find("int4_g32")))  # type: ignore[arg-type]
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    for transposed in (False, True):
        torch.library.opcheck(qat.fake_quantize, (weight.clone().requires_grad_(), key, transposed),
                              test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))  # fmt: skip
    torch.library.opcheck(qat.fake_activations, (x.clone().requires_grad_(), "int8"),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    torch.library.opcheck(qat.trained_linear, (x, weight, torch.randn(32), key, False), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(qat.trained_rows, (weight, torch.arange(3), key), test_utils=("test_schema", "test_faketensor"))


# Whole models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["int4", "int8", "nf4", "Q4_K", "nvfp4", "fp8", "mixed", "int3_g64"])
def test_training_computes_what_the_packed_model_will(policy: str) -> None:
    """Bit for bit what plain Inductor computes with the packed weights decoded; in evaluation what the packed model does."""
    model, x = stack(0, width=256).train(), torch.randn(4, 256)
    run = compiled(model, policy)
    trained = run(x)
    made = packed(model, x, policy=policy)
    with torch.no_grad():
        assert torch.equal(trained, torch.compile(decoded(made))(x))
        evaluated = run(x)
        assert torch.equal(evaluated, torch.compile(made, backend="qcompile", options={"policy": policy})(x))
    assert packed_names(model) == [] and model.state_dict().keys() == stack(0, width=256).state_dict().keys()
    assert (trained - evaluated).norm() <= 1e-5 * evaluated.norm()
