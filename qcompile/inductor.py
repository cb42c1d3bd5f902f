"""How Inductor lowers packed linear layers on CPUs: to a direct call of the compiled kernel, one for those that share an input.

A custom operator costs 9 µs a call: the dispatcher, Python, checks, the allocation of its result. Here Inductor plans the
result's memory with everything else, the checks are made once, and its generated code calls the C function itself. So does the
C++ of a package of AOTInductor (:mod:`qcompile.aoti`). Query, key and value, or gate and up, are one call: their input is
prepared once, and threads meet once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import V

from . import aoti, ops
from .codegen import cpp_call
from .codegen.cpp import DTYPES
from .codegen.cpp_many import FEWEST, Product
from .formats import FormatSpec, register_scheme, scheme_of
from .formats.spec import TILE_N
from .names import module_name

aten = torch.ops.aten
Node = Any
"""A tensor of Inductor's IR."""


def install() -> None:
    """Registers the lowering with Inductor, whose caches keep apart from then on what other versions of qcompile compiled: also
    for packed weights under another backend, and in backwards, which are compiled later. Once in a process."""
    lowered: dict[Any, Any] = {ops.linear: _linear, ops.grouped_linear: _grouped, ops.rows: aoti.rows, ops.decode: aoti.decode}
    for operator, function in lowered.items():
        if operator not in lowering.lowerings:
            lowering.register_lowering(operator, type_promotion_kind=None)(function)
    config: Any = torch.compiler.config
    if (version := f"qcompile {_version()}") not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {version}".strip()


def keyed(gm: torch.fx.GraphModule | None = None) -> AbstractContextManager[None]:
    """While Inductor compiles ``gm``, after :func:`install`: its caches keep apart what was compiled for modules of other names,
    which are written into the code for profilers."""
    config: Any = torch.compiler.config
    names = "\n".join(map(module_name, gm.graph.nodes)) if gm is not None else ""
    tag = f"{config.cache_key_tag} {hashlib.sha256(names.encode()).hexdigest()[:16]}"
    tagged: AbstractContextManager[None] = config.patch(cache_key_tag=tag)
    return tagged


@functools.cache
def _version() -> str:
    """Of all that decides how a graph is traced and lowered: what operators and tensors do, gradients, the C++ of calls."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here / "formats").glob("*.py")])
    digest = hashlib.sha256(cpp_call.source().encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def linear_function(key: str) -> int:
    """The address of ``qc_linear`` for a scheme key; generated code asks for it when it is loaded."""
    return aoti.kernels_of(key).address


def linear_call(key: str) -> Callable[..., Any]:
    """What takes the arguments of a product by weights of a scheme key, of any number of rows."""
    return aoti.kernels_of(key).call


def _linear(x: Node, planes: Sequence[Node], bias: Node | None, scheme: str, n: int) -> Node:
    spec, node = scheme_of(scheme).format, V.graph.current_node
    lowered: dict[torch.fx.Node, Node] = vars(V.graph).setdefault("_qcompile_lowered", {})
    if node in lowered:  # with another one, before
        return lowered.pop(node)
    dtypes = [t.get_dtype() for t in (x, bias) if t is not None]
    direct = x.get_device().type == "cpu" and all(dtype in DTYPES for dtype in dtypes) and not V.graph.cpp_wrapper
    if V.graph.aot_mode:
        aoti.check("linear", scheme, x.get_device(), dtypes, module_name(node))
    elif not direct:
        if spec.scaled and not spec.permuted:
            scheme, x = register_scheme(replace(scheme_of(scheme), format=spec.plain)), _scaled(spec, x, planes)
            planes = planes[: len(spec.parts)]
        return lowering.fallback_handler(ops.linear, add_to_fallback_set=False)(x, planes, bias, scheme, n)
    *lead, k = x.get_size()
    flat = lowering.view(x, [math.prod(lead), k])
    nodes = together(node, V.graph.env)
    layers = [Layer.of(each, V.graph.env, len(spec.parts) + spec.permuted) for each in nodes]
    made = PackedLinear.create(_scaled(spec, flat, planes), layers, scheme, profiled_name(scheme, nodes))
    lowered |= {each: lowering.view(y, [*lead, layer.n]) for each, layer, y in zip(nodes, layers, made, strict=True)}
    return lowered.pop(node)


def together(node: torch.fx.Node, known: Mapping[torch.fx.Node, Any]) -> list[torch.fx.Node]:
    """``node``, a call of ``ops.linear``, and those after it that one call of its kernel computes as well: of the same input and
    scheme, with the same factors and order of columns, planes and bias being ``known``. The next product by a packed weight that
    takes another input ends the search: what is computed is then soon needed, and memory does not grow.
    """
    x, planes, _, scheme, _ = _arguments(node)
    parts, found = len(scheme_of(scheme).format.parts), [node]
    for other in itertools.takewhile(lambda n: n.op != "output", _after(node)):
        if other.target is not ops.linear:
            continue
        own_x, own_planes, bias, own_scheme, _ = _arguments(other)
        if _source(own_x) != _source(x):
            break
        same = own_scheme == scheme and own_planes[parts:] == planes[parts:]
        if same and all(t in known for t in own_planes) and (bias is None or bias in known and known[bias].get_dtype() in DTYPES):
            found.append(other)
    return found


def _arguments(node: torch.fx.Node) -> Any:
    """x, planes, bias, scheme and n of a call of ``ops.linear``."""
    return node.args


def _source(x: torch.fx.Node) -> Any:
    """What decides the value of ``x``: autocast casts one tensor for every layer."""
    return x.args if x.target is torch.ops.prims.convert_element_type.default else x


def _after(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The nodes that follow in the graph."""
    while True:
        node = node.next
        yield node


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


