"""Generated sources, each generated once on a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from ..store import code_version, the_store

TEXT = "source.txt"


def parts_of(language: str, schemes: tuple[str, ...]) -> dict[str, Any]:
    """What names a source in the store."""
    return {"language": language, "schemes": list(schemes), "code": code_version("qcompile.formats", "qcompile.codegen"),
            "sympy": sympy.__version__}  # fmt: skip


def kept_source(language: str, schemes: tuple[str, ...], generate: Callable[[], str]) -> str:
    """What ``generate()`` gives for ``schemes`` (keys, which hold their formats' fingerprints), from the store if it has it."""
    with the_store().making("source", parts_of(language, schemes)) as slot:
        if slot.found is not None:
            return (slot.found / TEXT).read_text(encoding="utf-8")
        text = generate()
        slot.put(lambda folder: (folder / TEXT).write_text(text, encoding="utf-8"))
        return text
