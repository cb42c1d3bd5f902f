"""Bundles: a cache for other machines, and what a bundle that somebody else has made cannot do."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from typer.testing import CliRunner

from qcompile.cli import app
from qcompile.codegen import cpp_build
from qcompile.codegen.cpp import CpuKernels
from qcompile.codegen.triton import TritonKernels
from qcompile.errors import CacheError
from qcompile.formats import REGISTRY, Scheme
from qcompile.packing import packed
from qcompile.store import COUNTS, Store, key_of, the_store
from qcompile.store.bundle import export, load
from qcompile.store.entry import FILES, MANIFEST, Entry
from qcompile.store.keys import SCHEMA
from qcompile.target import Target

SPEC = REGISTRY["int8"]


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A bundle of a store with an entry of each kind; the environment names that store."""
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "one"))
    packed(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), SPEC, rounding=["gptq", "x"])
    CpuKernels(Scheme(SPEC))
    kernels = TritonKernels(Scheme(SPEC))
    kernels.note_spills(kernels.variant(64, torch.bfloat16, Target("cuda", "90")), 90)
    parts = {"graph": "0123456789abcdef", "formats": {}, "layer": "a", "scheme": Scheme(SPEC).key, "rows": 32, "n": 1, "k": 1,
             "dtype": "bfloat16"}  # fmt: skip
    written = {"plan": True, "calibration": ["a"], "sensitivity": 0.25, "product": {"ours": 2.0, "other": 1.0}}
    for kind, content in written.items():
        with the_store().making(kind, parts) as slot:
            slot.put(lambda folder, k=kind, c=content: (folder / FILES[k][0]).write_text(json.dumps(c)))  # type: ignore[misc]
    file = tmp_path / "bundle.tar"
    export(the_store(), file)
    yield file
    COUNTS.clear()


