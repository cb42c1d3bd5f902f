"""What Python's garbage collector goes through while qcompile is at work."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_aside = False


@contextlib.contextmanager
def all_in_sight() -> Iterator[None]:
    """For who asks it for objects: none is set aside, and it begins nothing by itself, for a list of all objects is one that it
    would go through, again and again."""
    bring_back()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def set_aside() -> None:
    """It goes through no object that lives now, until :func:`bring_back`; through those that come, as ever.

    A trace makes a hundred thousand objects that live as long as it does, beside half a million of PyTorch's: the collector
    would go through all of them when a quarter has come on top, and find nothing. Where the program has frozen objects itself,
    nothing is done, for they could not be told apart afterwards.
    """
    global _aside
    if gc.isenabled() and not gc.get_freeze_count():
        _aside = True
        gc.freeze()


def bring_back() -> None:
    """The collector goes through everything again."""
    global _aside
    if _aside:
        _aside = False
        gc.unfreeze()
