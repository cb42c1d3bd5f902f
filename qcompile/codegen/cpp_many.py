"""Many rows on CPUs with matrix units: our product, or the weight decoded in parts and multiplied by PyTorch's, as measured.

Kernels here multiply in vector units. Where a CPU has matrix units for a 16-bit type (AMX; Intel, "Architecture Instruction Set
Extensions Programming Reference", 2020, chapter 3), oneDNN's products use them, and from some number of rows on that is worth
decoding the weight first. From which, depends on the format, the sizes, the machine and its load, so both ways are timed on the
first call of a kind, and the store keeps the times. Without such units decoding first never pays (``benchmarks formats``), and
nothing is timed.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.scheme import Scheme
from ..formats.spec import TILE_N
from ..store import code_version, the_store
from .cpp_call import caller

FEWEST = 32
"""Rows from which it may pay."""

PART_BYTES = 1 << 25
"""Of a decoded part of a weight: what the other way takes of memory."""

ROUNDS = 3
"""Times that each way runs, in turn; the shortest counts."""

GAIN = 0.95
"""The other way is taken if it needs at most this share of our product's time."""

TIMES = "times.json"


@dataclass(frozen=True)
class Kind:
    """Calls that one measurement answers for: of ``rows`` up to twice as many, by weights with ``n`` rows together, N×``k``."""

    rows: int
    n: int
    k: int
    dtype: torch.dtype
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return vars(self) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        return f"{self.rows} to {2 * self.rows - 1} rows of {str(self.dtype).removeprefix('torch.')} by {self.n}×{self.k}"


@dataclass(frozen=True)
class Times:
    """Seconds of a call by our product, and by decoding and PyTorch's."""

    ours: float
    other: float

    @property
    def decodes(self) -> bool:
        return self.other <= GAIN * self.ours


FOUND: dict[tuple[str, Kind], Times] = {}
"""What is known in this process, by the scheme's label."""


@functools.cache
def has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of ``dtype`` run in matrix units of this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Layer:
    """What a call has for one weight: its result ``y``, None if nobody reads it; ``planes`` in parts, and an order of columns."""

    y: torch.Tensor | None
    bias: torch.Tensor | None
    bias_dtype: int
    n: int
    planes: Sequence[torch.Tensor]


class Product:
    """Takes what :func:`.cpp_call.caller`'s ``linear`` takes, and does it in the faster way. ``decode`` is the library's
    ``qc_decode``; ``library`` names what was built for this CPU; ``dtypes`` are those of the numbers in the interface."""

    def __init__(self, scheme: Scheme, decode: Callable[..., Any], library: Path, dtypes: Sequence[torch.dtype]) -> None:
        self.scheme, self._decode, self._library, self._dtypes = scheme, decode, library, dtypes
        self._ours = caller().linear

    def __call__(self, *arguments: Any) -> None:
        dtype, m, k = self._dtypes[arguments[2]], arguments[3], arguments[4]
        if m < FEWEST or not has_matrix_units(dtype):
            return self._ours(*arguments)
        layers = list(self._layers(arguments))
        kind = Kind(1 << (m.bit_length() - 1), sum(each.n for each in layers), k, dtype, torch.get_num_threads())
        other = functools.partial(self._by_decoding, arguments, layers)
        if self._times(kind, functools.partial(self._ours, *arguments), other).decodes:
            return other()
        return self._ours(*arguments)

    def _layers(self, arguments: Sequence[Any]) -> Iterator[Layer]:
        """Each layer's arguments; see ``call`` in ``include/call.cpp``."""
        count, rest = arguments[7], arguments[8 : len(arguments) - isinstance(arguments[-1], str)]
        each = len(rest) // count
        for start in range(0, count * each, each):
            y, bias, bias_dtype, n, *planes = rest[start : start + each]
            yield Layer(y, bias, bias_dtype, n, planes)

    @torch.no_grad()
    def _by_decoding(self, arguments: Sequence[Any], layers: Sequence[Layer]) -> None:
        _, x, number, m, k, padded, stride, *_ = arguments
        rows = x.as_strided((m, k), (stride, 1))
        for layer in layers:
            if layer.y is not None:
                planes = layer.planes[: len(self.scheme.format.parts)]
                order = layer.planes[len(planes) :]
                taken = rows.index_select(1, *order) if order else rows
                self._multiply(taken, layer, [p.data_ptr() for p in planes], number, padded)

    def _multiply(self, x: torch.Tensor, layer: Layer, planes: Sequence[int], number: int, padded: int) -> None:
        """The layer's result, as many of its columns at a time as rows of the weight are decoded together."""
        assert layer.y is not None
        spec, (m, k), n = self.scheme.format, x.shape, layer.n
        y = layer.y.as_strided((m, n), (n, 1))
        bias = None if layer.bias is None else layer.bias.as_strided((n,), (1,))
        step = max(PART_BYTES // (k * x.dtype.itemsize) // TILE_N, 1) * TILE_N
        part = torch.empty(min(step, n), k, dtype=x.dtype)
        tile = [math.prod(spec.part_shape(p, n, k)[1:]) * p.dtype.itemsize for p in spec.parts]
        for start in range(0, n, step):
            here = slice(start, min(start + step, n))
            weight = part[: here.stop - start]
            at = (p + start // TILE_N * size for p, size in zip(planes, tile, strict=True))
            self._decode(weight.data_ptr(), number, torch.get_num_threads(), len(weight), k, padded, *at)
            y[:, here] = x @ weight.t() if bias is None else (x @ weight.t()).add_(bias[here])

    def _times(self, kind: Kind, ours: Callable[[], object], other: Callable[[], object]) -> Times:
        """Both ways', measured once on a machine."""
        found = FOUND.get((self.scheme.label, kind))
        if found is None:
            with the_store().making("product", self._parts(kind)) as slot:
                if slot.found is None:
                    found = Times(*_shortest(ours, other))
                    slot.put(lambda folder: (folder / TIMES).write_text(json.dumps(vars(found))))
                else:
                    found = Times(**json.loads((slot.found / TIMES).read_text()))
            FOUND[self.scheme.label, kind] = found
        return found

    def _parts(self, kind: Kind) -> dict[str, Any]:
        """What decides the times."""
        return {"scheme": self.scheme.key, **kind.as_dict(), "torch": torch.__version__,
                "library": self._library.parent.name, "code": code_version("qcompile.formats", "qcompile.codegen")}  # fmt: skip


def _shortest(*ways: Callable[[], object]) -> list[float]:
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, times in zip(ways, taken, strict=True):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return list(map(min, taken))
