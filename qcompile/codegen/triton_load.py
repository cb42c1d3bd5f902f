"""Writes a generated module under the hash of its text and imports it: the one place where Triton is imported."""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import KernelBuildError
from ..store import the_store

PREFIX = "qcompile_triton_"


def content_hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@functools.cache
def load(source: str) -> ModuleType:
    """The module of ``source``. The file appears whole (``os.replace``), so processes may race for it.

    Raises :class:`~qcompile.errors.KernelBuildError` when Triton is not installed or the folder cannot be written.
    """
    name = PREFIX + content_hash(source)
    try:
        import triton  # noqa: F401  (imported here to tell a missing package from a broken module)
    except ImportError as error:
        raise KernelBuildError(f"CUDA kernels need the package triton, which does not import here ({error}); "
                               "install triton 3.6 or later, or run on the CPU") from error  # fmt: skip
    if interpreting():
        from .triton_interpreter import correct

        correct()
    path = _written(f"{name}.py", source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton reads the source of a kernel through its module
    spec.loader.exec_module(module)
    return module


def _written(name: str, source: str) -> Path:
    """A file of ``source`` in the store's folder, or a temporary one that lives as long as this process: Triton and debuggers
    read a kernel's lines from it. Raises :class:`~qcompile.errors.KernelBuildError` when neither can be written."""
    path = the_store().folder("modules") / name
    try:
        write(path, source)
    except OSError:
        try:
            path = Path(tempfile.mkdtemp(prefix="qcompile-")) / name
            write(path, source)
        except OSError as error:
            raise KernelBuildError(f"cannot write the generated kernel {path} ({error}); set QCOMPILE_CACHE_DIR or TMPDIR to a "
                                   "folder that can be written") from error  # fmt: skip
        atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    return path


def write(path: Path, source: str) -> None:
    """Writes ``source`` to ``path`` atomically, unless the file holds it already."""
    if path.exists() and path.read_text() == source:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(descriptor, "w") as file:
        file.write(source)
    os.replace(temporary, path)


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU in this process (``TRITON_INTERPRET``, read when Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


LINES = re.compile(r"^\s*\.(?:loc|file)\b[^\n]*\n|^\s*\.section\s+\.debug[\s\S]*", re.MULTILINE)
"""What assembly says of source lines, up to the debugging sections at its end."""


def assembly(compiled: Any) -> tuple[str, str] | None:
    """(name with constants, warps and target, text without line numbers) of what Triton compiled; None if it has none."""
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn")
    if text is None:
        return None
    names, constants = compiled.src.fn.arg_names, compiled.src.constants
    shown = [f"{names[at]}={value}" for (at, *_), value in sorted(constants.items()) if isinstance(value, (bool, int))]
    metadata = compiled.metadata
    label = f"{metadata.name} for {metadata.target.arch}: {metadata.num_warps} warps, {', '.join(shown)}"
    return label, LINES.sub("", text)


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