@dataclass(frozen=True)
class Layer:
    """A packed N×K weight that a call multiplies by: its planes, and an order of columns if there is one; its bias ``[N]``."""

    planes: Sequence[Node]
    bias: Node | None
    n: int

    @classmethod
    def of(cls, node: torch.fx.Node, known: Mapping[torch.fx.Node, Node], planes: int) -> Layer:
        """That of ``node``, a call of ``ops.linear``, with the first ``planes`` of its planes."""
        _, nodes, bias, _, n = _arguments(node)
        return cls([known[t] for t in nodes[:planes]], None if bias is None else known[bias], n)


class Beside(ir.ExternKernel):
    """A result of a call that has others, in memory that Inductor plans; it is no operation of its own."""

    def __init__(self, layout: ir.Layout, call: PackedLinear) -> None:
        super().__init__(None, layout, [])
        self.call, self.name = call, V.graph.register_buffer(self)

    def get_defining_op(self) -> PackedLinear:
        return self.call

    def should_allocate(self) -> bool:
        return True


class PackedLinear(ir.ExternKernelOut):
    """``x [M, K]``, rows apart by any stride, times packed N×K weights, plus biases: ``[M, N]`` for each of them."""

    beside: Sequence[Beside] = ()
    """Results of all weights but the first."""

    @classmethod
    def create(cls, x: Node, layers: Sequence[Layer], key: str, name: str) -> list[Node]:
        x = _rows_of(cls, x)
        (m, k), dtype = x.get_size(), x.get_dtype()
        k = V.graph.sizevars.guard_int(k)
        tensors = [t for layer in layers for t in (*layer.planes, *([] if layer.bias is None else [layer.bias]))]
        inputs = [x, *(cls.require_contiguous(cls.realize_input(t)) for t in tensors)]
        vars(V.graph).setdefault(UNCHECKED, []).extend(inputs[1:])
        layouts = [ir.FixedLayout(x.get_device(), dtype, [m, layer.n]) for layer in layers]
        numbers = (DTYPES[dtype], m, k, aoti.kernels_of(key).padded(layers[0].n, k), x.get_stride()[0])
        each = [(len(layer.planes), None if layer.bias is None else DTYPES[layer.bias.get_dtype()], layer.n) for layer in layers]
        made = cls(layouts[0], inputs, (key, name, each, *numbers), op_overload=ops.linear, python_kernel_name="qcompile_linear")
        made.beside = [Beside(layout, made) for layout in layouts[1:]]
        return [ir.TensorBox.create(result) for result in made.get_outputs()]

    def get_outputs(self) -> list[ir.Buffer]:
        return [self, *self.beside]

    def codegen(self, wrapper: Any) -> None:
        key, name, _, *numbers = self.constant_args
        _leave_checks(wrapper)
        self.codegen_comment(wrapper)
        if V.graph.aot_mode:
            aoti.write_linear(wrapper, key, self.inputs[0], self.layers(), numbers)
            return
        function, sizes = _imported(wrapper, key, "linear"), map(wrapper.codegen_python_sizevar, numbers)
        many = isinstance(linear_call(key), Product) and not V.graph.sizevars.statically_known_lt(numbers[1], FEWEST)
        call = _call(wrapper, key, function) if many else "qcompile_linear"
        layers = [str(part) for y, bias, bias_dtype, n, planes in self.layers() for part in
                  (y, bias and aoti.start_of(bias), bias_dtype, n, *map(aoti.start_of, planes))]  # fmt: skip
        arguments = (function, aoti.start_of(self.inputs[0]), *sizes, str(len(self.get_outputs())), *layers, repr(name))
        wrapper.writeline(f"{call}({', '.join(arguments)})")

    def layers(self) -> Iterator[tuple[str | None, Node | None, int, int, list[Node]]]:
        """(name of the result, None if nobody reads it; bias; number of its dtype; N; planes) of each weight."""
        inputs = iter(self.inputs[1:])
        for result, (count, bias_dtype, n) in zip(self.get_outputs(), self.constant_args[2], strict=True):
            planes = list(itertools.islice(inputs, count))
            bias = None if bias_dtype is None else next(inputs)
            y = None if result.get_name() in V.graph.removed_buffers else result.get_name()
            yield y, bias, bias_dtype or 0, n, planes


UNCHECKED = "_qcompile_unchecked"
"""Attribute of Inductor's graph: planes and biases of products."""


def _leave_checks(wrapper: Any) -> None:
    """Takes the checks of planes' sizes, one for each at each call, out of what Inductor has yet to write: class and shape of a
    packed parameter, which Dynamo's guards look at, decide them. Those of the first product are written by then, and in versions
    of Inductor that have no such list all are."""
    pending = getattr(wrapper, "_pending_input_asserts", {})
    for tensor in vars(V.graph).pop(UNCHECKED, ()):
        pending.pop(tensor.get_name(), None)


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
        constants = (key, profiled_name(key, [V.graph.current_node]), sizes, *numbers)
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


def _call(wrapper: Any, key: str, function: str) -> str:
    """Has generated code import what calls the kernel of a scheme for any number of rows; the name of that."""
    wrapper.add_import_once("from qcompile.inductor import linear_call as qcompile_call")
    wrapper.add_import_once(f"{function}_call = qcompile_call({key!r})")
    return f"{function}_call"


def profiled_name(key: str, nodes: Sequence[torch.fx.Node]) -> str:
    """What profilers show of a call: the format and the layers, as ``"qcompile::linear int8 mlp.gate_proj + mlp.up_proj"``."""
    layers = " + ".join(filter(None, map(module_name, nodes)))
    return f"qcompile::linear {scheme_of(key).label} {layers}".strip()
