"""The store of what was made: whole or not there, made once, and of no harm to anyone when it cannot work."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcompile.errors import DamagedEntryError, FingerprintError, OptionError
from qcompile.store import COUNTS, Store, code_version, key_of, the_store
from qcompile.store import store as store_module
from qcompile.store.entry import FILES, MANIFEST
from qcompile.store.store import bytes_of

KIND, FILE = "source", "source.txt"


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    COUNTS.clear()
    store_module._say_once.cache_clear()
    yield
    COUNTS.clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, 10**9)


def made(store: Store, text: str, number: int = 0, kind: str = KIND) -> Path | None:
    """The folder of an entry with the text in every file; made if it is not there."""
    with store.making(kind, {"number": number}) as slot:
        return slot.found or slot.put(lambda folder: [(folder / name).write_text(text) for name in FILES[kind]])


def run(program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=check)


def test_an_entry_is_made_once_and_found_by_all_it_was_made_from(store: Store) -> None:
    folder = made(store, "one")
    assert folder is not None and (folder / FILE).read_text() == "one"
    assert made(store, "two") == folder and (folder / FILE).read_text() == "one"
    assert store.find(KIND, {"number": 1}) is None
    assert store.find(KIND, {"number": 0, "more": None}) is None
    assert COUNTS == {"generated": 1, "source read": 1}
    assert json.loads((folder / MANIFEST).read_text())["parts"] == {"number": 0}
    assert not list((store.root / "unfinished").iterdir())


@pytest.mark.parametrize("a,b", [({"x": 1}, {"x": "1"}), ({"x": 1}, {"x": 1.0}), ({"x": None}, {}), ({"x": [1, 2]}, {"x": [12]}),
                                 ({"x": True}, {"x": "true"}), ({"x": {"y": 1}}, {"x": [["y", 1]]})])  # fmt: skip
def test_other_parts_have_another_key(a: dict[str, object], b: dict[str, object]) -> None:
    assert key_of(KIND, a) != key_of(KIND, b)
    assert key_of(KIND, a) != key_of("plan", a)
    assert key_of(KIND, a) == key_of(KIND, dict(reversed(a.items())))


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, {1: 2}, lambda: 0])
def test_what_cannot_be_told_has_no_key(store: Store, value: object) -> None:
    with pytest.raises(FingerprintError, match="no fingerprint"), store.making(KIND, {"x": value}):
        raise AssertionError


def test_code_version_follows_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    (package / "include").mkdir(parents=True)
    for name in ("__init__.py", "a.py", "include/b.h"):
        (package / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    seen = {code_version("some_package")}
    for name, text in (("a.py", "x = 1"), ("include/b.h", "int x;"), ("c.py", ""), ("notes.txt", "of no consequence")):
        (package / name).write_text(text)
        code_version.cache_clear()
        seen.add(code_version("some_package"))
    assert len(seen) == 4


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, names in FILES.items() for name in (*names, MANIFEST)])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove", "append", "link", "folder"])
def test_a_damaged_entry_is_put_aside_and_made_again(store: Store, kind: str, name: str, damage: str) -> None:
    folder = made(store, "text " * 20, kind=kind)
    assert folder is not None
    path = folder / name
    data = path.read_bytes()
    at = random.Random(damage + kind).randrange(len(data))
    path.unlink()
    if damage == "link":
        (folder.parent / "elsewhere").write_bytes(data[:-1])
        path.symlink_to(folder.parent / "elsewhere")
    elif damage == "folder":
        path.mkdir()
    elif damage != "remove":
        path.write_bytes({"truncate": data[:at], "flip": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], "empty": b"",
                          "append": data + b"x"}[damage])  # fmt: skip
    assert store.find(kind, {"number": 0}) is None
    assert made(store, "again", kind=kind) == folder
    assert {(folder / n).read_text() for n in FILES[kind]} == {"again"}
    assert COUNTS["quarantined"] == 1 and len(list(store.folder("quarantine").iterdir())) == 1
    assert store.verify() == []


def test_one_flipped_bit_anywhere_is_noticed(store: Store) -> None:
    """Every bit of an entry's files, those of the manifest that are only white space or the order of keys excepted."""
    folder = made(store, "some text")
    assert folder is not None
    for name in (FILE, MANIFEST):
        data = (folder / name).read_bytes()
        for at in range(len(data)):
            for bit in range(8):
                changed = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
                (folder / name).write_bytes(changed)
                same = name == MANIFEST and _meaning(changed) == _meaning(data)
                assert (store.find(KIND, {"number": 0}) is None) != same, (name, at, bit)
        (folder / name).write_bytes(data)
    assert store.find(KIND, {"number": 0}) == folder


