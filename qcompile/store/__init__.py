"""One store for everything that qcompile makes: packed weights, calibrations, generated sources, compiled libraries, plans.

What is in it is named by what it was made from (:mod:`.keys`), appears whole or not at all, and is checked before use
(:mod:`.store`). Nothing here imports torch.
"""

from __future__ import annotations

from .counters import COUNTS, count
from .keys import code_version, key_of
from .store import USED, Slot, Store, the_store

__all__ = ["COUNTS", "USED", "Slot", "Store", "code_version", "count", "key_of", "the_store"]
