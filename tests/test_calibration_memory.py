"""A calibration's peak, counted tensor by tensor, against what its shapes promise."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import nn

import qcompile
from qcompile.errors import CalibrationError, OptionError
from qcompile.passes.session import Session
from qcompile.passes.walk import Walk
from qcompile.rounding.seen import Seen

WIDE, NARROW, SAMPLES, TOKENS = 2048, 64, 4, 512


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_dynamo: None, one_thread: None) -> Iterator[None]:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(F.layer_norm(x, (NARROW,)))))


def blocks(count: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)))


def promised(count: int) -> qcompile.CalibrationMemory:
    with torch.device("meta"):
        return qcompile.calibration_memory(blocks(count), torch.empty(1, TOKENS, NARROW), SAMPLES, policy="int4")


def peak(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of two blocks: operators of the graph, in whatever thread, and all that packs."""
    live, model = LiveBytes(), blocks(2)
    for owner, name in ((Walk, "run_node"), (Session, "decoded"), (Session, "serve")):
        monkeypatch.setattr(owner, name, live.wraps(getattr(owner, name)))
    qcompile.calibrate(model, [torch.randn(1, TOKENS, NARROW) for _ in range(SAMPLES)], policy="int4", progress=False)
    return live.peak


def test_the_peak_is_what_shapes_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    found, most = promised(2), peak(monkeypatch)
    own = most + 4 * WIDE**2 * 0
    assert found.layer.endswith("down") and 0.9 * found.total < own <= found.total


def _inputs(kept: list[Any], inputs: Any, seen: Seen) -> None:
    kept += [x for _, x in inputs]


def _hessians(kept: list[Any], inputs: Any, seen: Seen) -> None:
    kept.append(seen.hessian)


@pytest.mark.parametrize("keeps", [_inputs, _hessians])
def test_more_is_taken_where_one_block_is_kept_for_the_next(
    monkeypatch: pytest.MonkeyPatch, keeps: Callable[[list[Any], Any, Seen], None]
) -> None:
    kept: list[Any] = []
    seen_of = Seen.of

    def keeping(inputs: Any, layer: str, with_hessian: bool) -> Seen:
        found = seen_of(inputs, layer, with_hessian)
        keeps(kept, inputs, found)
        return found

    monkeypatch.setattr("qcompile.passes.session.Seen.of", keeping)
    assert peak(monkeypatch) > promised(2).total


def test_depth_adds_packed_weights_alone() -> None:
    two, five = promised(2), promised(5)
    assert five.total - two.total == five.packed - two.packed == 3 * two.packed // 2


def test_what_cannot_be_promised_is_refused() -> None:
    x = torch.empty(1, TOKENS, NARROW)
    with pytest.raises(OptionError, match="count must be a whole number of 1 or more, found 0"):
        qcompile.calibration_memory(blocks(1), x, 0, policy="int4")
    with pytest.raises(CalibrationError, match="packs no linear layer.*give a float model, or other rules"):
        qcompile.calibration_memory(blocks(1), x, 1, policy="float")
