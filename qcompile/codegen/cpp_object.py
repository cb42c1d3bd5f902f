"""CPU kernels as object files, for libraries that are linked by someone else: AOTInductor's packages."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .cpp_build import FLAGS, ISA_FLAGS, built

OBJECT_FLAGS = tuple("-c" if flag == "-shared" else flag for flag in FLAGS)

FUNCTIONS = ("qc_linear", "qc_rows", "qc_decode", "qc_variant")


def function_name(function: str, key: str) -> str:
    """What ``function`` is called in the object of a scheme's key: objects of many schemes are linked together."""
    return f"{function}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def object_of(source: str, key: str) -> Path:
    """The object file of ``source``, kernels of the scheme with this key, for this machine's instruction set; from the store
    if it holds it. Raises :class:`~qcompile.errors.KernelBuildError`."""
    renamed = "".join(f"#define {name} {function_name(name, key)}\n" for name in FUNCTIONS)
    return built(renamed + source, OBJECT_FLAGS + ISA_FLAGS["native"])
