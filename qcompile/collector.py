"""The garbage collector, kept still for as long as work that makes many objects, and no garbage, takes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection begins by itself meanwhile, in any thread; also a decorator. Where none would have, none will after it."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