def call(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["cache", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def kinds(store: Store) -> list[str]:
    return [folder.parent.name for folder, _ in store.entries()]


def test_the_commands(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = call("list")
    assert "float32 32×64 as int8, gptq" in text and "cpp: int8" in text and "GPTQ of 0 weights" in text
    assert "graph 0123456789ab: the same over packed weights" in text
    assert "times of 32 rows and more of bfloat16 by 1×1 as int8" in text
    assert "int8 spills on sm_90: 64 rows" in text and "triton: int8" in text
    assert str(the_store().root) in call("info") and "of 50.0 GB" in call("info")
    number = len(kinds(the_store()))
    assert f"{number} of {number} entries are whole" in call("verify")
    assert f"{number} entries written" in call("export", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == full.read_bytes()
    damaged = next(p for p in the_store().folder("source").iterdir())
    (damaged / "source.txt").write_text("int main() {}")
    text = call("verify", code=1)
    assert "put aside: source/" in text and f"{number - 1} of {number} entries are whole" in text
    assert "1 damaged entries" in call("info") and "0 damaged" not in call("info")
    assert f"{number - 1} entries removed" in call("clear") and kinds(the_store()) == []
    assert f"{number} entries taken" in call("import", full, "--trust")
    assert len(kinds(the_store())) == number
    assert "nothing of it was taken" in call("import", __file__, code=1)
    monkeypatch.setenv("QCOMPILE_CACHE_SIZE", "much")
    assert "QCOMPILE_CACHE_SIZE" in str(CliRunner().invoke(app, ["cache", "info"]).exception)


def test_code_is_taken_only_where_it_is_what_this_installation_makes(full: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "two"))
    text = call("import", full)
    assert "8 entries taken" in text and "libraries compiled" in text
    assert sorted(set(kinds(the_store()))) == sorted(FILES)
    COUNTS.clear()
    CpuKernels(Scheme(SPEC))
    assert COUNTS["generated"] == COUNTS["compiled"] == 0 and COUNTS["source read"] == 1 and COUNTS["library read"] >= 1


def test_changed_code_is_left_and_with_trust_it_is_taken(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack: our own key, another text, a digest that fits."""
    store = Store(tmp_path / "evil", 10**9)
    for _, entry in the_store().entries():
        if isinstance(entry, Entry) and entry.kind in ("source", "library"):
            store.keep(entry.kind, entry.parts, lambda to, e=entry: [(to / n).write_text("evil") for n in e.files])  # type: ignore[misc]
    export(store, tmp_path / "evil.tar")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "victim"))
    text = call("import", tmp_path / "evil.tar")
    assert "0 entries taken" in text and "--trust takes them" in text
    for folder, _ in the_store().entries():  # a library is compiled from our own text alone
        assert all(b"evil" != path.read_bytes() for path in folder.iterdir())
    assert "source" not in kinds(the_store())
    assert f"{len(kinds(store))} entries taken" in call("import", tmp_path / "evil.tar", "--trust")


UNREADABLE = [("packed", b"no safetensors"), ("tile", b"[]"), ("plan", b'[["a", 1, false]]'), ("plan", b"[" * 10**5),
              ("calibration", b'{"a": 1}'), ("product", b'{"ours": 2.0}'), ("product", b'{"ours": 2.0, "other": Infinity}'),
              *[("sensitivity", text) for text in (b"-1.0", b"NaN", b"[1]")]]  # fmt: skip


@pytest.mark.parametrize("kind,content", UNREADABLE)
def test_data_that_cannot_be_read_is_left(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
                                          content: bytes) -> None:  # fmt: skip
    store = Store(tmp_path / "evil", 10**9)
    entry = next(e for _, e in the_store().entries() if isinstance(e, Entry) and e.kind == kind)
    store.keep(kind, entry.parts, lambda to: (to / FILES[kind][0]).write_bytes(content))
    export(store, tmp_path / "evil.tar")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "victim"))
    assert "0 entries taken" in call("import", tmp_path / "evil.tar") and kinds(the_store()) == []


def test_planes_of_another_shape_are_left(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "evil", 10**9)
    folder, entry = next((f, e) for f, e in the_store().entries() if isinstance(e, Entry) and e.kind == "packed")
    parts = dict(entry.parts) | {"shape": [48, 64]}
    store.keep("packed", parts, lambda to: (to / FILES["packed"][0]).write_bytes((folder / FILES["packed"][0]).read_bytes()))
    export(store, tmp_path / "evil.tar")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "victim"))
    assert "0 entries taken" in call("import", tmp_path / "evil.tar")


KEY = key_of("plan", {"x": 1})


def member(name: str, content: bytes = b"[]", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def manifest(size: int = 2, digest: str = blake3(b"[]").hexdigest(), kind: str = "plan", parts: object = None,
             files: object = None) -> bytes:  # fmt: skip
    files = {"plan.json": [size, digest]} if files is None else files
    return json.dumps({"schema": SCHEMA, "kind": kind, "parts": {"x": 1} if parts is None else parts, "files": files}).encode()


HEAD = member(f"plan/{KEY}/{MANIFEST}", manifest())
GOOD = [HEAD, member(f"plan/{KEY}/plan.json")]
ATTACKS: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "path traversal": [HEAD, member(f"plan/{KEY}/../../evil")],
    "path traversal in the key": [member(f"plan/../{KEY}/{MANIFEST}", manifest())],
    "absolute path": [member("/tmp/evil")],
    "unknown kind": [member(f"pickle/{KEY}/{MANIFEST}", manifest())],
    "unknown file": [HEAD, member(f"plan/{KEY}/other.json")],
    "symbolic link": [HEAD, member(f"plan/{KEY}/plan.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "hard link": [HEAD, member(f"plan/{KEY}/plan.json", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "device": [HEAD, member(f"plan/{KEY}/plan.json", b"", type=tarfile.CHRTYPE)],
    "pipe": [HEAD, member(f"plan/{KEY}/plan.json", b"", type=tarfile.FIFOTYPE)],
    "folder": [HEAD, member(f"plan/{KEY}/plan.json", b"", type=tarfile.DIRTYPE)],
    "larger than said": [HEAD, member(f"plan/{KEY}/plan.json", b"[] ")],
    "larger than the store": [member(f"plan/{KEY}/{MANIFEST}", manifest(10**7)), member(f"plan/{KEY}/plan.json", b"x" * 10**7)],
    "huge manifest": [member(f"plan/{KEY}/{MANIFEST}", manifest() + b" " * (1 << 20))],
    "wrong digest": [HEAD, member(f"plan/{KEY}/plan.json", b"{}")],
    "wrong key": [member(f"plan/{KEY}/{MANIFEST}", manifest(parts={"x": 2})), member(f"plan/{KEY}/plan.json")],
    "no manifest": [member(f"plan/{KEY}/plan.json")],
    "no file": [HEAD],
    "twice": [*GOOD, *GOOD],
    "manifest twice": [HEAD, *GOOD],
    "manifest is no object": [member(f"plan/{KEY}/{MANIFEST}", b"[]")],
    "manifest is deep": [member(f"plan/{KEY}/{MANIFEST}", b"[" * 10**5)],
    "negative size": [member(f"plan/{KEY}/{MANIFEST}", manifest(-1)), member(f"plan/{KEY}/plan.json")],
    "more files": [member(f"plan/{KEY}/{MANIFEST}", manifest(files={"plan.json": [2, "x"], "y": [1, "y"]}))],
}


def written(file: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bundle_that_is_not_as_ours_changes_nothing(tmp_path: Path, attack: str) -> None:
    store = Store(tmp_path / "store", 10**6)
    other = key_of("plan", {"x": 9})
    good = [member(f"plan/{other}/{MANIFEST}", manifest(parts={"x": 9})), member(f"plan/{other}/plan.json")]
    with pytest.raises(CacheError, match="nothing of it was taken"):
        load(store, written(tmp_path / "bundle.tar", [*good, *ATTACKS[attack]]))
    assert kinds(store) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["bundle.tar", "store"]
    assert load(store, written(tmp_path / "bundle.tar", [*good, *GOOD])) == (2, 0)


@pytest.mark.parametrize("change", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:100] + b"\xff" * 512 + d[612:],
                                    lambda d: d[:-1536] if len(d) > 1536 else b"x", lambda d: b"\x1f\x8b" + d])  # fmt: skip
def test_what_is_no_whole_tar_is_refused_or_taken_whole(full: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    (tmp_path / "bundle.tar").write_bytes(change(full.read_bytes()))
    store = Store(tmp_path / "store", 10**9)
    try:
        taken, _ = load(store, tmp_path / "bundle.tar")
    except CacheError:
        taken = 0
    assert len(kinds(store)) == taken and store.verify() == []


def test_every_flipped_byte_of_a_bundle_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Of a bundle of one entry: what is taken is what was written."""
    file = written(tmp_path / "bundle.tar", GOOD)
    data = file.read_bytes()
    for at in range(0, 4 * 512):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        store = Store(tmp_path / "store", 10**6)
        try:
            load(store, file)
        except CacheError:
            pass  # noticed
        for folder, entry in store.entries():
            assert isinstance(entry, Entry) and entry.key == KEY and (folder / "plan.json").read_bytes() == b"[]"
        store.clear()


def test_second_processes_here_and_elsewhere_start_warm(tmp_path: Path) -> None:
    """Each in a root of its own: another home, no caches, nothing but a bundle of ours, or torch's artifacts."""
    program = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_cache import COUNTS, Model, X
from torch._dynamo.utils import compilation_time_metrics, counters
if len(sys.argv) > 3:
    torch.compiler.load_cache_artifacts(open(sys.argv[2], "rb").read())
with torch.no_grad():
    out = torch.compile(Model(), backend="qcompile", options={"policy": "int8"})(X)
if len(sys.argv) == 3:
    open(sys.argv[2], "wb").write(torch.compiler.save_cache_artifacts()[0])
bypasses = [k for group in counters.values() for k in group if "bypass" in k]
misses = counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]
print(json.dumps([dict(COUNTS), len(compilation_time_metrics["bytecode_tracing"]), misses, bypasses, out.flatten().tolist()]))
"""

    def run(home: str, *arguments: object) -> str:
        root = tmp_path / home
        (root / "tmp").mkdir(parents=True, exist_ok=True)
        env = {"HOME": str(root), "TMPDIR": str(root / "tmp"), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    tests, artifacts, bundle = Path(__file__).parent, tmp_path / "artifacts", tmp_path / "bundle.tar"
    command = "from qcompile.cli import main; main()"
    made, traces, misses, bypasses, out = json.loads(run("one", "-c", program, tests, artifacts))
    assert {k: made.get(k) for k in ("quantized", "generated", "compiled", "planned")} == {
        "quantized": 2, "generated": 1, "compiled": 2, "planned": 1}  # fmt: skip
    assert (traces, misses, bypasses) == (2, 2, [])
    read = {"packed read", "source read", "library read"}
    for home, more in (("one", ()), ("two", ("load",))):
        made, traces, misses, bypasses, again = json.loads(run(home, "-c", program, tests, artifacts, *more))
        assert (set(made), traces, misses, bypasses, again) == (read, 1, 0, [], out)
    run("one", "-c", command, "cache", "export", bundle)
    run("three", "-c", command, "cache", "import", bundle)
    made, traces, _, _, again = json.loads(run("three", "-c", program, tests, tmp_path / "unused"))
    assert (set(made), traces, again) == (read, 1, out)


def test_flags_of_a_bundle_do_not_reach_the_compiler(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "evil", 10**9)
    entry = next(e for _, e in the_store().entries() if isinstance(e, Entry) and e.kind == "library")
    source = next(e for _, e in the_store().entries() if isinstance(e, Entry) and e.parts.get("language") == "cpp")
    text = CpuKernels(Scheme(SPEC)).source
    store.keep("source", source.parts, lambda to: (to / "source.txt").write_text(text))
    parts = dict(entry.parts) | {"flags": ["-fplugin=/tmp/evil.so"], "source": hashlib.sha256(text.encode()).hexdigest()}
    store.keep("library", parts, lambda to: [(to / n).write_text(text) for n in FILES["library"]])
    export(store, tmp_path / "evil.tar")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "victim"))
    asked: list[list[str]] = []
    real = cpp_build._run
    monkeypatch.setattr(cpp_build, "_run", lambda command, source: asked.append(command) or real(command, source))  # type: ignore[func-returns-value]
    assert "1 entries taken" in call("import", tmp_path / "evil.tar")
    assert not any("-fplugin" in word for command in asked for word in command)
