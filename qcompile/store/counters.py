"""What this process made, and what it found made already."""

from __future__ import annotations

import threading
from collections import Counter

MADE = {"packed": "quantized", "source": "generated", "library": "compiled", "calibration": "calibrated", "plan": "planned",
        "tile": "tuned", "product": "timed", "sensitivity": "measured"}  # fmt: skip
"""What making an entry of each kind is called."""

COUNTS: Counter[str] = Counter()
"""The values of :data:`MADE` count what was made; ``… read`` what the store had;
``… given up`` what could not be kept, ``waits`` those for another process, ``quarantined`` damaged entries."""

_lock = threading.Lock()


def count(name: str, by: int = 1) -> None:
    """Adds ``by`` to a counter; safe from any thread."""
    with _lock:
        COUNTS[name] += by
