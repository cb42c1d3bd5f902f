"""How Inductor lowers packed linear layers on CPUs: to a direct call of the compiled kernel.

A custom operator costs 9 µs a call: the dispatcher, Python, checks, the allocation of its result. Here Inductor plans the
result's memory with everything else, the checks are made once, and its generated code calls the C function itself. So does the
C++ of a package of AOTInductor (:mod:`qcompile.aoti`).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import V

from . import aoti, ops
from .codegen.cpp import DTYPES
from .formats import FormatSpec, register_scheme, scheme_of
from .formats.spec import TILE_N
from .names import module_name

aten = torch.ops.aten
Node = Any
"""A tensor of Inductor's IR."""


def install() -> None:
    """Registers the lowering with Inductor, once in a process."""
    lowered: dict[Any, Any] = {ops.linear: _linear, ops.grouped_linear: _grouped, ops.rows: aoti.rows, ops.decode: aoti.decode}
    for operator, function in lowered.items():
        if operator not in lowering.lowerings:
            lowering.register_lowering(operator, type_promotion_kind=None)(function)


def keyed(gm: torch.fx.GraphModule | None = None) -> AbstractContextManager[None]:
    """While Inductor compiles ``gm``: its caches keep what was compiled by other versions of this lowering apart, and what
    was compiled for modules of other names, which are written into the code for profilers."""
    config: Any = torch.compiler.config
    names = "\n".join(map(module_name, gm.graph.nodes)) if gm is not None else ""
    tag = f"{config.cache_key_tag}qcompile {_version()} {hashlib.sha256(names.encode()).hexdigest()[:16]}"
    tagged: AbstractContextManager[None] = config.patch(cache_key_tag=tag)
    return tagged


@functools.cache
def _version() -> str:
    files = (Path(__file__), Path(aoti.__file__), Path(__file__).parent / "codegen" / "include" / "call.cpp")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def linear_function(key: str) -> int:
    """The address of ``qc_linear`` for a scheme key; generated code asks for it when it is loaded."""
    return aoti.kernels_of(key).address


def _linear(x: Node, planes: Sequence[Node], bias: Node | None, scheme: str, n: int) -> Node:
    spec = scheme_of(scheme).format
    dtypes = [t.get_dtype() for t in (x, bias) if t is not None]
    direct = x.get_device().type == "cpu" and all(dtype in DTYPES for dtype in dtypes) and not V.graph.cpp_wrapper
    if V.graph.aot_mode:
        aoti.check("linear", scheme, x.get_device(), dtypes, module_name(V.graph.current_node))
    elif not direct:
        if spec.scaled and not spec.permuted:
            scheme, x = register_scheme(replace(scheme_of(scheme), format=spec.plain)), _scaled(spec, x, planes)
            planes = planes[: len(spec.parts)]
        return lowering.fallback_handler(ops.linear, add_to_fallback_set=False)(x, planes, bias, scheme, n)
    *lead, k = x.get_size()
    flat = lowering.view(x, [math.prod(lead), k])
    made = PackedLinear.create(_scaled(spec, flat, planes), planes[: len(spec.parts) + spec.permuted], bias, scheme, n)
    return lowering.view(made, [*lead, n])


def _grouped(x: Node, planes: Sequence[Node], groups: Node, ends: bool, scheme: str, experts: int, n: int) -> Node:
    if V.graph.aot_mode:
        aoti.check("grouped_linear", scheme, x.get_device(), (x.get_dtype(),), module_name(V.graph.current_node))
    if x.get_device().type != "cpu" or x.get_dtype() not in DTYPES or V.graph.cpp_wrapper:
        handler = lowering.fallback_handler(ops.grouped_linear, add_to_fallback_set=False)
        return handler(x, planes, groups, ends, scheme, experts, n)
    return PackedExperts.create(x, planes, groups, ends, scheme, experts, n)


def _scaled(spec: FormatSpec, x: Node, planes: Sequence[Node]) -> Node:
    """``x [..., K]`` times the factors of columns, as pointwise IR, which Inductor fuses into what makes x."""
    if not spec.scaled:
        return x
    return lowering.to_dtype(lowering.lowerings[aten.mul.Tensor](x, planes[-1]), x.get_dtype())