def _meaning(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_an_entry_in_anothers_place_is_refused(store: Store) -> None:
    one, two = made(store, "one", 1), made(store, "two", 2)
    assert one is not None and two is not None
    os.rename(one, one.parent / "aside")
    os.rename(two, one)
    assert store.find(KIND, {"number": 1}) is None
    (error,) = store.verify()
    assert isinstance(error, DamagedEntryError) and "that of another entry" in str(error)
    assert made(store, "one", 1) == one and (one / FILE).read_text() == "one"


def test_threads_and_processes_make_an_entry_once(tmp_path: Path) -> None:
    program = """
import sys, time, pathlib
from qcompile.store import COUNTS, Store
store, start = Store(pathlib.Path(sys.argv[1]), 10**9), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
for number in range(6):
    with store.making("source", {"number": number}) as slot:
        if slot.found is None:
            time.sleep(0.05)
            slot.put(lambda folder: (folder / "source.txt").write_text(str(number)))
        text = (store.find("source", {"number": number}) / "source.txt").read_text()
        assert text == str(number), text
print(COUNTS["generated"])
"""
    start = time.time() + 1.5
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: run(program, tmp_path, start).stdout, range(8)))
    assert sum(map(int, outputs)) == 6
    store, barrier, calls = Store(tmp_path / "threads", 10**9), threading.Barrier(8), []

    def work(_: int) -> None:
        barrier.wait()
        with store.making(KIND, {"number": 0}) as slot:
            if slot.found is None:
                calls.append(slot.put(lambda folder: (folder / FILE).write_text("x")))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(calls) == 1


def test_the_others_wait_with_a_message_and_go_on_when_the_maker_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    program = """
import sys, time, pathlib
from qcompile.store import Store
with Store(pathlib.Path(sys.argv[1]), 10**9).making("source", {"number": 0}) as slot:
    slot.put(lambda folder: [(folder / "source.txt").write_text("half"), print("making", flush=True), time.sleep(60)])
"""
    maker = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None and maker.stdout.readline() == "making\n"
    monkeypatch.setattr(store_module, "PATIENCE", 0.1)
    killer = threading.Timer(0.6, maker.kill)
    killer.start()
    with caplog.at_level(logging.WARNING):
        folder = made(Store(tmp_path, 10**9), "whole")
    maker.wait()
    assert folder is not None and (folder / FILE).read_text() == "whole"
    assert COUNTS["waits"] == 1 and "another process is making source" in caplog.text


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """200 writers are killed; no entry is ever partial, no lock stays, and what they left unfinished goes."""
    store, chance = Store(tmp_path, 10**9), random.Random(0)
    for _ in range(200):
        child = os.fork()
        if child == 0:
            try:
                for number in range(10**6):
                    made(store, "0123456789" * 500, number % 40)
                    if number % 40 == 39:
                        store.clear()
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for number in range(40):
            folder = store.find(KIND, {"number": number})
            assert folder is None or (folder / FILE).read_text() == "0123456789" * 500
    assert store.verify() == [] and COUNTS["quarantined"] == 0
    start = time.monotonic()
    assert all(made(store, "0123456789" * 500, number) for number in range(40))
    assert time.monotonic() - start < store_module.PATIENCE and COUNTS["waits"] == 0
    store._sweep()
    assert not list((store.root / "unfinished").iterdir())


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, 10_000)
    for number in range(9):
        folder = made(store, "x" * 1000, number)
        assert folder is not None
        os.utime(folder / MANIFEST, (number, number))
    assert store.find(KIND, {"number": 0}) is not None  # used just now
    made(store, "x" * 1000, 9)
    made(store, "x" * 1000, 10)
    left = [n for n in range(11) if store.find(KIND, {"number": n}) is not None]
    assert left == [0, *range(2, 11)] and COUNTS["dropped"] == 1


