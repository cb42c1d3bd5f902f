"""Our errors, raised through Dynamo, as themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch._dynamo.exc import (
    BackendCompilerFailed,
    ShortenTraceback,
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
)

from .errors import QCompileError

RESTARTS = (UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis)
"""What Dynamo lets through from a backend, to trace again."""


@contextlib.contextmanager
def as_themselves() -> Iterator[None]:
    """Dynamo wraps what a backend raises, except its own ``ShortenTraceback``. So that ``except PolicyError`` works at the
    call of a compiled model, a qcompile error leaves the backend as a subclass of both."""
    try:
        yield
    except BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, QCompileError):
            raise failed.inner_exception from None
        raise
    except QCompileError as error:
        both = type(type(error).__name__, (type(error), ShortenTraceback), {"__module__": type(error).__module__})
        raised = both.__new__(both, *error.args)
        raised.args, raised.first_useful_frame = error.args, None
        for note in getattr(error, "__notes__", ()):
            raised.add_note(note)
        raise raised from None
