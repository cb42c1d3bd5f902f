"""Memory of packed planes is asked of Linux in huge pages, by whatever way they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile
from qcompile.formats import get, huge_pages, reference
from qcompile.formats.layout import pages
from qcompile.packing import known, packed
from qcompile.store import COUNTS

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(not SETTING.exists(), reason="needs Linux's huge pages")


def asked(tensor: torch.Tensor) -> bool:
    """Whether the mapping under the middle of ``tensor`` was advised to have huge pages (flag "hg"; see proc(5))."""
    advised = advised_at(tensor.data_ptr() + tensor.nbytes // 2)
    assert advised is not None
    return advised


def advised_at(address: int) -> bool | None:
    """The same of an address; None where nothing is mapped."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return None


def largest(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    return max(planes, key=lambda p: p.nbytes)


def test_large_ones_alone() -> None:
    for nbytes, wanted in ((huge_pages.HUGE, False), (64 * huge_pages.HUGE, True)):
        made = huge_pages.empty((nbytes,), torch.uint8, torch.device("cpu"))
        assert made.shape == (nbytes,) and made.untyped_storage().nbytes() == nbytes and made.data_ptr() % 64 == 0
        assert made._base is None and made.is_contiguous()
        assert asked(made) == wanted
    assert not asked(torch.empty(128 * huge_pages.HUGE, dtype=torch.uint8))


def test_what_is_let_go_of_leaves_no_advice_behind() -> None:
    """Blocks of these sizes come from the heap once larger ones were freed, which stays."""
    del (large := [torch.zeros(30 << 20, dtype=torch.uint8)])[:]
    made = [huge_pages.empty((5 * huge_pages.HUGE // 2,), torch.uint8, torch.device("cpu")).fill_(1) for _ in range(4)]
    assert not large and all(map(asked, made))
    middles = [m.data_ptr() + m.nbytes // 2 for m in made]
    made.clear()
    assert not any(map(advised_at, middles))


def test_however_planes_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized, read from the store, or mapped first and copied later."""
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    spec, weight = get("int8"), torch.randn(8192, 8192)
    quantized = packed(weight, spec).planes
    read = known(weight, spec)
    model = nn.Sequential(nn.Linear(8192, 8192, bias=False))
    model[0].weight.data.copy_(weight)
    qcompile.quantize_(model, torch.zeros(1, 8192), policy="int8")
    owned = model[0].weight
    mapped = known(weight, spec, mapped=True)
    assert read is not None and mapped is not None and not asked(largest(mapped.planes))
    copied = owned.with_planes(mapped.planes)
    copied.own_planes_()
    for planes in (quantized, read.planes, owned.planes, copied.planes):
        assert asked(largest(planes)) and all(torch.equal(a, b) for a, b in zip(planes, quantized, strict=True))


def test_of_compiled_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the backend packs, and those that it finds packed before."""
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    weight = torch.randn(8192, 8192) / 90
    for read in (0, 1):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8192, 8192, bias=False))
        model[0].weight.data.copy_(weight)
        before = COUNTS["packed read"]
        with torch.no_grad():
            torch.compile(model, backend="qcompile", options={"policy": "int8"})(torch.zeros(1, 8192))
        assert COUNTS["packed read"] - before == read
        assert asked(largest(model[0].weight.planes))


def test_caches_of_keys_and_values() -> None:
    planes = pages(get("fp8_e4m3"), 2, 8, 16384, 128, torch.device("cpu"))
    assert asked(largest(planes)) and not largest(planes).view(torch.uint8).any()


def test_tensors_without_memory_have_none_to_advise() -> None:
    assert reference.empty_parts(get("int8"), 8192, 8192, torch.device("meta"))[0].is_meta
    with FakeTensorMode():
        assert huge_pages.empty((1 << 24,), torch.uint8, torch.device("cpu")).shape == (1 << 24,)
