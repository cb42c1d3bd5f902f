"""``qcompile doctor``: what is here, what will run fast, what will not, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__
from .codegen.cpp_build import compiler
from .errors import KernelBuildError, nearest
from .store import the_store
from .store.entry import Entry
from .target import of
from .variables import VARIABLES

TORCH_RANGE = ((2, 11), (2, 14))
"""The first release of torch that works, and the first that is not known to."""

GOOD, SLOW, BROKEN = "ok", "slow", "broken"


@dataclass(frozen=True)
class Finding:
    """One line: ``what`` was looked at, what was ``found``, its ``state`` (:data:`GOOD`, :data:`SLOW`, :data:`BROKEN`), and
    what follows or helps."""

    what: str
    found: str
    state: str = GOOD
    advice: str = ""


def examine() -> list[Finding]:
    """Everything, in the order that it is printed. Compiles nothing."""
    return [*_versions(), *_registration(), *_cpu(), *_gpus(), *_toolchain(), _cache(), *_variables()]


def _versions() -> Iterator[Finding]:
    yield Finding("qcompile", f"{__version__}, Python {platform.python_version()}")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, version)) for version in TORCH_RANGE)
    inside = TORCH_RANGE[0] <= release < TORCH_RANGE[1]
    advice = "" if inside else f"install one from {low} to below {high}"
    yield Finding("torch", torch.__version__, GOOD if inside else BROKEN, advice)
    for name in ("triton", "transformers"):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            missed = name == "triton" and torch.cuda.is_available()
            advice = "kernels for GPUs need it" if missed else "not needed here"
            yield Finding(name, "not installed", BROKEN if missed else GOOD, advice)


def _registration() -> Iterator[Finding]:
    from torch._dynamo.backends.registry import list_backends

    known = "qcompile" in list_backends()
    yield Finding('backend "qcompile"', "registered" if known else "not found", GOOD if known else BROKEN,
                  "" if known else "the installed package has no entry points; install it with pip")  # fmt: skip
    hooks = [p.name for p in importlib.metadata.entry_points(group="torch.backends")]
    logs = "qcompile" in hooks and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"
    yield Finding("TORCH_LOGS", "knows qcompile" if logs else "does not know qcompile", GOOD,
                  "" if logs else "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or install the package again")  # fmt: skip


def _cpu() -> Iterator[Finding]:
    isa = of(torch.device("cpu")).arch
    wide = "AVX512" in isa
    yield Finding("CPU", f"{isa}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", GOOD if wide else SLOW,
                  "" if wide else "kernels run with narrower vectors than AVX-512 has; several times slower")  # fmt: skip
    if torch.get_num_threads() > (os.cpu_count() or 1):
        yield Finding("threads", f"{torch.get_num_threads()} on {os.cpu_count()} cores", SLOW, "set OMP_NUM_THREADS to the cores")
    vnni = torch.cpu._is_vnni_supported()
    yield Finding("int8 dot products", "VNNI" if vnni else "none", GOOD if vnni else SLOW,
                  "" if vnni else "policies with _dynamic gain little: activations in int8 need VNNI")  # fmt: skip


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none")
    for index in range(torch.cuda.device_count()):
        target = of(torch.device("cuda", index))
        name = f"{torch.cuda.get_device_name(index)}, sm_{target.arch}"
        if int(target.arch) < 80:
            yield Finding(f"GPU {index}", name, SLOW, "kernels are tuned for sm_80 and later")
        else:
            units = "multiplies fp8" if target.computes_fp8 else "multiplies no fp8: the default policy is int8"
            yield Finding(f"GPU {index}", name, GOOD, units)


def _toolchain() -> Iterator[Finding]:
    try:
        yield Finding("C++ compiler", compiler())
    except KernelBuildError as error:
        yield Finding("C++ compiler", "none", BROKEN, str(error))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    yield Finding("Python's headers", str(headers) if headers.exists() else "not found", GOOD if headers.exists() else BROKEN,
                  "" if headers.exists() else "install Python's development files (Debian: python3-dev)")  # fmt: skip


def _cache() -> Finding:
    store = the_store()
    existing = next(p for p in (store.root, *store.root.parents) if p.exists())
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return Finding("cache", str(store.root), SLOW, "it cannot be written, so everything is made again by each process; set "
                       "QCOMPILE_CACHE_DIR to a folder that can")  # fmt: skip
    sizes = [entry.nbytes for _, entry in store.entries() if isinstance(entry, Entry)]
    return Finding("cache", f"{store.root}: {len(sizes)} entries, {sum(sizes) / 1e6:.1f} MB of {store.bound / 1e6:.0f}")


def _variables() -> Iterator[Finding]:
    for name in sorted(n for n in os.environ if n.startswith("QCOMPILE_")):
        if name in VARIABLES:
            yield Finding(name, os.environ[name], GOOD, VARIABLES[name])
        else:
            yield Finding(name, os.environ[name], BROKEN, f"qcompile reads no such variable. {nearest(name, VARIABLES)}")
