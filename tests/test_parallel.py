"""Models divided among processes: the same logits as one process has, and no more bytes in each than its share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_worker import ADAPTED, IDS, POLICY, Adapted, decoder, linear_bytes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from workers import layers, staged

import qcompile
from qcompile import formats
from qcompile.dtensor import packed_in
from qcompile.errors import ShardError
from qcompile.formats import Scheme
from qcompile.sharding import COLUMN, ROW, shard, step
from qcompile.tensor import quantize

WORLDS = (2, 4)
each_world = pytest.mark.parametrize("world", WORLDS)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process: logits and bytes."""
    with torch.no_grad():
        model = decoder()
        qcompile.quantize_(model, IDS, policy=POLICY)
        return {"logits": model(IDS).logits, "bytes": linear_bytes(model)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By the number of processes, what each of them found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("parallel_worker.py")), str(folder)]
    running = []
    for rank in range(max(WORLDS)):
        with (folder / f"{rank}.err").open("w") as file:  # a pipe that is full would stop its process, and so all
            running.append(subprocess.Popen([*program, str(rank)], stderr=file, env=environment))
    codes = [process.wait(timeout=500) for process in running]
    assert not any(codes), "\n".join((folder / f"{rank}.err").read_text()[-1500:] for rank in range(len(running)))
    return {world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)] for world in WORLDS}


@each_world
@pytest.mark.parametrize("case", ["divided_then_packed", "packed_then_divided", "divided_by_transformers"])
def test_logits_are_those_of_one_process(
    results: dict[int, list[dict[str, Any]]], alone: dict[str, Any], world: int, case: str
) -> None:
    for rank in results[world]:
        logits = {name: value for name, value in rank[case].items() if isinstance(value, torch.Tensor)}
        assert len(logits) == 2 if world == 2 else set(logits) == {"eager"}
        for name, got in logits.items():
            error = float((got - alone["logits"]).norm() / alone["logits"].norm())
            assert error < 1e-4, (name, error)


@each_world
@pytest.mark.parametrize("case", ["divided_then_packed", "packed_then_divided", "divided_by_transformers"])
def test_each_process_holds_its_share(
    results: dict[int, list[dict[str, Any]]], alone: dict[str, Any], world: int, case: str
) -> None:
    for rank in results[world]:
        assert alone["bytes"] / world <= rank[case]["bytes"] <= 1.05 * alone["bytes"] / world


@each_world
def test_roles_are_seen_through_what_divides(results: dict[int, list[dict[str, Any]]], world: int) -> None:
    formats_of = results[world][0]["divided_then_packed"]["formats"]
    assert formats_of["lm_head"] == "int8" and formats_of["model.layers.0.mlp.gate_proj"] == "nf4"
    assert formats_of["model.layers.0.mlp.up_proj"] == formats_of["model.layers.0.self_attn.o_proj"] == "int4_g32"


@each_world
def test_fsdp_gathers_packed_rows(results: dict[int, list[dict[str, Any]]], world: int) -> None:
    one = Adapted()
    want = one(ADAPTED)
    want.square().sum().backward()
    whole = one.up.weight.packed_nbytes + one.down.weight.packed_nbytes
    for found in (rank["fully_sharded"] for rank in results[world]):
        torch.testing.assert_close(found["output"], want.detach())
        torch.testing.assert_close(found["gradient"], one.adapter.weight.grad, rtol=1e-4, atol=1e-4)
        assert whole / world <= found["bytes"] <= 1.05 * whole / world
        assert f"of {24 * world} rows cannot be divided among {world} processes" in found["refused"]


