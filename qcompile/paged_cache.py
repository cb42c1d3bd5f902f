"""A packed KV cache of sequences that come and go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import ops
from .errors import LayoutError
from .formats.layout import center_of, pages
from .kv_cache import formats_of


class PagedKVCache:
    """The keys and values of one attention layer for sequences that come and go, in pages that they share the memory of.

    ``count`` pages of ``page`` tokens (a multiple of 16) are allocated at once. Raises :class:`LayoutError` when a sequence needs
    a page and none is free; nothing is written then.
    """

    def __init__(self, count: int, heads: int, dim: int, value_dim: int | None = None, page: int = 64, formats: object = "fp8",
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        if page % 16 or page < 16:
            raise LayoutError(f"a page has a multiple of 16 tokens, found {page}")
        self.schemes, self.page, self.value_dim = formats_of(formats), page, value_dim or dim
        device = torch.device(device)
        self.keys = pages(self.schemes[0].format, count, heads, page, dim, device)
        self.values = pages(self.schemes[1].format, count, heads, page, self.value_dim, device)
        self.free = list(range(count))[::-1]
        self.sequences: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.centers: dict[int, torch.Tensor] = {}
        """By sequence, as :attr:`KVCache.center`: ``[H, 1, D]``."""
        self._next = 0

    def add(self) -> int:
        """A new, empty sequence; returns its number."""
        number, self._next = self._next, self._next + 1
        self.sequences[number], self.lengths[number] = [], 0
        return number

    def remove(self, sequence: int) -> None:
        """Gives the sequence's pages back."""
        self.free += self.sequences.pop(sequence)[::-1]
        del self.lengths[sequence]
        self.centers.pop(sequence, None)

    def append(self, sequences: Sequence[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Quantizes k ``[B, H, L, D]`` and v ``[B, H, L, Dv]`` behind the B ``sequences``, each named once."""
        if len(set(sequences)) != len(sequences):
            raise LayoutError(f"KV cache: a sequence comes twice in {list(sequences)}; append to it in two calls")
        needed = {s: -(-(self.lengths[s] + k.shape[2]) // self.page) - len(self.sequences[s]) for s in sequences}
        if sum(needed.values()) > len(self.free):
            raise LayoutError(f"KV cache: {sum(needed.values())} pages of {self.page} tokens are needed, {len(self.free)} are "
                              "free; remove sequences, or allocate more pages")  # fmt: skip
        for s, count in needed.items():
            self.sequences[s] += [self.free.pop() for _ in range(count)]
        start, table = self._where(sequences)
        self.centers |= {s: center for s, center in zip(sequences, center_of(k), strict=True) if not self.lengths[s]}
        ops.kv_write(self.keys, self.values, k - self._centers(sequences), v, start, table, self.schemes[0].key,
                     self.schemes[1].key)  # fmt: skip
        for s in sequences:
            self.lengths[s] += k.shape[2]

    def attend(
        self, sequences: Sequence[int], q: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = True,
        scale: float | None = None, softcap: float = 0.0, window: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """As :meth:`KVCache.attend`, for q ``[B, Hq, L, D]`` of the B ``sequences``, which may be of different lengths."""
        start, table = self._where(sequences)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return ops.attend(q, self.keys, self.values, start - q.shape[2], max(self.lengths[s] for s in sequences), self.value_dim,
                          mask, table, self.schemes[0].key, self.schemes[1].key, causal, scale, softcap, window,
                          self._centers(sequences) if softcap else None)  # fmt: skip

    def _centers(self, sequences: Sequence[int]) -> torch.Tensor:
        """``[B, H, 1, D]``."""
        return torch.stack([self.centers[s] for s in sequences])

    def _where(self, sequences: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths int64 ``[B]`` and the block table int32 ``[B, pages]``."""
        device, most = self.keys[0].device, max(len(self.sequences[s]) for s in sequences)
        rows = [self.sequences[s] + [0] * (most - len(self.sequences[s])) for s in sequences]
        return (torch.tensor([self.lengths[s] for s in sequences], device=device),
                torch.tensor(rows, dtype=torch.int32, device=device))  # fmt: skip