def test_a_clock_set_back_changes_no_result(tmp_path: Path) -> None:
    store = Store(tmp_path, 3000)
    for number in range(3):
        folder = made(store, "x" * 1000, number)
        assert folder is not None
        os.utime(folder / MANIFEST, (time.time() + 10**9,) * 2)  # made in what is now the future
    for number in range(3, 6):
        folder = made(store, "x" * 1000, number)
        assert folder is None or not folder.exists() or (folder / FILE).read_text() == "x" * 1000
    assert sum(1 for _ in store.entries()) == 3 and store.verify() == []


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    """The limit on the size of files stands for a full disk: writing fails in the kernel, halfway."""
    program = """
import logging, pathlib, resource, signal, sys
from qcompile.store import COUNTS, Store
logging.basicConfig(stream=sys.stdout, format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = Store(pathlib.Path(sys.argv[1]), 10**9)
for number in range(3):
    with store.making("source", {"number": number}) as slot:
        assert slot.put(lambda folder: (folder / "source.txt").write_text("x" * 100000)) is None
print(COUNTS["source given up"], list((store.root / "unfinished").iterdir()), list(store.entries()))
"""
    lines = run(program, tmp_path).stdout.splitlines()
    assert lines[-1] == "3 [] []" and len(lines) == 2 and "File too large" in lines[0] and "QCOMPILE_CACHE_DIR" in lines[0]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """What is there is used; what is not is made each time, said once. The process gives up root's rights for it."""
    program = """
import logging, os, pathlib, sys
from qcompile.store import COUNTS, Store
root = pathlib.Path(sys.argv[1])
store = Store(root, 10**9)
with store.making("source", {"number": 0}) as slot:
    slot.put(lambda folder: (folder / "source.txt").write_text("kept"))
for folder, _, files in os.walk(root, topdown=False):
    for name in files:
        os.chmod(os.path.join(folder, name), 0o444)
    os.chmod(folder, 0o555)
if os.getuid() == 0:
    os.setuid(65534)
logging.basicConfig(stream=sys.stdout, format="%(message)s")
assert (store.find("source", {"number": 0}) / "source.txt").read_text() == "kept"
for number in (1, 1, 2):
    with store.making("source", {"number": number}) as slot:
        assert slot.found is None and slot.put(lambda folder: (folder / "source.txt").write_text("x")) is None
print(COUNTS["generated"])
"""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):  # closed to others by pytest
        folder.chmod(0o755)
    lines = run(program, tmp_path / "cache").stdout.splitlines()
    assert lines[-1] == "4" and len(lines) == 2 and "Permission denied" in lines[0] and "QCOMPILE_CACHE_DIR" in lines[0]


def test_two_versions_side_by_side(tmp_path: Path) -> None:
    """Another version of the code asks by another key; another layout of the store lies in another folder."""
    store = Store(tmp_path, 10**9)
    for code in ("1", "2"):
        with store.making(KIND, {"code": code}) as slot:
            assert slot.found is None
            slot.put(lambda folder, code=code: (folder / FILE).write_text(code))  # type: ignore[misc]
    later = tmp_path / "store-999" / KIND
    later.mkdir(parents=True)
    assert [(store.find(KIND, {"code": c}) or Path()).joinpath(FILE).read_text() for c in ("1", "2")] == ["1", "2"]
    assert store.clear() == 2 and later.exists()


def test_nothing_is_kept_in_a_store_of_size_zero(tmp_path: Path) -> None:
    store = Store(tmp_path, 0)
    assert made(store, "x") is None and made(store, "x") is None
    assert COUNTS == {"generated": 2} and not list(tmp_path.iterdir())


def test_clearing_takes_what_killed_processes_left(store: Store) -> None:
    made(store, "x")
    for name in ("cleared-1234", "unfinished/import-5678"):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "file").write_text("left")
    assert store.clear() == 1
    assert [p.name for p in store.root.iterdir()] == ["locks"] and store.clear() == 0


def test_nested_making_does_not_wait_for_itself(store: Store) -> None:
    with store.making(KIND, {"number": 0}) as outer:
        for number in range(300):  # every lock there is
            made(store, "inner", number + 1)
        outer.put(lambda folder: (folder / FILE).write_text("outer"))
    assert sum(1 for _ in store.entries()) == 301


def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("QCOMPILE_CACHE_SIZE", "1.5M")
    assert the_store().root.parent == tmp_path and the_store().bound == 1_500_000
    assert the_store() is the_store()
    assert [bytes_of(t) for t in ("0", "12", "3k", "50G", "1T")] == [0, 12, 3000, 50 * 10**9, 10**12]
    for text in ("", "G", "-1", "1X", "1e3"):
        with pytest.raises(OptionError, match="QCOMPILE_CACHE_SIZE"):
            bytes_of(text)