@each_world
def test_packed_parts_are_saved_and_loaded_into_any_number(
    results: dict[int, list[dict[str, Any]]], folder: Path, world: int
) -> None:
    with torch.no_grad():
        want = Adapted()(ADAPTED)
        for rank in results[world]:
            torch.testing.assert_close(rank["fully_sharded"]["loaded"], want)
        one = Adapted(seed=2)
        assert not torch.allclose(one(ADAPTED), want)
        state = one.state_dict()
        dcp.load(state, checkpoint_id=folder / f"saved{world}", no_dist=True)
        one.load_state_dict(state)
        torch.testing.assert_close(one(ADAPTED), want)


@each_world
def test_what_cannot_be_divided_says_why(results: dict[int, list[dict[str, Any]]], world: int) -> None:
    found = results[world][world - 1]["refused"]
    rows = f"ShardError: 0.weight: the 96×128 weight in int4_g64 has 96 = {world} × {96 / world:g} rows"
    assert found["rows"] == "was divided" if world == 2 else found["rows"].startswith(rows)
    assert "no layer of the model has a known role" in found["no role"]
    assert ("is divided already" if world == 2 else f"128 = 4 × 32 columns; each of {world} devices must get a multiple of 64"
            ) in found["columns"]  # fmt: skip
    assert f"{64 * world} = {world} × 64 columns" in found["parts"] and "multiple of 128" in found["parts"]
    assert f"1 heads of keys and values cannot be divided among {world} devices" in found["heads"]


@pytest.mark.parametrize("spec", formats.REGISTRY.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_planes_are_the_weight(spec: formats.FormatSpec, transposed: bool) -> None:
    n, k = 3 * step(spec, COLUMN), 3 * (step(spec, ROW) if not spec.permuted else 128)
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    weight = quantize(matrix.t() if transposed else matrix, Scheme(spec), transposed=transposed)
    for split, dim in ((COLUMN, int(transposed)), (ROW, int(not transposed))):
        if split == ROW and spec.permuted:
            with pytest.raises(ShardError, match="stored in another order"):
                shard(weight, split, 0, 3)
            continue
        parts = [shard(weight, split, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat([p.dequantize() for p in parts], dim), weight.dequantize())
        owned = {p.untyped_storage().data_ptr() for part in parts for p in part.planes}
        assert not owned & {p.untyped_storage().data_ptr() for p in weight.planes}, "the whole weight can go"
        with pytest.raises(ShardError, match="2 devices must get a multiple of"):
            shard(weight, split, 0, 2)


class Broken(torch.nn.Module):
    """Two graphs, and norms that require grad, as those of any model do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.up(x))
        torch._dynamo.graph_break()
        return self.down(hidden)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_packed_part_is_no_sign_of_training(mesh: DeviceMesh) -> None:
    model = parallelize_module(Broken(), mesh, {"up": ColwiseParallel(), "down": ColwiseParallel()})
    torch.compile(model, backend="qcompile", options={"policy": "int8", "strict": True})(torch.randn(3, 64))
    assert all(packed_in(layer.weight) is not None for layer in (model.up, model.down))


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = torch.nn.Parameter(torch.randn(4, 32, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.stack)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_divided_stack_of_experts_stays_in_floating_point_and_says_why(mesh: DeviceMesh) -> None:
    model, x = Experts(), torch.randn(4, 3, 32)
    assert qcompile.explain(model, x, policy="int8").plan.records[0].decision.scheme is not None  # whole, it is packed
    model.stack = torch.nn.Parameter(distribute_tensor(model.stack.detach(), mesh, [Shard(0)]))
    report = qcompile.explain(model, distribute_tensor(x, mesh, [Shard(0)]), policy="int8")
    (record,) = report.plan.records
    assert record.decision.scheme is None and "divided among devices" in (record.decision.reason or "")


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    """Each process packs the layers of its stage; micro-batches give what the packed model gives in one process."""
    torch.multiprocessing.spawn(staged, (str(tmp_path),), nprocs=2)
    (first, _), (second, found) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (first, second) == (1, 2)
    model, x = torch.nn.Sequential(*layers()), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    qcompile.quantize_(model, x, policy="int4_g32")
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)
