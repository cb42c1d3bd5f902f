"""qcompile: a quantizing backend for ``torch.compile``.

``torch.compile(model, backend="qcompile")`` needs no import of this package; these names are for those who look inside,
choose formats, or quantize ahead of time. Importing touches no GPU, no disk and no compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocation import search
    from .api import calibrate, explain, quantize_
    from .bisection import bisect
    from .calibration import Calibration
    from .calibration_peak import CalibrationMemory, calibration_memory
    from .checkpoints.hf import QCompileConfig
    from .checkpoints.load import load
    from .checkpoints.save import save
    from .comparison import compare
    from .deployment import package
    from .evaluation import evaluate
    from .formats import ROW, Codebook, FormatSpec, Plane, Scheme, register_format, symbols
    from .kv_cache import KVCache
    from .memory import MemoryPlan, memory_plan
    from .paged_cache import PagedKVCache
    from .parallel import parallelize_module
    from .passes.convert import restore_
    from .plan import Plan
    from .policy import Policy
    from .tensor import QuantizedTensor
    from .warm import warmup

_HOMES = {
    "calibrate": "api", "Calibration": "calibration",
    "calibration_memory": "calibration_peak", "CalibrationMemory": "calibration_peak",
    "explain": "api", "quantize_": "api", "restore_": "passes.convert", "Plan": "plan", "Policy": "policy",
    "package": "deployment", "parallelize_module": "parallel", "memory_plan": "memory", "MemoryPlan": "memory",
    "compare": "comparison", "evaluate": "evaluation", "search": "allocation", "bisect": "bisection", "warmup": "warm",
    "QuantizedTensor": "tensor", "KVCache": "kv_cache", "PagedKVCache": "paged_cache",
    "load": "checkpoints.load", "save": "checkpoints.save", "QCompileConfig": "checkpoints.hf",
    **dict.fromkeys(("ROW", "Codebook", "FormatSpec", "Plane", "Scheme", "register_format", "symbols"), "formats"),
}  # fmt: skip

__all__ = ["Calibration", "CalibrationMemory", "Codebook", "FormatSpec", "KVCache", "MemoryPlan", "PagedKVCache", "Plan",
           "Plane", "Policy", "QCompileConfig", "QuantizedTensor", "ROW", "Scheme", "bisect", "calibrate", "calibration_memory",
           "compare", "evaluate", "explain", "load", "memory_plan", "package", "parallelize_module", "quantize_",
           "register_format", "restore_", "save", "search", "symbols", "warmup"]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
