"""Triton kernels of a scheme: assembled from its format's declaration, loaded when first used, launched on CUDA."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch

from ..errors import KernelBuildError
from ..formats.reference import matrix_of
from ..formats.scheme import Scheme
from ..store import code_version, count, the_store
from ..target import Target, of
from . import tiles
from .kept import kept_source
from .triton_act import quantize
from .triton_decode import decode, rows
from .triton_dot import dot, dot8
from .triton_gemv import gemv, reduce
from .triton_launch import Call, decode_weight, gather_rows
from .triton_load import assembly, content_hash, interpreting, load
from .triton_print import Printer
from .triton_text import module

TILE = "tile.json"

TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Variant:
    """One way to run a linear layer: the tile, the type weights are decoded to, the operands' type, terms of x."""

    tile: tiles.Tile
    decoded: str
    operand: str
    terms: int = 1


def source(scheme: Scheme, permutes: bool = True) -> str:
    """The text of the kernels of ``scheme``; ``permutes``: see :class:`TritonKernels`."""
    printer, tag = Printer(scheme.format, permutes), _tag(scheme)
    kernels = [decode(printer, f"decode_{tag}"), rows(printer, f"rows_{tag}"), reduce(f"reduce_{tag}")]
    if printer.fused:
        kernels.append(dot(printer, f"dot_{tag}"))
    if scheme.activations is not None:
        kernels.append(quantize(printer, f"quantize_{tag}", scheme.activations))
        if printer.fused8:
            kernels.append(dot8(printer, f"dot8_{tag}"))
    else:
        kernels.append(gemv(printer, f"gemv_{tag}"))
    return module(scheme.label, kernels, printer.imports)


def _tag(scheme: Scheme) -> str:
    return content_hash(scheme.key)[:8]


@functools.cache
def triton_kernels(scheme: Scheme) -> TritonKernels:
    """The kernels of ``scheme``. Raises :class:`~qcompile.errors.FormatError` for a format that cannot be printed."""
    return TritonKernels(scheme)