class PackedLinear(ir.ExternKernelOut):
    """``x [M, K]``, rows apart by any stride, times a packed N×K weight, plus a bias: ``[M, N]``."""

    @classmethod
    def create(cls, x: Node, planes: Sequence[Node], bias: Node | None, key: str, n: int) -> Node:
        x = _rows_of(cls, x)
        (m, k), dtype = x.get_size(), x.get_dtype()
        k = V.graph.sizevars.guard_int(k)
        inputs = [x, *(cls.require_contiguous(cls.realize_input(t)) for t in (*planes, *([] if bias is None else [bias])))]
        bias_dtype = 0 if bias is None else DTYPES[bias.get_dtype()]
        numbers = (bias is not None, DTYPES[dtype], bias_dtype, m, n, k, aoti.kernels_of(key).padded(n, k), x.get_stride()[0])
        layout = ir.FixedLayout(x.get_device(), dtype, [m, n])
        constants = (key, profiled_name(key, V.graph.current_node), *numbers)
        made = cls(layout, inputs, constants, op_overload=ops.linear, python_kernel_name="qcompile_linear")
        return ir.TensorBox.create(made)

    def codegen(self, wrapper: Any) -> None:
        key, name, has_bias, *numbers = self.constant_args
        self.codegen_comment(wrapper)
        if V.graph.aot_mode:
            aoti.write_linear(self, wrapper, key, has_bias, numbers)
            return
        function = _imported(wrapper, key, "linear")
        x, *rest = map(aoti.start_of, self.inputs)
        planes, bias = (rest[:-1], rest[-1]) if has_bias else (rest, "None")
        sizes = map(wrapper.codegen_python_sizevar, numbers)
        arguments = (function, self.codegen_reference(), x, bias, *sizes, *planes, repr(name))
        wrapper.writeline(f"qcompile_linear({', '.join(arguments)})")


class PackedExperts(ir.ExternKernelOut):
    """``x [T, K]`` by the experts that ``groups`` gives its rows to, each a packed N×K weight: ``[T, N]``."""

    @classmethod
    def create(cls, x: Node, planes: Sequence[Node], groups: Node, ends: bool, key: str, experts: int, n: int) -> Node:
        x = _rows_of(cls, x)
        (m, k), dtype = x.get_size(), x.get_dtype()
        k, rows = V.graph.sizevars.guard_int(k), -(-n // TILE_N) * TILE_N
        groups, *planes = (cls.require_contiguous(cls.realize_input(t)) for t in (groups, *planes))
        spec, wide = scheme_of(key).format, groups.get_dtype() == torch.int64
        sizes = [math.prod(spec.part_shape(p, rows, k)) * p.dtype.itemsize for p in spec.parts]
        numbers = (DTYPES[dtype], wide, ends, m, experts, n, k, aoti.kernels_of(key).padded(rows, k), x.get_stride()[0])
        layout = ir.FixedLayout(x.get_device(), dtype, [m, n])
        constants = (key, profiled_name(key, V.graph.current_node), sizes, *numbers)
        made = cls(layout, [x, groups, *planes], constants, op_overload=ops.grouped_linear, python_kernel_name="qcompile_grouped")
        return ir.TensorBox.create(made)

    def codegen(self, wrapper: Any) -> None:
        key, name, sizes, *numbers = self.constant_args
        function = _imported(wrapper, key, "grouped")
        x, groups, *planes = map(aoti.start_of, self.inputs)
        self.codegen_comment(wrapper)
        arguments = (function, self.codegen_reference(), x, groups, *map(wrapper.codegen_python_sizevar, map(_as_int, numbers)),
                     *planes, *map(str, sizes), repr(name))  # fmt: skip
        wrapper.writeline(f"qcompile_grouped({', '.join(arguments)})")


def _as_int(number: Any) -> Any:
    """Booleans as C takes them; sizes may be symbols."""
    return int(number) if isinstance(number, bool) else number


def _rows_of(kernel: type[ir.ExternKernelOut], x: Node) -> Node:
    """``x`` in memory, elements of a row one after the other."""
    x = kernel.require_stride_order(kernel.realize_input(x), [1, 0])
    if x.get_stride()[1] != 1:
        x = kernel.copy_input(x)
        x.freeze_layout()
    return x


def _imported(wrapper: Any, key: str, call: str) -> str:
    """Has generated code import ``qcompile_{call}`` and the kernel of a scheme; the name of that."""
    function = f"qcompile_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    wrapper.add_import_once("from qcompile.codegen.cpp_call import caller as qcompile_caller")
    wrapper.add_import_once("from qcompile.inductor import linear_function as qcompile_function")
    wrapper.add_import_once(f"qcompile_{call} = qcompile_caller().{call}")
    wrapper.add_import_once(f"{function} = qcompile_function({key!r})")
    return function


def profiled_name(key: str, node: torch.fx.Node | None) -> str:
    """What profilers show of a call: the format and the layer, as ``"qcompile::linear int8 layers.0.mlp.up_proj"``."""
    layer = module_name(node) if node is not None else ""
    return f"qcompile::linear {scheme_of(key).label} {layer}".strip()
