"""What a layer takes at best: the time to move its bytes, or to compute, whichever is longer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a device does at most: ``bandwidth`` in bytes/s read from memory, ``peak`` in FLOP/s of a matrix product."""

    bandwidth: float
    peak: float

    def bound(self, nbytes: int, flops: int) -> float:
        """Seconds below which no kernel moves ``nbytes`` and computes ``flops`` in the same arithmetic."""
        return max(nbytes / self.bandwidth, flops / self.peak)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a layer: the ``bound`` of the roofline, and as ``measured``."""

    bound: float
    measured: float
