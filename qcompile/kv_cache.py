"""Keys and values of attention in a weight format: written once, quantized; read packed.

A page of a cache is, for every head, a weight whose rows are tokens: the stored tensors of a format are
``[pages, heads, *FormatSpec.part_shape(part, tokens of a page, D)]``. Without a block table sequence b is page b.

Keys of many models lie far from zero, by a vector that all tokens have in common: a quantizer spends its codes on that, and what
tells tokens apart is lost. Attention does not ask for it, since what is added to all scores of a query leaves their softmax as it
is. So keys are stored without the mean of the first ones (K smoothing: SageAttention, arXiv:2410.02367); it is added again only
where scores are capped. Formats with even steps hold keys and values with their channels turned (:mod:`.formats.turning`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from . import ops
from .errors import LayoutError, OptionError, WeightError
from .formats import FormatSpec, Scheme, get, register_scheme
from .formats.algebra import codebook_of_gen
from .formats.layout import CENTERED_FROM, center_of, pages
from .formats.ranges import range_planes
from .formats.reference import quantize, sqnr

ALIASES = {"fp8": "fp8_e3m4", "int4": "int4_g32"}
"""Short names of formats for keys and values; every other format goes by its own name. A token's scale gives e3m4 all the range
that it needs, and it rounds half as coarsely as e4m3."""

GROWTH = 256
"""Tokens that a growing cache makes room for at least."""


def formats_of(value: object) -> tuple[Scheme, Scheme]:
    """Schemes of keys and values from what a user writes: one format for both, ``(keys, values)``, or a mapping with
    "keys" and "values"; formats by name ("fp8", "int8", "int4", or a registered one) or as :class:`FormatSpec`.

    Raises :class:`OptionError` for anything else, :class:`UnknownFormatError` for an unknown name, and
    :class:`FormatError` for a format that a cache cannot be written in.
    """
    if isinstance(value, Mapping):
        if set(value) != {"keys", "values"}:
            raise OptionError(f"kv_cache: a mapping has 'keys' and 'values', found {sorted(map(str, value))}")
        value = (value["keys"], value["values"])
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise OptionError(f"kv_cache: give one format, or (keys, values), found {value!r}")
    return _scheme(pair[0]), _scheme(pair[1])


def _scheme(value: object) -> Scheme:
    spec = get(ALIASES.get(value, value)) if isinstance(value, str) else value
    if not isinstance(spec, FormatSpec):
        raise OptionError(f"kv_cache: a format is a name or a FormatSpec, found {value!r}")
    range_planes(spec)
    _warn_of_short_mantissa(spec)
    scheme = Scheme(spec)
    register_scheme(scheme)
    return scheme


@functools.cache
def _warn_of_short_mantissa(spec: FormatSpec) -> None:
    """Says once what e5m2 costs against e4m3, which takes as many bytes."""
    book = codebook_of_gen(spec)
    if book is None or book.cast is None or book.minifloat is None or book.minifloat[1] >= 3:
        return
    better, x = get(ALIASES["fp8"]), torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))
    own, other = (sqnr(s, quantize(s, x), x) for s in (spec, better))
    warnings.warn(f"kv_cache: {spec.name} keeps normal values to {own:.1f} dB; {better.name} keeps them to {other:.1f} dB in as "
                  "many bytes, and scales reach its range", stacklevel=4)  # fmt: skip


class KVCache:
    """The keys and values of one attention layer.

    ``formats``: as :func:`formats_of` takes them. ``capacity``: tokens to allocate at once; the position is then a tensor
    (``length``, int64, no dimensions) and graphs need no recompilation as it moves. None: the cache grows as it fills, and
    ``length`` is an int. ``window``: queries see no more than this many tokens up to their own (0: all), so a growing cache
    forgets those before, in time: ``dropped`` counts them, ``length`` those that are held. Memory is allocated by the first
    :meth:`append`, on the device of what it is given.
    """

    def __init__(self, formats: object = "fp8", capacity: int | None = None, window: int = 0) -> None:
        self.schemes = formats_of(formats)
        self.capacity, self.window = capacity, window
        self.dropped = 0
        self.settled = 0
        """Tokens held that no :meth:`crop` will take back; all of them unless ``revocable``."""
        self.revocable = False
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.center = torch.empty(0)
        """What keys are stored without ``[B, H, 1, D]``: the mean of the first, if they came in a portion of 16 or more."""
        self.length: int | torch.Tensor = 0
        self.value_dim = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(p.nbytes for p in (*self.keys, *self.values, self.center))

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        return 16 * self.keys[0].shape[2] if self.keys else 0

    def allocate(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Memory for keys like k ``[B, H, L, D]`` and values like v, unless there is some."""
        if self.keys:
            return
        tokens = max(GROWTH, k.shape[2]) if self.capacity is None else self.capacity
        batch, heads, _, dim = k.shape
        self.value_dim = v.shape[-1]
        self.keys = pages(self.schemes[0].format, batch, heads, tokens, dim, k.device)
        self.values = pages(self.schemes[1].format, batch, heads, tokens, self.value_dim, k.device)
        self.center = k.new_zeros(batch, heads, 1, dim)
        if self.capacity is not None:
            self.length = torch.zeros((), dtype=torch.int64, device=k.device)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Quantizes k ``[B, H, L, D]`` and v ``[B, H, L, Dv]`` behind what is there.

        Raises :class:`LayoutError` for another batch, heads or sizes than the cache was filled with first.
        """
        self.allocate(k, v)
        if k.shape[:2] != self.keys[0].shape[:2] or v.shape[:3] != k.shape[:3] or v.shape[-1] != self.value_dim:
            held = f"{list(self.keys[0].shape[:2])} sequences and heads with values of {self.value_dim}"
            raise LayoutError(f"KV cache: holds {held}; found keys {list(k.shape)} and values {list(v.shape)}; use one cache for "
                              "each batch")  # fmt: skip
        self._find_center(k)
        if isinstance(self.length, torch.Tensor):
            start = self.starts()
            self.length.add_(k.shape[2])
        else:
            self._make_room(self.length, k.shape[2])
            start = self.starts()
            self.length = self.length + k.shape[2]
            if not self.revocable:
                self.settled = self.length
        ops.kv_write(self.keys, self.values, k - self.center, v, start, None, self.schemes[0].key, self.schemes[1].key)

    def _find_center(self, k: torch.Tensor) -> None:
        """Of an empty cache: the mean of ``k``, the tokens that come first."""
        if isinstance(self.length, torch.Tensor):
            if k.shape[2] >= CENTERED_FROM:  # fewer leave zeros, or what any tokens may have for a center
                self.center.copy_(torch.where(self.length == 0, center_of(k), self.center))
        elif self.length == 0:
            self.center = center_of(k)

    def starts(self) -> torch.Tensor:
        """int64 ``[B]``: the length, for every sequence."""
        batch, device = self.keys[0].shape[0], self.keys[0].device
        if isinstance(self.length, torch.Tensor):
            return self.length.expand(batch).clone()
        return torch.full((batch,), self.length, dtype=torch.int64, device=device)

    def attend(
        self, q: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = True, scale: float | None = None,
        softcap: float = 0.0, window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of q ``[B, Hq, L, D]``, whose tokens are the last L that were appended: ``[B, Hq, L, Dv]`` in q's dtype.

        Hq is a multiple of the heads of the cache: query head h reads head ``h // (Hq // H)``. ``mask``: bool (True: seen) or
        additive, broadcast to ``[B, Hq, L, T]``, T the tokens held. ``causal``: no query sees tokens behind its own.
        ``window``: nor those ``window`` and more before it (0: all are seen; None: the cache's window). ``scale``: 1/√D if
        None. ``softcap`` c > 0: scores become c · tanh(score / c). A query that sees no token gives zeros. Raises
        :class:`WeightError` for heads that do not divide, :class:`OptionError` for a longer window than the cache's.
        """
        window = self.window if window is None else window
        if self.window and not 0 < window <= self.window:
            raise OptionError(f"KV cache: its window is {self.window} tokens, and attention is to see {window or 'all'}; make it "
                              "with that window, or leave out this one")  # fmt: skip
        if q.shape[1] % self.keys[0].shape[1]:
            raise WeightError(f"attention: {q.shape[1]} heads of queries over {self.keys[0].shape[1]} of keys; they must divide")
        start = self.starts() - q.shape[2]
        tokens = self.room if isinstance(self.length, torch.Tensor) else self.length
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return ops.attend(q, self.keys, self.values, start, tokens, self.value_dim, mask, None, self.schemes[0].key,
                          self.schemes[1].key, causal, scale, softcap, window, self.center if softcap else None)  # fmt: skip

    def crop(self, tokens: int) -> None:
        """Forgets the last ``tokens`` tokens. Raises :class:`LayoutError` when a growing cache holds fewer, or has dropped tokens
        that come into the window again; ``revocable`` keeps it from that."""
        if isinstance(self.length, torch.Tensor):
            self.length.sub_(tokens)
            return
        if tokens > self.length:
            raise LayoutError(f"KV cache: cannot forget {tokens} tokens of {self.length}")
        if self.dropped and self.length - tokens < self.window - 1:
            held = f"of the {self.window - 1} before them, in the window of the next, {self.length - tokens} are held"
            raise LayoutError(f"KV cache: cannot forget {tokens} tokens: {held}; set revocable before what is to be forgotten")
        self.length -= tokens
        self.settled = self.length

    def clear(self) -> None:
        """Forgets everything; a cache with a capacity keeps its memory."""
        if isinstance(self.length, torch.Tensor):
            self.length.zero_()
            self.center.zero_()
        else:
            self.keys, self.values, self.center = [], [], torch.empty(0)
            self.length = self.dropped = self.settled = 0

    def select(self, sequences: torch.Tensor) -> None:
        """The sequences of these numbers (int64, any of them several times) take the place of all, if there are any yet."""
        if not self.keys:
            return
        self.keys = [p.index_select(0, sequences.to(p.device)) for p in self.keys]
        self.values = [p.index_select(0, sequences.to(p.device)) for p in self.values]
        self.center = self.center.index_select(0, sequences.to(self.center.device))

    def to_drop(self, tokens: int) -> int:
        """How many tokens, whole tiles of them, the next :meth:`append` of ``tokens`` drops behind the window: none before
        memory runs out, or before they are as many as the window's."""
        if not self.window or isinstance(self.length, torch.Tensor) or not self.keys:
            return 0
        behind = (self.settled - self.window + 1) // 16 * 16
        return behind if behind > 0 and (self.length + tokens > self.room or behind >= self.window) else 0

    def _make_room(self, held: int, tokens: int) -> None:
        """Room for ``tokens`` behind those ``held``: half as many again as there was, or a window and a half, so that copying
        costs a constant for each token."""
        drop = self.to_drop(tokens)
        needed = held - drop + tokens
        if not drop and needed <= self.room:
            return
        room = needed + max(GROWTH, self.window // 2) if drop else max(needed, self.room + self.room // 2)
        first, tiles = drop // 16, -(-room // 16)
        self.keys, self.values = (_moved(self.keys, first, tiles), _moved(self.values, first, tiles))
        self.length, self.dropped, self.settled = held - drop, self.dropped + drop, self.settled - drop


def _moved(planes: Sequence[torch.Tensor], first: int, tiles: int) -> list[torch.Tensor]:
    """``planes`` from tile ``first`` on, with memory for ``tiles`` in all."""
    kept = [p[:, :, first : first + tiles] for p in planes]
    return [torch.cat([p, p.new_zeros(*p.shape[:2], tiles - p.shape[2], *p.shape[3:])], 2) for p in kept]
