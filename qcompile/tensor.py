"""A quantized weight is a parameter: :class:`QuantizedTensor` holds the planes under the parameter's own name."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from . import handover, ops
from .errors import ShardError, UnsupportedOnTensorError
from .formats import Scheme, find, huge_pages, reference, register_scheme, scheme_of
from .formats.layout import check_planes, matrix_shape


class QuantizedTensor(torch.Tensor):
    """A weight in the format of its class's ``scheme``; behaves as a float tensor of ``dtype`` and ``shape``.

    There is one subclass for each scheme and orientation (:func:`tensor_class`), so type, shape and dtype alone decide
    the shapes of all planes. ``transposed`` classes present the weight as ``[K, N]`` (GPT-2's Conv1D, ``.t()``); planes
    are always those of the ``[N, K]`` weight. With three dimensions it is a stack of matrices, a layer's experts:
    ``[E, N, K]``, or ``[E, K, N]`` if transposed. ``dtype`` is what :meth:`dequantize` gives. Not differentiable itself;
    operators on it have gradients for their float inputs.
    """

    scheme: ClassVar[Scheme]
    key: ClassVar[str]
    transposed: ClassVar[bool]
    apart: bool = False
    """Whether it is a slice that shares no memory with what it was cut from."""

    @staticmethod
    def __new__(
        cls: type[QuantizedTensor], planes: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> QuantizedTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=planes[0].device)
        for name, tensor in zip(cls.scheme.format.part_names, planes, strict=True):
            setattr(made, f"_{name}", tensor)
        return made

    @property
    def nk(self) -> tuple[int, int]:
        """(N, K): output and input features; of each matrix of a stack."""
        rows, cols = self.shape[-2:]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(rows, K) of the one matrix that the planes are laid out as; see :func:`~qcompile.formats.layout.matrix_shape`."""
        return matrix_shape(self.shape, self.transposed)

    @property
    def planes(self) -> list[torch.Tensor]:
        """The stored planes in spec order; see :mod:`qcompile.formats.layout` for their shapes."""
        if not torch.compiler.is_dynamo_compiling():
            handover.settle()  # else what is done to planes could be done to those that another thread is replacing
        return [getattr(self, f"_{name}") for name in self.scheme.format.part_names]

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the planes, padding included."""
        return sum(p.nbytes for p in self.planes)

    def own_planes_(self) -> None:
        """Copies planes that are mapped from a file into memory of their own, which starts at a cache line; compiled code may
        read them meanwhile."""
        for name in self.scheme.format.part_names:
            setattr(self, f"_{name}", huge_pages.copy(getattr(self, f"_{name}")))

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The float tensor of this shape and dtype that the planes stand for."""
        weight = ops.decode(self.planes, self.key, *self.stored_shape, self.dtype)
        if self.dim() == 3:
            weight = weight.unflatten(0, (self.shape[0], -1))[:, : self.nk[0]]
        return weight.mT if self.transposed else weight

    def with_planes(
        self, planes: Sequence[torch.Tensor], shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedTensor:
        """A tensor of this class over other ``planes``."""
        return type(self)(planes, self.shape if shape is None else shape, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype]]:
        return [f"_{name}" for name in self.scheme.format.part_names], (self.dtype,)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], ctx: tuple[torch.dtype], outer_size: Sequence[int], outer_stride: object
    ) -> QuantizedTensor:
        return cls([inner[f"_{name}"] for name in cls.scheme.format.part_names], outer_size, ctx[0])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .experts import NAMED
        from .tensor_ops import FUNCTIONS

        found = FUNCTIONS.get(func) or NAMED.get(getattr(func, "_qualified_op_name", ""))
        if found is not None:
            return found(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .experts import implementation
        from .tensor_ops import ATEN

        found = implementation(func, args) or ATEN.get(func)
        if found is None:
            raise UnsupportedOnTensorError(
                f"{func} is not defined on a weight packed as {cls.scheme.label}; call .dequantize() for a float tensor, "
                "or leave this layer in float by a policy rule"
            )
        return found(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            copied = self.with_planes([p.clone() for p in self.planes])
            memo[id(self)] = as_parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (self.key, self.transposed, self.planes, tuple(self.shape), self.dtype, is_parameter)

    def _stable_hash_for_caching(self) -> str:
        """Everything that decides a compiled graph: scheme with the format's fingerprint, orientation, shape, dtype, device."""
        text = repr((self.key, self.transposed, tuple(self.shape), self.dtype, self.device))
        return hashlib.sha256(text.encode()).hexdigest()

    def fsdp_pre_all_gather(
        self, mesh: Any, size: torch.Size, stride: Any, module: torch.nn.Module, policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.dtype, torch.Size]]:
        """What FSDP2 gathers of this process's rows: their planes (Zhao et al., "PyTorch FSDP", 2023). Raises
        :class:`~qcompile.errors.ShardError` where a tile of 16 rows or a block would lie in two processes."""
        spec, parts = self.scheme.format, mesh.size()
        if self.transposed or size[0] % (parts * spec.row_multiple):
            kind = f"stored as {list(size)}, input features first," if self.transposed else f"of {size[0]} rows"
            raise ShardError(f"fully_shard: a {self.scheme.label} weight {kind} cannot be divided among {parts} processes; each "
                             f"must get a multiple of {spec.row_multiple} rows: leave it out by ignored_params")  # fmt: skip
        return tuple(self.planes), (self.dtype, size)

    def fsdp_post_all_gather(
        self, planes: tuple[torch.Tensor, ...], kept: tuple[torch.dtype, torch.Size], dtype: torch.dtype, *,
        out: torch.Tensor | None = None,
    ) -> tuple[QuantizedTensor, tuple[torch.Tensor, ...]] | None:  # fmt: skip
        """The whole weight over gathered ``planes``, and what holds its memory; None where ``out`` is over them already."""
        if out is not None:
            return None
        parts, columns = planes[: len(self.scheme.format.parts)], planes[len(self.scheme.format.parts) :]
        each = [c[: kept[1][1]] for c in columns]  # every process has them whole
        return self.with_planes([*parts, *each], kept[1], kept[0]), planes

    def share_memory_(self) -> QuantizedTensor:
        for plane in self.planes:
            plane.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(p.is_shared() for p in self.planes)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor({self.scheme.label}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
        )


_CLASS_NAME = re.compile(r"Quantized_(?P<format>\w+?)(?P<activations>__act_(int8|fp8))?(?P<transposed>__t)?")


def tensor_class(scheme: Scheme, transposed: bool = False) -> type[QuantizedTensor]:
    """The one subclass of :class:`QuantizedTensor` for ``scheme`` and orientation; an attribute of this module, so that
    compilation caches can pickle a reference to it."""
    return _tensor_class(scheme, transposed)


@functools.cache
def _tensor_class(scheme: Scheme, transposed: bool) -> type[QuantizedTensor]:
    act = f"__act_{scheme.activations}" if scheme.activations else ""
    name = f"Quantized_{scheme.format.name}{act}{'__t' if transposed else ''}"
    members = {"scheme": scheme, "key": register_scheme(scheme), "transposed": transposed, "__module__": __name__}
    made = type(name, (QuantizedTensor,), members)
    setattr(sys.modules[__name__], name, made)
    return made


def __getattr__(name: str) -> type[QuantizedTensor]:
    """Classes of registered formats by name, made on demand: a cache may be read before anything was quantized."""
    match = _CLASS_NAME.fullmatch(name)
    if match is None or (spec := find(match["format"])) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    activations = match["activations"].removeprefix("__act_") if match["activations"] else None
    return tensor_class(Scheme(spec, activations), match["transposed"] is not None)


def quantize(
    weight: torch.Tensor, scheme: Scheme, *, transposed: bool = False, layer: str = "weight"
) -> QuantizedTensor:
    """Packs a float weight ``[N, K]`` (``[K, N]`` if ``transposed``), or a stack ``[E, …]`` of such, by round-to-nearest or the
    format's own quantizer.

    Peak memory is the planes plus one chunk of rows. Raises :class:`~qcompile.errors.WeightError`, naming ``layer``.
    """
    matrix = weight.detach().mT if transposed else weight.detach()
    planes = reference.quantize(scheme.format, matrix, layer)
    return tensor_class(scheme, transposed)(planes, weight.shape, weight.dtype)


def as_parameter(tensor: QuantizedTensor) -> torch.nn.Parameter:
    """``tensor`` as a frozen parameter."""
    return torch.nn.Parameter(tensor, requires_grad=False)


def rebuild(
    key: str, transposed: bool, planes: list[torch.Tensor], shape: Sequence[int], dtype: torch.dtype, parameter: bool
) -> torch.Tensor:
    """Makes a tensor from what :func:`torch.save` wrote. Raises ``UnknownFormatError`` for a format this process does
    not know, ``LayoutError`` for planes that do not fit the shape."""
    made = tensor_class(scheme_of(key), transposed)(planes, shape, dtype)
    check_planes(made.scheme.format, planes, *made.stored_shape)
    return as_parameter(made) if parameter else made


torch.serialization.add_safe_globals([rebuild])
