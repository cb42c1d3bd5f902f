"""Scales and offsets: the search for what rounds a weight best, and how it is stored in a format's planes.

Everything follows from the declaration. A group's ideal scale and offset are found first, by weighted least squares over
the codes that several shrunk ranges give; then they are factored into the planes, coarsest first (d of a superblock is the
largest scale in it over the largest value of its sub-scale), each rounded as it is stored. The scheme of candidates
refined by least squares is that of llama.cpp's ``make_qkx2_quants``; the formulas are in :class:`_Fitting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .algebra import affine, finite_range, gen_table, levels_of
from .moments import FLOATS, Three, moments, native_for
from .spec import ALL, ROW, FormatSpec
from .storage import Entries, Storage, largest

STEPS = (1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0)
"""Steps of the code by which a group's range is made longer or shorter for a try: clipping a few outliers narrows all
other steps, and least squares then find another local minimum."""

SEARCHED_BITS = 6
"""Codes of at most this many bits get scales by search; with 8 bits, min–max loses nothing worth the time …"""

COARSE = 1.25
"""… unless scales are further apart than this: rounded down (powers of two, by up to a third), one cuts off outliers."""



@dataclass(frozen=True)
class Fit:
    """``entries`` of the scale planes (``[rows, entries]``, by name) of a weight, and the ``scale`` and ``offset`` of each
    group that they stand for: float32 ``[n, groups]`` (offset None: 0)."""

    entries: Entries
    scale: torch.Tensor
    offset: torch.Tensor | None


def fit(
    spec: FormatSpec,
    weight: torch.Tensor,
    importance: torch.Tensor | None = None,
    fixed: Mapping[str, torch.Tensor] | None = None,
    shrinks: tuple[float, ...] | None = None,
) -> Fit:
    """Scales and offsets of float32 ``[n, K']`` (K' a multiple of ``spec.whole_groups``).

    They minimize Σ ``importance``·(w − ŵ)² over a group, ``importance`` float32 ``[K']`` or ``[n, K']``, not negative
    (None: all equal). ``fixed`` holds entries of planes that a whole tensor shares (:func:`whole_tensor`). Raises
    :class:`~qcompile.errors.FormatError` when coeff or offset is no product over planes.
    """
    n, k = weight.shape
    group = spec.period or k
    x = _by_group(weight, group)
    w = None if importance is None else _by_group(importance.expand(n, k), group)
    form = affine(spec)
    scales = Storage(spec, form.coeff, dict(fixed or {}), n, k // group)
    offsets = Storage(spec, form.offset, scales.entries, n, k // group) if form.offset != 0 else None
    ideal = _search(spec, x, w, scales, offsets, _shares(spec) if shrinks is None else shrinks)
    scale = scales.store(ideal[0].view(n, -1))
    offset = offsets.store(ideal[1].view(n, -1), scale) if offsets is not None else None
    planes = {p.name for p in spec.scales}
    entries = scales.entries | (offsets.entries if offsets is not None else {})
    return Fit({name: e for name, e in entries.items() if name in planes}, scale, offset)


def has_search(spec: FormatSpec) -> bool:
    """Whether other scales than those of the range are tried, so that an importance changes the result."""
    return spec.quantizer is None and bool(_shares(spec))


def _shares(spec: FormatSpec) -> tuple[float, ...]:
    """Shares of a group's range that are tried."""
    if spec.shrinks is not None:
        return spec.shrinks
    bits, step = spec.code.bits, _coarseness(spec)
    shares = tuple(s for d in STEPS if (s := 1 + d / (2**bits - 1)) > 0.1) if bits <= SEARCHED_BITS else ()
    return (*(shares or (1.0,)), step**0.5, step**-0.5) if step > COARSE else shares


def _coarseness(spec: FormatSpec) -> float:
    """Ratio of neighbours among the values that a group's own scale can have (the median of all); 1 for floats."""
    levels = levels_of(spec, affine(spec).coeff).levels
    if not levels or (table := levels[-1].table) is None:
        return 1.0
    values = table[torch.isfinite(table) & (table > 0)].unique()
    return float((values[1:] / values[:-1]).median()) if len(values) > 1 else 1.0


