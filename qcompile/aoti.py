"""What goes of us into a package of AOTInductor: calls in its C++, and the kernels as objects that are linked with it.

A package runs without Python, so nothing of it may be a custom operator: what has no kernel in C++ is an error here.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import V

from . import ops
from .codegen.cpp import DTYPES, CpuKernels
from .codegen.cpp_object import function_name, object_of
from .errors import PackageError
from .formats import scheme_of
from .kernels import Prepared, for_key
from .names import module_name

aten = torch.ops.aten
Node = Any
"""A tensor of Inductor's IR."""

DECLARATIONS = {
    "qc_linear": "int {}(const qcompile::Layer*, int64_t, const void*, int, int, int64_t, int64_t, int64_t, int64_t)",
    "qc_rows": "void {}(void*, const int64_t*, int64_t, int, int, int64_t, int64_t{planes})",
    "qc_decode": "void {}(void*, int, int, int64_t, int64_t, int64_t{planes})",
}  # fmt: skip
"""The kernels' functions; planes are the last parameters."""


def kernels_of(key: str) -> CpuKernels:
    """The compiled kernels of a scheme key, without what is done to inputs before them."""
    found = for_key(key, "cpu")
    return cast(CpuKernels, found.inner if isinstance(found, Prepared) else found)


def start_of(node: Node) -> str:
    """A tensor in generated code that starts where ``node`` does: a view that begins at its buffer's start is not made."""
    return node.get_name() if node.get_layout().offset == 0 else node.codegen_reference()


def declared(wrapper: Any, function: str, key: str) -> str:
    """The name of a kernel's ``function`` in the C++ of ``wrapper``, which then has its declaration, and its object to link."""
    name, known = function_name(function, key), vars(wrapper).setdefault("_qcompile_declared", set())
    if not known:
        for header in ("layer.h", "aoti.h"):
            wrapper.header.splice((resources.files("qcompile.codegen") / "include" / header).read_text())
    if key not in known:
        linked(object_of(kernels_of(key).source, key), key)
    if name not in known:
        planes = ", const void*" * len(scheme_of(key).format.parts)
        wrapper.header.splice(f'extern "C" {DECLARATIONS[function].format(name, planes=planes)};')
    known |= {key, name}
    return name


def linked(built: Path, key: str) -> None:
    """Has AOTInductor link an object into the library that it makes next. Where it takes further objects from is the list that
    its own compilers of kernels fill, and that it empties when it has linked."""
    from torch._inductor.codecache import CUDACodeCache

    path = Path(_folder().name) / f"{function_name('qc', key)}.o"
    if str(path) not in CUDACodeCache.aot_kernels_o:
        shutil.copyfile(built, path)
        CUDACodeCache.aot_kernels_o.append(str(path))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """For objects, which linkers know by their names; until this process ends."""
    return tempfile.TemporaryDirectory(prefix="qcompile-")


def data(node: Node) -> str:
    """The address of a tensor's first element in generated C++."""
    return f"{start_of(node)}.data_ptr()"


def write_linear(wrapper: Any, key: str, x: Node, layers: Iterable[tuple[Any, ...]], numbers: Sequence[Any]) -> None:
    """The call of ``qc_linear`` for x and ``layers``: each the name of its result or None, bias or None, the number of the bias's
    dtype, N, and planes."""
    function = declared(wrapper, "qc_linear", key)
    sizes = map(wrapper.codegen_sizevar, map(sympy.sympify, numbers))
    listed = []
    for y, bias, bias_dtype, n, planes in layers:
        addresses = ", ".join([*map(data, planes), "nullptr"])
        result, bias = "nullptr" if y is None else f"{y}.data_ptr()", "nullptr" if bias is None else data(bias)
        listed.append(f"{{{result}, {bias}, std::initializer_list<const void*>{{{addresses}}}.begin(), {n}, {bias_dtype}}}")
    wrapper.writeline(f"qcompile::linear({', '.join([function, data(x), *sizes])}, {{{', '.join(listed)}}});")


