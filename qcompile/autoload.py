"""What ``import torch`` is told of qcompile, through the entry point ``torch.backends``: names of logs, which must be known
before ``TORCH_LOGS`` is read, and the kind of artifacts that ``torch.compiler.load_cache_artifacts`` may meet."""

from __future__ import annotations


def register() -> None:
    """Called once by ``import torch``; imports little of torch and nothing else that is heavy."""
    from . import artifacts, logs

    logs.register()
    artifacts.register()