def inverted(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that is no number."""
    return torch.where(scale.abs() >= torch.finfo(torch.float32).tiny, 1 / scale, 0.0)


def whole_tensor(spec: FormatSpec, low: float, high: float) -> Entries:
    """Entries of the planes that a whole tensor shares, for weights from ``low`` to ``high``: the smallest values that
    let every group's scale be stored."""
    form, found = affine(spec), {}
    product = levels_of(spec, form.coeff)
    for at, level in enumerate(product.levels):
        if level.plane.rows == ALL and level.plane.per == ROW and level.table is None:
            table_low, table_high = finite_range(gen_table(spec))
            reach = max(high / table_high, low / table_low if table_low < 0 else 0.0) / abs(product.number)
            value = torch.tensor([[reach / largest(product.levels[at + 1 :])]], dtype=torch.float64)
            found[level.plane.name] = torch.where(value > 0, value, 1.0).to(level.plane.entry_dtype)
    return found


def _by_group(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """``[n, K]`` → contiguous ``[n·K/group, group]``."""
    n, k = matrix.shape
    return matrix.reshape(n * (k // group), group).contiguous()


# The search ----------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Σ w·x², Σ w·x and Σ w of every group: ``[groups]``."""

    square: torch.Tensor
    first: torch.Tensor
    total: torch.Tensor | float

    @staticmethod
    def of(x: torch.Tensor, w: torch.Tensor | None) -> _Sums:
        if w is None:
            return _Sums((x * x).sum(1), x.sum(1), float(x.shape[1]))
        return _Sums((w * x).mul_(x).sum(1), (w * x).sum(1), w.sum(1).clamp_min(1e-30))


def _search(
    spec: FormatSpec, x: torch.Tensor, w: torch.Tensor | None, scales: Storage, offsets: Storage | None,
    shrinks: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Best scale and offset of each group of ``x`` ``[groups, group]``: min–max, or what least squares make of a candidate."""
    sign = offsets.sign if offsets is not None else 0
    low, high = finite_range(gen_table(spec))
    xmin, xmax = x.amin(1), x.amax(1)
    starts = _min_max(xmin, xmax, low, high, sign, offsets is not None)
    if offsets is not None and offsets.steps is not None:
        starts = _whole_steps(xmin, xmax, low, high, offsets)
    if offsets is None and scales.either_sign and low != -high:
        starts = _signed(xmin, xmax, low if -low > high else high)
    if not shrinks:
        return _rounded(scales, offsets, *starts)
    fitting = _Fitting(spec, x, w, _Sums.of(x, w), scales, offsets, sign)
    # The least weight keeps its code; the other end moves.
    factors = x.new_tensor(shrinks)
    shares = torch.stack([factors, (1 - factors) * (low if offsets is not None else 0.0)])
    found = fitting.natively(starts, shares)
    return found if found is not None else _best(fitting, starts, shares)


def _best(
    fitting: _Fitting, starts: tuple[torch.Tensor, torch.Tensor], shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the range as it is, what least squares make of it under each share, and of the best of these."""
    scales, offsets = fitting.scales, fitting.offsets
    best = _rounded(scales, offsets, *starts)
    least = fitting.error(*(one[None] for one in best))[0]
    tries = starts[0] * shares[0, :, None], starts[1] + starts[0] * shares[1, :, None]
    # A candidate is rounded first, so that its codes are those of what is stored; in the end once more from the best.
    for candidates in (_rounded(scales, offsets, *tries), None):
        at = candidates if candidates is not None else (best[0][None], best[1][None])
        found, errors = fitting.refined(*at)
        for i in range(len(errors)):
            better = errors[i] < least
            least = torch.where(better, errors[i], least)
            best = torch.where(better, found[0][i], best[0]), torch.where(better, found[1][i], best[1])
    return best


def _min_max(
    xmin: torch.Tensor, xmax: torch.Tensor, low: float, high: float, sign: int, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset that map the range of a group onto that of the codes; without an offset, the smallest scale that
    reaches both ends. A ``sign`` says that offsets cannot have the other one."""
    if not offset:
        reach = torch.maximum(xmax / high, xmin / low) if low < 0 else xmax / high
        return reach.clamp_min(0), torch.zeros_like(reach)
    xmin, xmax = (xmin.clamp_max(0), xmax) if sign < 0 else (xmin, xmax.clamp_min(0)) if sign > 0 else (xmin, xmax)
    scale = (xmax - xmin) / (high - low)
    return scale, (xmax + xmin) / 2 - scale * ((low + high) / 2)


def _whole_steps(
    xmin: torch.Tensor, xmax: torch.Tensor, low: float, high: float, offsets: Storage
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest scale, and an offset of a zero point times that scale, with which the codes reach both ends of a group."""
    scale, offset = _min_max(xmin, xmax, low, high, 0, True)
    step = offsets.step(offset / scale)
    above, below = high + step, low + step
    reach = torch.where(above > 0, xmax / above, 0.0).maximum(torch.where(below < 0, xmin / below, 0.0)).clamp_min(0)
    return reach, reach * step


def _signed(xmin: torch.Tensor, xmax: torch.Tensor, extreme: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of either sign that maps the weight of largest magnitude onto the code of largest magnitude."""
    scale = torch.where(-xmin > xmax, xmin, xmax) / extreme
    return scale, torch.zeros_like(scale)


def _rounded(
    scales: Storage, offsets: Storage | None, scale: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset as they would be read back, where one plane stores them alone."""
    scale = scales.rounded(scale)
    if offsets is not None and offsets.steps is not None:
        return scale, torch.where(scale != 0, scale * offsets.step(offset / scale), 0.0)
    return scale, offset if offsets is None else offsets.rounded(offset)


@dataclass
class _Fitting:
    """Least squares for the groups of ``x``: the s and o that minimize e = Σ w·(x − s·gen − o)² for the codes ``gen`` of a given
    scale and offset, for several ``[candidates, groups]`` at once.

    With A = Σ w·gen², B = Σ w·gen·x, C = Σ w·gen, X = Σ w·x, W = Σ w: s = (B·W − C·X)/(A·W − C²), o = (X − s·C)/W, and
    without an offset s = B/A; e = Σ w·x² − 2sB − 2oX + s²A + 2soC + o²W. An offset o = s·t with a zero point t is rounded
    to one, and s = (B + tX)/(A + 2tC + t²W).
    """

    spec: FormatSpec
    x: torch.Tensor
    w: torch.Tensor | None
    sums: _Sums
    scales: Storage
    offsets: Storage | None
    sign: int

    def error(self, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """e of ``scale`` and ``offset`` as they are."""
        return self._error(scale, offset, *self._moments(scale, offset))

    def refined(self, scale: torch.Tensor, offset: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The best s and o for the codes of ``scale`` and ``offset``, as they are stored, and e."""
        (b, c, a), sums = self._moments(scale, offset), self.sums
        s, o = _ratio(b, a), torch.zeros_like(b)
        if self.offsets is not None:
            free = _ratio(b * sums.total - c * sums.first, a * sums.total - c * c)
            o = (sums.first - free * c) / sums.total
            legal = (o * self.sign >= 0) if self.sign else torch.ones_like(o, dtype=torch.bool)
            s, o = torch.where(legal, free, s), torch.where(legal, o, 0.0)
            if self.offsets.steps is not None:
                t = self.offsets.step(o / s)
                s = _ratio(b + t * sums.first, a + t * (2 * c + t * sums.total))
                o = s * t
        s, o = _rounded(self.scales, self.offsets, s, o)
        return (s, o), self._error(s, o, b, c, a)

    def natively(
        self, starts: tuple[torch.Tensor, torch.Tensor], shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What :func:`_best` finds, in one pass over memory where C++ knows how scale and offset are stored; else None."""
        both = self.scales.rounds_to, self.offsets.rounds_to if self.offsets is not None else ""
        stepped = self.offsets is not None and self.offsets.steps is not None
        if None in both or stepped or (native := native_for(self.spec, self.x)) is None:
            return None
        kinds = [FLOATS[k] if k else 0 for k in both]
        planes = (*kinds, int(self.offsets is not None), self.sign, int(self.scales.either_sign))
        sums = torch.stack([torch.as_tensor(s).expand(len(self.x)) for s in (self.sums.square, self.sums.first, self.sums.total)])
        found = native[0].search(native[1], self.x, self.w, sums, torch.stack(starts), shares, planes)
        return (found[0], found[1]) if found is not None else None

    def _moments(self, scale: torch.Tensor, offset: torch.Tensor) -> Three:
        return moments(self.spec, self.x, self.w, inverted(scale), offset if self.offsets is not None else None)

    def _error(self, s: torch.Tensor, o: torch.Tensor, b: torch.Tensor, c: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        error = self.sums.square - 2 * s * b + s * s * a
        if self.offsets is not None:
            error += o * (2 * (s * c - self.sums.first) + o * self.sums.total)
        usable = torch.isfinite(s) & ((s > 0) | (self.scales.either_sign and self.offsets is None))
        return torch.where(usable, error, torch.inf)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 1e-30, a / b, torch.nan)
