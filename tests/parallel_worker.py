"""One of four processes that divide a model: `python parallel_worker.py FOLDER RANK` leaves its results in the folder, of the
first two with each other, and of all four.

Results are logits on one input, bytes of the linear weights that the process holds, and messages of errors, by name.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile
from qcompile.dtensor import packed_in
from qcompile.errors import QCompileError
from qcompile.recorder import recorder_of

POLICY = {"lm_head": "int8", "mlp.gate_proj": "nf4", "*": "int4_g32"}
IDS = torch.arange(24).view(2, 12) * 7


def decoder(**changes: Any) -> LlamaForCausalLM:
    """A decoder of eight heads, four of keys and values; the same in every process."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8,
             "num_key_value_heads": 4, "max_position_embeddings": 64, "use_cache": False, "tie_word_embeddings": False,
             }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def linear_bytes(model: nn.Module) -> int:
    """Of the weights of linear layers in this process; all are packed, or there is no sum."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(packed_in(m.weight).packed_nbytes for m in linears)  # type: ignore[union-attr]


def torchs_plan() -> dict[str, Any]:
    layer = {"self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel(), "self_attn.v_proj": ColwiseParallel(),
             "self_attn.o_proj": RowwiseParallel(), "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(),
             "mlp.down_proj": RowwiseParallel()}  # fmt: skip
    return {f"model.layers.*.{n}": s for n, s in layer.items()} | {"lm_head": ColwiseParallel(output_layouts=Replicate())}


def divided_then_packed(mesh: DeviceMesh) -> dict[str, Any]:
    model = decoder()
    parallelize_module(model, mesh, torchs_plan())
    found = packed(model, mesh)
    plan = recorder_of(model).plan
    return found | {"formats": {r.decision.site.name: r.decision.scheme.label for r in plan if r.decision.scheme}}


def packed_then_divided(mesh: DeviceMesh) -> dict[str, Any]:
    model = decoder()
    qcompile.quantize_(model, IDS, policy=POLICY)
    qcompile.parallelize_module(model, mesh)
    return packed(model, mesh)


def divided_by_transformers(mesh: DeviceMesh) -> dict[str, Any]:
    """What ``from_pretrained(tp_plan="auto")`` does to a model, which asks for accelerate before it does it."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = decoder()
    styles = {name: style for name, _ in model.named_modules() if (style := model.tp_plan.get(re.sub(r"\d+", "*", name)))}
    parameters = {f"{name}.weight": style for name, style in styles.items()}
    apply_tensor_parallelism(model, mesh, parameters | styles)
    return packed(model, mesh)


class Adapted(nn.Module):
    """Frozen packed layers beside one that trains."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.adapter = nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 128, bias=False)
        self.up.requires_grad_(False), self.down.requires_grad_(False)
        with torch.no_grad():
            qcompile.quantize_(self, ADAPTED, policy={"up": "int4_g32", "down": "nf4_dq", "adapter": "float"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x))) + self.adapter(x)


ADAPTED = torch.linspace(-1, 1, 4 * 128).view(4, 128)


@torch.enable_grad()
def fully_sharded(mesh: DeviceMesh) -> dict[str, Any]:
    """A step of FSDP2 over frozen packed weights, and their parts saved and loaded again."""
    folder = Path(sys.argv[1]) / f"saved{mesh.size()}"
    model, other = fully_shard(Adapted(), mesh=mesh), fully_shard(Adapted(seed=1), mesh=mesh)
    output = [model(ADAPTED) for _ in range(2)][-1]
    output.square().sum().backward()
    model.reshard()
    bytes_ = sum(packed_in(layer.weight).packed_nbytes for layer in (model.up, model.down))  # type: ignore[union-attr]
    dcp.save(model.state_dict(), checkpoint_id=folder, process_group=mesh.get_group())
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
    other.load_state_dict(state)
    small = nn.Sequential(nn.Linear(64, 24 * mesh.size()))
    qcompile.quantize_(small, torch.randn(2, 64), policy="int8")
    try:
        fully_shard(small.requires_grad_(False), mesh=mesh)(torch.randn(2, 64))
        refused = "was divided"
    except QCompileError as error:
        refused = f"{type(error).__name__}: {error}"
    return {"output": output.detach(), "gradient": model.adapter.weight.grad.full_tensor(), "bytes": bytes_,
            "loaded": other(ADAPTED).detach(), "refused": refused}  # fmt: skip


def packed(model: nn.Module, mesh: DeviceMesh) -> dict[str, Any]:
    """Results of a divided model that is packed by the backend on its first call, or, of more than two parts, packed and run
    eagerly: compiling takes each process many seconds."""
    if mesh.size() > 2:
        qcompile.quantize_(model, IDS, policy=POLICY)
        return {"eager": model(IDS).logits, "bytes": linear_bytes(model)}
    compiled = torch.compile(model, backend="qcompile", options={"policy": POLICY, "strict": True})
    return {"compiled": compiled(IDS).logits, "eager": model(IDS).logits, "bytes": linear_bytes(model)}


def refused(mesh: DeviceMesh) -> dict[str, Any]:
    """What each wrong division says."""
    world, found = mesh.size(), {}
    whole = nn.Sequential(nn.Linear(128, 96))
    qcompile.quantize_(whole, torch.randn(2, 128), policy="int4_g64")
    for name, styles in (("rows", ColwiseParallel()), ("no role", None), ("columns", {"0": RowwiseParallel()})):
        try:
            plan = styles if styles is None or isinstance(styles, dict) else {"0": styles}
            qcompile.parallelize_module(nn.Sequential(nn.Linear(128, 24 * world)) if name == "no role" else whole, mesh, plan)
            found[name] = "was divided"
        except QCompileError as error:
            found[name] = f"{type(error).__name__}: {error}"
    narrow = nn.Sequential(nn.Linear(64 * world, 64))
    parallelize_module(narrow, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    try:
        qcompile.quantize_(narrow, torch.randn(2, 64 * world), policy="int4_g128")
    except QCompileError as error:
        found["parts"] = f"{type(error).__name__}: {error}"
    model = decoder(num_key_value_heads=1)
    qcompile.quantize_(model, IDS, policy=POLICY)
    try:
        qcompile.parallelize_module(model, mesh)
    except QCompileError as error:
        found["heads"] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    pairs, four = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "tp")), init_device_mesh("cpu", (4,))
    for world, mesh in ((2, pairs["tp"]), (4, four)):
        if rank < world:
            with torch.no_grad():
                cases = (divided_then_packed, packed_then_divided, divided_by_transformers, refused, fully_sharded)
                torch.save({case.__name__: case(mesh) for case in cases}, folder / f"{world}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
