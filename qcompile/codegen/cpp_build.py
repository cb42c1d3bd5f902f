"""Compiles generated C++ into shared libraries and keeps them on disk.

The compiler is the one that Inductor found. A library's name is the hash of its source, its flags and the compiler's
predefined macros, which name its version and the instruction set of this machine; beside it lies the SHA-256 of the
library, and one that does not match is built again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from ..errors import KernelBuildError

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


def cache_dir() -> Path:
    """Folder of built libraries: ``$QCOMPILE_CACHE_DIR/cpp``, else the user's cache folder."""
    if root := os.environ.get("QCOMPILE_CACHE_DIR"):
        return Path(root) / "cpp"
    import platformdirs

    return Path(platformdirs.user_cache_dir("qcompile")) / "cpp"


def compiler() -> str:
    """The C++ compiler that Inductor uses (``torch._inductor.config.cpp.cxx``). Raises :class:`KernelBuildError`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise KernelBuildError("no C++ compiler was found; install g++ or clang++, or set CXX to one") from error


@functools.cache
def _identity(cxx: str, flags: tuple[str, ...]) -> str:
    """The compiler's predefined macros under ``flags``: version, architecture and instruction set."""
    return _run([cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull], Path(os.devnull))


def load_library(source: str, isa: str = "native") -> tuple[ctypes.CDLL, Path]:
    """The library of ``source`` and its file, built for ``isa`` (a key of :data:`ISA_FLAGS`); errors as :func:`built`."""
    library = built(source, FLAGS + ISA_FLAGS[isa])
    return ctypes.CDLL(str(library)), library


def built(source: str, flags: tuple[str, ...]) -> Path:
    """The library of ``source``, compiled with ``flags`` unless the cache has it.

    Safe against other processes building the same. Raises :class:`KernelBuildError` with the command, the source file
    and the compiler's words.
    """
    cxx = compiler()
    key = hashlib.sha256("\0".join((source, cxx, *flags, _identity(cxx, flags))).encode()).hexdigest()[:32]
    folder = cache_dir()
    library = folder / f"{key}.so"
    if not _intact(library):
        from filelock import FileLock

        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{key}.lock"):
                if not _intact(library):
                    _build(source, cxx, flags, library)
        except OSError as error:
            raise KernelBuildError(f"cannot write compiled kernels to {folder}: {error}; set QCOMPILE_CACHE_DIR to a folder "
                                   "that can be written") from error  # fmt: skip
    return library


def _intact(library: Path) -> bool:
    try:
        return library.with_suffix(".sha256").read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return False


def _build(source: str, cxx: str, flags: tuple[str, ...], library: Path) -> None:
    """Compiles into a temporary folder and moves checksum and library into place; the source stays for debuggers."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        text, built, checksum = (Path(scratch) / f"kernel{suffix}" for suffix in (".cpp", ".so", ".sha256"))
        text.write_text(source)
        os.replace(text, library.with_suffix(".cpp"))
        _run([cxx, *flags, str(library.with_suffix(".cpp")), "-o", str(built)], library.with_suffix(".cpp"))
        checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.replace(checksum, library.with_suffix(".sha256"))
        os.replace(built, library)


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
