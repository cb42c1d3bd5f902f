"""Calls from Python into compiled kernels at the price of a C function: ``include/call.cpp``, built once on a machine."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import sysconfig
import threading
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import KernelBuildError
from .cpp_build import built

FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w")

HAS_CALLBACKS = "_ZN2at12hasCallbacksEv"
"""``at::hasCallbacks()``: whether a profiler or another observer listens."""


def flags() -> tuple[str, ...]:
    """Those of the compiler for ``call.cpp``, which needs Python's headers."""
    return (*FLAGS, f"-I{sysconfig.get_path('include')}")


def source() -> str:
    """The whole C++ of the module."""
    return "\n".join((resources.files(__package__) / "include" / name).read_text() for name in ("layer.h", "call.cpp"))


_lock = threading.Lock()


def caller() -> ModuleType:
    """The module whose ``linear`` calls a kernel's ``qc_linear``; see ``include/call.cpp`` for its arguments.

    Raises :class:`KernelBuildError` when it does not compile, also for want of Python's headers.
    """
    with _lock:  # kernels are compiled in several threads, and each needs it
        return _caller()


@functools.cache
def _caller() -> ModuleType:
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").exists():
        raise KernelBuildError(f"Python.h is not in {headers}, which kernels for CPUs (and Inductor) need; install Python's "
                               "development files (Debian: python3-dev)")  # fmt: skip
    path = built(source(), flags())
    loader = importlib.machinery.ExtensionFileLoader("call", str(path))
    spec = importlib.util.spec_from_loader("call", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    guards: Any = torch._C._dynamo.guards
    profiler: Any = torch._C._profiler
    module.connect(guards._torchinductor_pyobject_tensor_data_ptr, _address("torch_get_num_threads"), _address(HAS_CALLBACKS),
                   profiler._RecordFunctionFast)  # fmt: skip
    return module


def _address(symbol: str) -> int | None:
    """Of a function in the libraries that torch has loaded."""
    return ctypes.cast(getattr(ctypes.CDLL(torch._C.__file__), symbol), ctypes.c_void_p).value
