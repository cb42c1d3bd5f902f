"""Compiling, caching and loading of generated C++, and the instructions that come out of it."""

from __future__ import annotations

import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest

from qcompile.codegen import cpp_build
from qcompile.codegen.cpp import cpu_kernels
from qcompile.errors import KernelBuildError
from qcompile.formats import REGISTRY, Scheme


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def test_register_tables_and_dot_products_are_used() -> None:
    """A table must not become loads from memory, and products must be the wide ones."""
    if which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    if not {"avx512bw", "avx512_bf16", "avx512_vnni"} <= cpu_flags():
        pytest.skip("this CPU has no AVX-512 with BF16 and VNNI")
    wanted = {"int4_g128": {"vpermps", "vpermw", "vdpbf16ps", "vfmadd231ps"}, "int4_g128+int8": {"vpdpbusd"},
              "int8+int8": {"vpdpbusd"}, "fp8_e4m3": {"vcvtph2ps", "vdpbf16ps"}}  # fmt: skip
    for name, opcodes in wanted.items():
        fmt, _, activations = name.partition("+")
        path = cpu_kernels(Scheme(REGISTRY[fmt], activations or None)).path
        listing = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", path], text=True)
        assert not [op for op in opcodes if op not in listing], name
        assert "vgatherdps" not in listing and "vpgatherdd" not in listing


SMALL = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    return tmp_path / "store-2" / "library"


def test_the_compiler_is_asked_once_by_threads_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], source: Path) -> str:
        asked.append(command)
        time.sleep(0.2)
        return "#define answer\n"

    monkeypatch.setattr(cpp_build, "_run", run)
    cpp_build._macros.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: cpp_build._identity("a compiler", ("-O2",)), range(4)))
    finally:
        cpp_build._macros.cache_clear()
    assert found == ["#define answer\n"] * 4 and len(asked) == 1


def test_library_is_built_once_and_again_when_damaged(cache: Path) -> None:
    library, path = cpp_build.load_library(SMALL)
    assert library.answer() == 42 and path.parent.parent == cache
    built = path.stat().st_mtime_ns
    assert cpp_build.load_library(SMALL)[1].stat().st_mtime_ns == built
    damaged = path.read_bytes()[:1000]
    path.unlink()
    path.write_bytes(damaged)
    assert cpp_build.load_library(SMALL)[0].answer() == 42 and path.stat().st_size > 1000


def test_two_builders_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds, build, start = [], cpp_build._build, threading.Barrier(2)

    def counted(source: str, flags: tuple[str, ...]) -> Path:
        builds.append(source)
        return build(source, flags)

    monkeypatch.setattr(cpp_build, "_build", counted)

    def load() -> int:
        start.wait()
        return int(cpp_build.load_library(SMALL)[0].answer())

    with ThreadPoolExecutor(2) as pool:
        assert [f.result() for f in [pool.submit(load), pool.submit(load)]] == [42, 42]
    assert len(builds) == 1


def test_a_library_that_cannot_be_kept_is_used_from_a_temporary_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent.parent / "file").write_text("")
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(cache.parent.parent / "file"))
    library, path = cpp_build.load_library(SMALL)
    assert library.answer() == 42 and path.parent.name.startswith("qcompile-")


def test_build_errors_say_what_failed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelBuildError, match=r"(?s)command: .*-O3.*source: .*\.cpp.*error: .*nonsense"):
        cpp_build.load_library("int f() { return nonsense; }")
    monkeypatch.setattr(cpp_build, "compiler", lambda: "/nowhere/g++")
    with pytest.raises(KernelBuildError, match=r"(?s)cannot run the C.. compiler.*command: /nowhere/g"):
        cpp_build.load_library(SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(cpp_build.tempfile, "mkdtemp", lambda prefix: str(cache / "not there"))
    with pytest.raises(KernelBuildError, match=r"cannot write a kernel's source.*TMPDIR"):
        cpp_build.load_library(SMALL)
