"""Logs as users of PyTorch know them: ``TORCH_LOGS="+qcompile"``, or one of the artefacts ``qcompile_graph``,
``qcompile_plan``, ``qcompile_code``.

``import torch`` calls :func:`register` (see :mod:`.autoload`) before it reads ``TORCH_LOGS``. So this module
imports nothing of the package and little of torch.
"""

from __future__ import annotations

import logging

from torch._logging import _internal as registry

ARTIFACTS = {
    "qcompile_graph": "The graphs that qcompile is given, and those that it gives to Inductor.",
    "qcompile_plan": "What qcompile decided for every site of a graph, and why.",
    "qcompile_code": "The source of the kernels that qcompile generated.",
}

log = logging.getLogger("qcompile")


def register() -> None:
    """Makes the log and its artefacts known to PyTorch; once or many times."""
    registry.register_log("qcompile", "qcompile")
    for name, description in ARTIFACTS.items():
        registry.register_artifact(name, description, visible=True)
        artifact(name)


def artifact(name: str) -> logging.Logger:
    """The logger of an artefact; its messages are written when the artefact, or ``+qcompile``, is asked for."""
    made: logging.Logger = registry.getArtifactLogger("qcompile", name)
    return made


if not registry.log_registry.is_artifact("qcompile_plan"):  # without the entry point: TORCH_DEVICE_BACKEND_AUTOLOAD=0
    register()