class TritonKernels:
    """``linear``, ``decode`` and ``rows`` for one scheme on CUDA (or under Triton's interpreter on the CPU).

    Results do not depend on scheduling: a product that is split along K is summed in a fixed order.
    """

    reorders = False
    permutes = torch.version.hip is None
    """Whether the GPU has the instruction of tables: NVIDIA's do; others select by bits."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.printer = Printer(scheme.format, self.permutes)
        self.printer.check()
        self.tag = _tag(scheme)
        language = "triton" if self.permutes else "triton by bits"
        self.source = kept_source(language, (scheme.key,), lambda: source(scheme, self.permutes))
        self._smaller: dict[Variant, Variant] = {}
        self._looked_up: set[Variant] = set()

    @functools.cached_property
    def module(self) -> ModuleType:
        return load(self.source)

    def kernel(self, name: str) -> Any:
        """The jitted function gemv, dot, dot8, quantize, decode, rows or reduce of this scheme."""
        return getattr(self.module, f"{name}_{self.tag}")

    def machine_code(self) -> dict[str, str]:
        """What this process has compiled of the kernels, by name and specialization: PTX, or AMD's assembly."""
        loaded = vars(self).get("module")
        functions = [f for f in vars(loaded).values() if hasattr(f, "device_caches")] if loaded is not None else []
        made = [each for f in functions for caches in f.device_caches.values() for each in caches[0].values()]
        return dict(code for each in made if (code := assembly(each)) is not None)

    def type(self, name: str) -> Any:
        """``tl.{name}``."""
        return getattr(self.module.tl, name)

    def variant(self, rows: int, dtype: torch.dtype, target: Target, kp: int = 4096) -> Variant:
        """How ``rows`` rows of ``dtype`` are multiplied on ``target``; ``kp`` is the padded K of the weight.

        Raises :class:`~qcompile.errors.KernelBuildError` for a dtype without kernels.
        """
        if dtype not in TYPES:
            raise KernelBuildError(f"no Triton kernel for activations of {dtype}; use float16, bfloat16 or float32")
        arch, printer = int(target.arch), self.printer
        if self.scheme.activations is not None:
            return self._narrow(rows, dtype, target)
        wide, granule = dtype == torch.float32, printer.granule
        slow = not printer.direct or (printer.exact16 and self.scheme.format.code.bits >= tiles.at_arch(tiles.GEMV_BITS, arch))
        if rows == 1 and (wide or slow):
            return Variant(tiles.gemv_tile(printer.group, granule, kp), printer.wide, "float32")
        limit = tiles.DECODE_FROM_FLOAT32 if wide else tiles.at_arch(tiles.DECODE_FROM, arch)
        if rows >= limit or not printer.fused or (wide and not printer.exact16):
            return Variant(tiles.decode_tile(), printer.wide, TYPES[dtype])
        if wide:
            # bfloat16 holds every gen exactly and has float32's range: x is the sum of two such terms, to 2^-17.
            return Variant(tiles.FLOAT32_ROWS, "bfloat16", "bfloat16", terms=2)
        return Variant(tiles.product_tile("dot", rows, arch, granule), TYPES[dtype], TYPES[dtype])

    def _narrow(self, rows: int, dtype: torch.dtype, target: Target) -> Variant:
        """Products of quantized activations: on 8-bit units, else on 16-bit ones (float16 holds all codes), else of the
        decoded weight, where scales change too often for either."""
        arch, printer = int(target.arch), self.printer
        units = self.scheme.activations == "int8" or (target.computes_fp8 and self.permutes)
        if printer.fused8 and units:
            return Variant(tiles.product_tile("dot8", rows, arch, printer.granule), "int8", "int8")
        if printer.fused:
            return Variant(tiles.product_tile("dot", rows, arch, printer.granule), "float16", "float16")
        return Variant(tiles.decode_tile(), "float32", TYPES[dtype])

    def linear(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], bias: torch.Tensor | None, n: int, variant: Variant | None = None
    ) -> torch.Tensor:
        """``x[..., K]`` times the N×K weight, plus ``bias[N]``: ``[..., N]`` in ``x``'s dtype, sums in float32.

        ``variant`` overrides the table's choice. Planes must belong to an N×K weight of the scheme's format. Where the
        compiler ran out of registers, calls from the second on take a smaller tile.
        Raises :class:`~qcompile.errors.KernelBuildError` for a device or dtype without kernels.
        """
        k = x.shape[-1]
        flat = x.reshape(-1, k)
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        out = torch.empty(flat.shape[0], n, dtype=x.dtype, device=x.device)
        kp = self.scheme.format.padded(n, k)[1]
        target = self._target(x)
        chosen = variant or self.variant(max(flat.shape[0], 1), x.dtype, target, kp)
        chosen = self.fitting(chosen, int(target.arch))
        if out.numel():
            with torch.cuda.device_of(x):
                spilled = Call(self, chosen, int(target.arch), n, k, kp).linear(flat, planes, bias, out)
            if spilled:
                self.note_spills(chosen, int(target.arch))
        return out.reshape(*x.shape[:-1], n)

    def fitting(self, chosen: Variant, arch: int) -> Variant:
        """``chosen``, or the first smaller one that the compiler is not known to have run out of registers for, here or in an
        earlier process."""
        while chosen in self._smaller or self._spilled_before(chosen, arch):
            chosen = self._smaller[chosen]
        return chosen

    def note_spills(self, chosen: Variant, arch: int) -> None:
        """Has calls take a smaller tile than that of ``chosen`` from now on, in later processes too, if there is one."""
        if tile := tiles.smaller(chosen.tile):
            self._smaller[chosen] = replace(chosen, tile=tile)
            with the_store().making("tile", self._tile_parts(chosen, arch)) as slot:
                if slot.found is None:
                    slot.put(lambda folder: (folder / TILE).write_text(json.dumps({"spills": True})))

    def _spilled_before(self, chosen: Variant, arch: int) -> bool:
        if chosen in self._looked_up or chosen.tile.kernel not in ("dot", "dot8"):
            return False
        self._looked_up.add(chosen)
        tile = tiles.smaller(chosen.tile)
        if tile is None or the_store().find("tile", self._tile_parts(chosen, arch)) is None:
            return False
        count("tile read")
        self._smaller[chosen] = replace(chosen, tile=tile)
        return True

    def _tile_parts(self, chosen: Variant, arch: int) -> dict[str, Any]:
        """What decides whether a compiled product keeps everything in registers."""
        import triton

        return {"scheme": self.scheme.key, "variant": asdict(chosen), "arch": arch, "triton": triton.__version__,
                "code": code_version("qcompile.formats", "qcompile.codegen")}  # fmt: skip

    def grouped(
        self, x: torch.Tensor, planes: Sequence[torch.Tensor], groups: torch.Tensor, ends: bool, experts: int, n: int
    ) -> torch.Tensor:
        """``x[T, K]``, each row times its expert's N×K weight in a stack of ``experts``: ``[T, N]`` in ``x``'s dtype.

        ``groups``: the expert of each row ``[T]``, or with ``ends`` one past the last row of each expert ``[experts]``, rows
        being sorted by expert and those beyond the last giving zeros. One product for each expert that has rows, which the host
        must know: it waits for ``groups``. Raises ``IndexError`` for numbers out of range.
        """
        out = torch.zeros(x.shape[0], n, dtype=x.dtype, device=x.device)
        order, bounds = rows_by_expert(groups, ends, experts, x.shape[0])
        for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start < stop:
                rows = slice(start, stop) if order is None else order[start:stop]
                out[rows] = self.linear(x[rows], matrix_of(planes, experts, expert), None, n)
        return out

    def decode(self, planes: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The ``[N, K]`` weight of ``planes`` in ``dtype``, computed in float32 and rounded once."""
        out = torch.empty(n, k, dtype=dtype, device=planes[0].device)
        self._target(out)
        if out.numel():
            with torch.cuda.device_of(out):
                decode_weight(self, planes, out, tiles.decode_tile())
        return out

    def rows(
        self, planes: Sequence[torch.Tensor], indices: torch.Tensor, n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows ``indices`` (int64, any shape, each in 0…N−1) of the N×K weight of ``planes``: ``[*indices.shape, K]``."""
        out = torch.empty(indices.numel(), k, dtype=dtype, device=planes[0].device)
        self._target(out)
        if out.numel():
            with torch.cuda.device_of(out):
                gather_rows(self, planes, indices.reshape(-1).contiguous(), out, n)
        return out.reshape(*indices.shape, k)

    def _target(self, x: torch.Tensor) -> Target:
        if x.is_cuda:
            return of(x.device)
        if interpreting():
            return Target("cuda", "90")
        raise KernelBuildError(f"Triton kernels run on CUDA tensors, found one on {x.device}; move it, or use the CPU kernels")


def rows_by_expert(
    groups: torch.Tensor, ends: bool, experts: int, rows: int
) -> tuple[torch.Tensor | None, list[int]]:
    """The ``rows`` in the order of their experts (None: as they are), and where those of each begin, with an end behind."""
    if ends:
        bounds = [0, *groups.tolist()]
        if sorted(bounds) != bounds or bounds[-1] > rows:
            raise IndexError(f"offsets of experts must rise, up to the number of rows ({experts} experts, {rows} rows)")
        return None, bounds
    own = torch.where(groups < 0, groups + experts, groups)
    counts = torch.bincount(own.clamp(-1, experts) + 1, minlength=experts + 2).tolist()
    if counts[0] or counts[-1]:
        raise IndexError(f"the number of an expert is out of range ({experts} experts, {rows} rows)")
    return own.argsort(stable=True), list(itertools.accumulate(counts[1:-1], initial=0))
