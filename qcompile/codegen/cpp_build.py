"""Compiles generated C++ into shared libraries, each once on a machine.

The compiler is the one that Inductor found. The store names a library by its source, its flags and the compiler's predefined
macros, which tell its version and the instruction set of this machine.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import KernelBuildError
from ..store import the_store

FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-w",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",  # float results as written, but free of side effects
    "-fwrapv", "-fno-strict-aliasing",  # integer sums wrap on purpose; x is written as elements and read as words
)  # fmt: skip

ISA_FLAGS = {
    "native": ("-march=native",),
    "avx2": ("-march=x86-64", "-mavx2", "-mfma", "-mf16c"),
    "generic": ("-DQC_GENERIC",),
}
"""Instruction sets to build for: this machine's, AVX2, and what every machine of its architecture has."""


def every_flags() -> list[tuple[str, ...]]:
    """The flags of each instruction set."""
    return [FLAGS + isa for isa in ISA_FLAGS.values()]


LIBRARY, SOURCE = "library.so", "source.cpp"


def compiler() -> str:
    """The C++ compiler that Inductor uses (``torch._inductor.config.cpp.cxx``). Raises :class:`KernelBuildError`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise KernelBuildError("no C++ compiler was found; install g++ or clang++, or set CXX to one") from error


def _identity(cxx: str, flags: tuple[str, ...]) -> str:
    """The compiler's predefined macros under ``flags``: version, architecture and instruction set. Asked for once in a process:
    who comes while another thread asks waits for its answer."""
    with _asking[cxx, flags]:
        return _macros(cxx, flags)


_asking: defaultdict[tuple[str, tuple[str, ...]], threading.Lock] = defaultdict(threading.Lock)


@functools.cache
def _macros(cxx: str, flags: tuple[str, ...]) -> str:
    return _run([cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull], Path(os.devnull))


def ready(flags: tuple[str, ...]) -> None:
    """Asks the compiler now what :func:`built` will want to know for ``flags``; errors are for that to raise."""
    with contextlib.suppress(KernelBuildError):
        _identity(compiler(), flags)


def load_library(source: str, isa: str = "native") -> tuple[ctypes.CDLL, Path]:
    """The library of ``source`` and its file, built for ``isa`` (a key of :data:`ISA_FLAGS`); errors as :func:`built`."""
    library = built(source, FLAGS + ISA_FLAGS[isa])
    return ctypes.CDLL(str(library)), library


def library_parts(source: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """What names the library of ``source`` in the store."""
    cxx = compiler()
    macros = hashlib.sha256(_identity(cxx, flags).encode()).hexdigest()
    return {"source": hashlib.sha256(source.encode()).hexdigest(), "compiler": cxx, "flags": list(flags), "macros": macros}


def built(source: str, flags: tuple[str, ...]) -> Path:
    """The library of ``source``, compiled with ``flags`` unless the store has it.

    Where nothing can be kept it lies in a temporary folder, for as long as this process lives. Raises
    :class:`KernelBuildError` with the command, the source file, which stays, and the compiler's words.
    """
    with the_store().making("library", library_parts(source, flags)) as slot:
        if slot.found is not None:
            return slot.found / LIBRARY
        made = _build(source, flags)
        kept = slot.put(lambda folder: [shutil.copyfile(made / name, folder / name) for name in (LIBRARY, SOURCE)])
        if kept is None:
            atexit.register(shutil.rmtree, made, ignore_errors=True)
            return made / LIBRARY
    shutil.rmtree(made)
    return kept / LIBRARY


def _build(source: str, flags: tuple[str, ...]) -> Path:
    """A temporary folder with the library and its source."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="qcompile-"))
        (folder / SOURCE).write_text(source, encoding="utf-8")
    except OSError as error:
        raise KernelBuildError(f"cannot write a kernel's source to {tempfile.gettempdir()}: {error}; set TMPDIR to a folder "
                               "that can be written") from error  # fmt: skip
    _run([compiler(), *flags, str(folder / SOURCE), "-o", str(folder / LIBRARY)], folder / SOURCE)
    return folder


def _run(command: list[str], source: Path) -> str:
    line = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelBuildError(f"cannot run the C++ compiler\ncommand: {line}\nsource: {source}\n{error}") from error
    if done.returncode:
        raise KernelBuildError(
            f"the C++ compiler failed\ncommand: {line}\nsource: {source}\n{done.stderr}{done.stdout}"
        )
    return done.stdout
