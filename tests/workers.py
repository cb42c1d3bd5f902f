"""What tests run in other processes: importable there by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from qcompile.recorder import recorder_of


def network(seed: int, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 32))


def inputs() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(7))


def serve(model: Any, x: torch.Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(x).tolist())


class Encoded(Dataset[torch.Tensor]):
    """Samples that a packed model computes in the loader's workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, at: int) -> torch.Tensor:
        found: torch.Tensor = self.model(inputs()[at])
        return found


def trained(rank: int, folder: str, split: bool) -> None:
    """One of two processes that train a model under ``DistributedDataParallel``; what it has in the end goes to a file."""
    from test_backend import stack

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = stack(0).train()
    torch._dynamo.config.optimize_ddp = split
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.02)
    run = torch.compile(wrapped, backend="qcompile", options={"qat": True, "policy": "int4_g32"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        run(batch[rank::2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    said = {r.decision.site.name: r.kernel for r in recorder_of(wrapped).plan}
    with torch.no_grad():
        evaluated = run(batch)
    graphs = counters["aot_autograd"]["total"] / counters["stats"]["unique_graphs"]
    torch.save((model.state_dict(), evaluated, said, graphs), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def layers() -> list[nn.Module]:
    """Two stages of a model."""
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(64, 128), nn.SiLU()), nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32))]


def staged(rank: int, folder: str) -> None:
    """One of two processes, each with a stage of a pipeline, packed at its first micro-batch and compiled."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    stage = layers()[rank].eval().requires_grad_(False)
    run = torch.compile(stage, backend="qcompile", options={"policy": "int4_g32"})
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        schedule = ScheduleGPipe(PipelineStage(run, rank, 2, torch.device("cpu")), n_microbatches=4)
        found = schedule.step(x) if rank == 0 else schedule.step()
    packed = sum(type(p).__name__ != "Parameter" for p in stage.parameters())
    torch.save((packed, found), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
