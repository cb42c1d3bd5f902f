"""Generated CPU kernels of one linear layer against ``torch.compile``\\ d ``F.linear`` in the same run.

All candidates of a shape and row count are timed in turn, round after round, each with the next of its copies of the
weight, so that no weight is found in a cache and drifts of the machine meet all of them. A ratio is the median over
rounds of baseline time / candidate time in that round; ``low`` and ``high`` are the quartiles.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qcompile.formats import Scheme, get, huge_pages
from qcompile.formats.reference import quantize
from qcompile.kernels import for_scheme

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""(N, K) of the attention and feed-forward projections of an 8-billion-parameter Llama."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
SCHEMES = ("int8", "int4_g128", "int4_g32", "fp8_e4m3", "int8+int8", "int4_g128+int8")
COLD_BYTES = 96 << 20
"""Copies of a weight that are used in rotation add up to at least this much, three times the last-level cache here."""


@dataclass(frozen=True)
class Result:
    """One kernel at one shape: median milliseconds, baseline time / its time, bytes of weights read per second / 1e9."""

    scheme: str
    n: int
    k: int
    rows: int
    variant: str
    ms: float
    speedup: float
    low: float
    high: float
    gb_per_s: float
    rounds: int


@dataclass(frozen=True)
class Candidate:
    label: str
    nbytes: int
    calls: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    variant: Callable[[int], str]


def _copies(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


def baseline(weight: torch.Tensor) -> Candidate:
    """``F.linear`` through Inductor on copies of ``weight``."""

    def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w)

    compiled = torch.compile(linear, dynamic=False)
    nbytes = weight.nbytes
    copies = [weight.clone() for _ in range(_copies(nbytes))]
    calls = [functools.partial(compiled, w=w) for w in copies]
    return Candidate("baseline", nbytes, calls, lambda rows: "torch.compile")


def candidate(name: str, weight: torch.Tensor) -> Candidate:
    """Our kernel of scheme ``name`` (``format`` or ``format+activations``) on copies of the quantized ``weight``."""
    fmt, _, activations = name.partition("+")
    scheme = Scheme(get(fmt), activations or None)
    kernels = for_scheme(scheme, "cpu")
    planes = quantize(scheme.format, weight)
    nbytes = sum(p.nbytes for p in planes)
    copies = [list(map(huge_pages.copy, planes)) for _ in range(_copies(nbytes))]
    calls = [functools.partial(kernels.linear, planes=c, bias=None, n=weight.shape[0]) for c in copies]
    own = getattr(kernels, "inner", kernels)  # of a permuted format
    return Candidate(name, nbytes, calls, lambda rows: own.variant(rows, weight.dtype))


def measure(
    n: int, k: int, schemes: Sequence[str] = SCHEMES, rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16, seconds: float = 2.0,
) -> list[Result]:  # fmt: skip
    """Times ``schemes`` on an n×k weight for each number of rows, about ``seconds`` for each."""
    torch.manual_seed(0)
    weight = torch.randn(n, k).to(dtype)
    candidates = [baseline(weight), *(candidate(s, weight) for s in schemes)]
    results = []
    with torch.inference_mode():
        for m in rows:
            torch.compiler.reset()
            x = torch.randn(m, k).to(dtype)
            times = _interleaved(candidates, x, seconds * len(candidates))
            for c, own in zip(candidates, times, strict=True):
                ratios = [a / b for a, b in zip(times[0], own, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                ms = statistics.median(own)
                results.append(Result(c.label, n, k, m, c.variant(m), ms * 1e3, middle, low, high, c.nbytes / ms / 1e9, len(own)))
    return results


def _interleaved(candidates: Sequence[Candidate], x: torch.Tensor, seconds: float) -> list[list[float]]:
    """Times of every candidate in at least 21 rounds."""
    for c in candidates:
        for call in c.calls:
            call(x)
    times: list[list[float]] = [[] for _ in candidates]
    start, turn = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or turn < 21:
        for c, own in zip(candidates, times, strict=True):
            call = c.calls[turn % len(c.calls)]
            begin = time.perf_counter()
            call(x)
            own.append(time.perf_counter() - begin)
        turn += 1
    return times


def table(results: Sequence[Result]) -> str:
    """Markdown: one line for each number of rows, one column for each scheme; speed-ups over the baseline."""
    schemes = list(dict.fromkeys(r.scheme for r in results))
    lines = ["| N×K | rows | " + " | ".join(schemes) + " |", "|---" * (len(schemes) + 2) + "|"]
    for n, k, m in dict.fromkeys((r.n, r.k, r.rows) for r in results):
        cells = {r.scheme: r for r in results if (r.n, r.k, r.rows) == (n, k, m)}
        shown = [f"{cells[s].ms:.2f} ms, {cells[s].gb_per_s:.0f} GB/s" if s == "baseline" else
                 f"{cells[s].speedup:.2f}× ({cells[s].gb_per_s:.0f} GB/s)" for s in schemes]  # fmt: skip
        lines.append(f"| {n}×{k} | {m} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--shape", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="NxK …")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    for shape in args.shape:
        n, k = (int(s) for s in shape.split("x"))
        print(table(measure(n, k, args.schemes, args.rows, getattr(torch, args.dtype), args.seconds)), flush=True)


if __name__ == "__main__":
    main()