class PackedRows(ir.ExternKernelOut):
    """Rows ``indices [count]`` (int64) of a packed N×K weight: ``[count, K]``. Without indices: the weight, ``[N, K]``."""

    @classmethod
    def create(cls, planes: Sequence[Node], indices: Node | None, key: str, n: int, k: int, dtype: torch.dtype) -> Node:
        inputs = [*planes, *([] if indices is None else [indices])]
        inputs = [cls.require_contiguous(cls.realize_input(t)) for t in inputs]
        rows = n if indices is None else indices.get_size()[0]
        layout = ir.FixedLayout(planes[0].get_device(), dtype, [rows, k])
        constants = (key, indices is not None, rows, n, k, kernels_of(key).padded(n, k), DTYPES[dtype])
        operator = ops.decode if indices is None else ops.rows
        return ir.TensorBox.create(cls(layout, inputs, constants, op_overload=operator, python_kernel_name="qcompile_rows"))

    def codegen(self, wrapper: Any) -> None:
        key, gathers, *numbers = self.constant_args
        rows, n, k, padded, dtype = map(wrapper.codegen_sizevar, map(sympy.sympify, numbers))
        out, inputs = f"{self.codegen_reference()}.data_ptr()", [data(t) for t in self.inputs]
        if gathers:
            *planes, indices = inputs
            function = declared(wrapper, "qc_rows", key)
            leading = [out, f"qcompile::checked({indices}, {rows}, {n})", rows, dtype, "qcompile::threads()", k, padded]
        else:
            planes, function = inputs, declared(wrapper, "qc_decode", key)
            leading = [out, dtype, "qcompile::threads()", n, k, padded]
        self.codegen_comment(wrapper)
        wrapper.writeline(f"{function}({', '.join([*leading, *planes])});")


def rows(planes: Sequence[Node], indices: Node, scheme: str, n: int, k: int, dtype: torch.dtype) -> Node:
    """How ``ops.rows`` is lowered: in packages to a call, else to the operator."""
    if not V.graph.aot_mode:
        return lowering.fallback_handler(ops.rows, add_to_fallback_set=False)(planes, indices, scheme, n, k, dtype)
    shape = indices.get_size()
    flat = lowering.to_dtype(lowering.view(indices, [math.prod(shape)]), torch.int64)
    return lowering.view(_decoded(planes, flat, scheme, n, k, dtype), [*shape, k])


def decode(planes: Sequence[Node], scheme: str, n: int, k: int, dtype: torch.dtype) -> Node:
    """How ``ops.decode`` is lowered, in the same way."""
    if not V.graph.aot_mode:
        return lowering.fallback_handler(ops.decode, add_to_fallback_set=False)(planes, scheme, n, k, dtype)
    return _decoded(planes, None, scheme, n, k, dtype)


def _decoded(planes: Sequence[Node], indices: Node | None, scheme: str, n: int, k: int, dtype: torch.dtype) -> Node:
    spec = scheme_of(scheme).format
    check("rows", scheme, planes[0].get_device(), (), module_name(V.graph.current_node))
    exact = torch.float32 if spec.scaled or dtype not in DTYPES else dtype
    made = PackedRows.create(planes[: len(spec.parts)], indices, scheme, n, k, exact)
    if spec.scaled:
        made = lowering.lowerings[aten.mul.Tensor](made, planes[-1])
    return lowering.to_dtype(made, dtype)


def check(operator: str, scheme: str, device: torch.device, dtypes: Sequence[torch.dtype], layer: str) -> None:
    """Raises :class:`PackageError` naming the layer where an ``operator`` of ours ("linear", "grouped_linear", "rows", "decode")
    on ``device``, x and bias being of ``dtypes``, has no kernel in C++."""
    spec, label = scheme_of(scheme).format, scheme_of(scheme).label
    if device.type != "cpu":
        raise PackageError(f"package: {layer}, in {label}, is on {device}; packages are made for CPUs: move the model to one, or "
                           "use torch.compile")  # fmt: skip
    if any(dtype not in DTYPES for dtype in dtypes):
        found = ", ".join(map(str, dtypes))
        raise PackageError(f"package: x and bias of {layer}, in {label}, must be float32, float16 or bfloat16, found {found}; "
                           "convert the model to one of them")  # fmt: skip
    if operator == "grouped_linear":
        raise PackageError(f"package: {layer}, in {label}, multiplies by a stack of experts, whose calls packages do not have; "
                           "leave it in floating point, or use torch.compile")  # fmt: skip
    if operator != "linear" and spec.permuted:
        raise PackageError(f"package: {layer} decodes rows of {label}, whose columns are in another order; pack it in a format "
                           "without one, or leave it in floating point")  # fmt: skip
