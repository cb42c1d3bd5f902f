"""The garbage collector goes through what a trace makes, and not, again and again, through everything beside it."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.callback import callback_handler

import qcompile.backend
from qcompile import collector
from qcompile.owners import Owners
from qcompile.passes.pipeline import Compilation


@pytest.fixture
def in_sight(fresh_dynamo: None) -> Iterator[list[int]]:
    """Numbers of objects that the collector would go through at the begin of each trace."""
    seen: list[int] = []

    def begin(_: object) -> None:
        seen.append(len(gc.get_objects()))

    qcompile.backend.listen()
    callback_handler.register_start_callback(begin)
    yield seen
    callback_handler.remove_start_callback(begin)


def call(backend: str) -> None:
    torch.compile(nn.Linear(64, 64), backend=backend)(torch.ones(1, 64))


def test_what_lives_before_a_trace_is_out_of_the_way_until_the_backend_begins(
    in_sight: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions, all_objects, in_backend = Compilation.conversions, len(gc.get_objects()), list[int]()

    def counted(self: Compilation) -> object:
        in_backend.append(gc.get_freeze_count())
        return conversions(self)

    monkeypatch.setattr(Compilation, "conversions", counted)
    call("qcompile")
    assert len(in_sight) == 1 and in_sight[0] < all_objects / 100
    assert set(in_backend) == {0} and gc.get_freeze_count() == 0


def test_traces_for_other_backends_are_left_alone(in_sight: list[int]) -> None:
    before = len(gc.get_objects())
    call("aot_eager")
    assert len(in_sight) == 1 and in_sight[0] > before / 2


def test_a_trace_that_fails_leaves_everything_in_sight(in_sight: list[int]) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="qcompile", fullgraph=True)(torch.ones(1))
    assert len(in_sight) == 1 and gc.get_freeze_count() == 0


def test_what_the_program_has_frozen_stays_so(in_sight: list[int]) -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        call("qcompile")
        assert gc.get_freeze_count() > frozen / 2
    finally:
        gc.unfreeze()


def test_who_looks_for_owners_meanwhile_finds_them() -> None:
    model = nn.Linear(4, 4)
    collector.set_aside()
    assert gc.get_freeze_count() > 0 and Owners().name(model.weight) == "weight"
    assert gc.get_freeze_count() == 0 and gc.isenabled()
