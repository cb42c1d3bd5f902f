"""``qcompile.package``: a quantized model as one file that runs without Python's part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import ops
from .api import quantize_
from .errors import OptionError, PackageError
from .names import module_name
from .owners import unwrapped


def package(
    model: nn.Module, args: Sequence[Any], path: str | Path, *, policy: Any = None, kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None, inductor: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Packs ``model`` under ``policy`` in place, as :func:`qcompile.quantize_` does, and writes what
    ``model(*args, **kwargs)`` computes to ``path`` (``….pt2``), which is returned: one library with weights and kernels.

    ``torch._inductor.aoti_load_package(path)`` loads it, in a process that knows nothing of qcompile; so does C++
    (``AOTIModelPackageLoader``). Gradients are off, and the model's mode (``eval()``) is kept. ``dynamic_shapes``: sizes that may
    change, as ``torch.export.export`` takes them. ``inductor``: further settings of ``torch._inductor.config``. Code is for this
    machine's instruction set, as all of Inductor's. Inputs and outputs should be tensors and containers of Python: other classes
    must be known where the package is loaded.

    Raises :class:`~qcompile.errors.PackageError` naming a layer that has no kernel in C++ (models on GPUs, packed KV caches,
    attention in low precision), ``OptionError`` for another file name, ``PolicyError`` for a bad policy.
    """
    from torch._inductor import aoti_compile_and_package

    target, named = Path(path), dict(kwargs or {})
    if target.suffix != ".pt2":
        raise OptionError(f"package: a package is a file that ends in .pt2, found {str(path)!r}; name it {target.stem}.pt2")
    target.parent.mkdir(parents=True, exist_ok=True)
    quantize_(model, *args, policy=policy, **named)
    with torch.no_grad():
        program = unwrapping(torch.export.export(unwrapped(model), tuple(args), named, dynamic_shapes=dynamic_shapes))
    check(program)
    return Path(aoti_compile_and_package(program, package_path=str(target), inductor_configs=dict(inductor or {})))


def unwrapping(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` over planes, in place of packed parameters; its other operators stay."""
    return program.run_decompositions({})


def check(program: torch.export.ExportedProgram) -> None:
    """Raises :class:`PackageError` for the first operator of ours in ``program`` that has no kernel in C++."""
    from .aoti import check as check_operator

    schemes = {ops.linear: 3, ops.rows: 2, ops.decode: 1}
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "qcompile":
            continue
        layer, name = module_name(node) or "a layer", node.target._schema.name.partition("::")[2]
        if node.target not in schemes:
            raise PackageError(f"package: {layer} computes qcompile.{name}, which has no kernel in C++; leave out kv_cache, and "
                               "rules for attention")  # fmt: skip
        floats = [n.meta["val"] for n in (node.args[0], node.args[2]) if n is not None] if name == "linear" else []
        device = node.meta["val"].device
        check_operator(name, node.args[schemes[node.target]], device, [t.dtype for t in floats], layer)
