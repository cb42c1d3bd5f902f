"""Which entries of a bundle that anyone may have made can be taken.

Sources and libraries are code. A source is taken if this installation generates the same text for the same schemes; a library is
not: it is compiled again from such a text. Weights, plans and calibrations are data, and taken if they can be read; whether
their values are right is for whoever made them, as with any checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from .codegen import cpp, cpp_attention, cpp_build, cpp_call, triton, triton_attend_prefill
from .codegen.kept import parts_of
from .codegen.triton_attention import TritonAttention
from .errors import FormatError, LayoutError, UnknownFormatError
from .formats import find, scheme_of
from .formats.layout import check_planes, matrix_shape
from .store.entry import FILES, Entry

GENERATORS: dict[str, Callable[..., str]] = {
    "cpp": lambda key: cpp.source(scheme_of(key)),
    "cpp attention": lambda keys, values: cpp_attention.source(scheme_of(keys).format, scheme_of(values).format),
    "triton": lambda key: triton.source(scheme_of(key)),
    "triton by bits": lambda key: triton.source(scheme_of(key), permutes=False),
    "triton attention": lambda keys, values: TritonAttention(scheme_of(keys), scheme_of(values)).readers(),
    "triton cache": lambda keys, values: TritonAttention(scheme_of(keys), scheme_of(values)).writers(),
    "triton prefill": triton_attend_prefill.source,
}
"""What generates the sources of a language from the keys of schemes; others are taken with trust alone."""


class Verified:
    """Asked of every entry of a bundle, in its order, whether to take it; what it was asked before can vouch for what comes."""

    def __init__(self) -> None:
        include = resources.files("qcompile.codegen") / "include"
        own = [cpp_call.source(), *((include / name).read_text() for name in ("repack.cpp", "moments.cpp"))]
        self._texts = {hashlib.sha256(text.encode()).hexdigest(): text for text in own}
        self.compiled = 0

    def __call__(self, entry: Entry, folder: Path) -> bool:
        return getattr(self, f"_{entry.kind}")(entry, folder)  # type: ignore[no-any-return]

    def _packed(self, entry: Entry, folder: Path) -> bool:
        """Of a format that is known here, with the planes of the weight that it says it is."""
        from safetensors import SafetensorError, safe_open

        try:
            name, _, fingerprint = entry.parts["format"].partition("@")
            n, k = matrix_shape(entry.parts["shape"], entry.parts["transposed"])
            spec = find(name)
            if spec is None or spec.fingerprint != fingerprint:
                return False
            with safe_open(folder / FILES["packed"][0], "pt") as file:  # type: ignore[no-untyped-call]
                float(json.loads(file.metadata()["sqnr_db"]))
                check_planes(spec, [file.get_tensor(name) for name in spec.part_names], n, k)
        except (SafetensorError, LayoutError, KeyError, TypeError, ValueError, AttributeError):
            return False
        return True

    def _plan(self, entry: Entry, folder: Path) -> bool:
        return _json(folder, "plan") is True

    def _calibration(self, entry: Entry, folder: Path) -> bool:
        names = _json(folder, "calibration")
        return isinstance(names, list) and all(isinstance(name, str) for name in names)

    def _tile(self, entry: Entry, folder: Path) -> bool:
        return _json(folder, "tile") == {"spills": True}

    def _product(self, entry: Entry, folder: Path) -> bool:
        times = _json(folder, "product")
        return isinstance(times, dict) and times.keys() == {"ours", "other"} and all(map(_is_size, times.values()))

    def _sensitivity(self, entry: Entry, folder: Path) -> bool:
        return _is_size(_json(folder, "sensitivity"))

    def _source(self, entry: Entry, folder: Path) -> bool:
        language, schemes = entry.parts.get("language"), entry.parts.get("schemes")
        generate = GENERATORS.get(language) if isinstance(language, str) else None
        if generate is None or not isinstance(schemes, list) or not all(isinstance(s, str) for s in schemes):
            return False
        if dict(entry.parts) != parts_of(str(language), tuple(schemes)):
            return False  # made by another version, which would not find it here either
        try:
            text = generate(*schemes)
        except (UnknownFormatError, FormatError, TypeError, KeyError):
            return False
        self._texts[hashlib.sha256(text.encode()).hexdigest()] = text
        return (folder / FILES["source"][0]).read_text(encoding="utf-8", errors="replace") == text

    def _library(self, entry: Entry, folder: Path) -> bool:
        """Never: what it would be is compiled here, where the text and the compiler are ones that this machine asks for."""
        text = self._texts.get(str(entry.parts.get("source")))
        for flags in (*cpp_build.every_flags(), cpp_call.flags()):
            if text is not None and dict(entry.parts) == cpp_build.library_parts(text, flags):
                cpp_build.built(text, flags)
                self.compiled += 1
        return False


def _is_size(value: Any) -> bool:
    """Whether ``value`` is a number that losses and times can be."""
    return isinstance(value, float) and math.isfinite(value) and value >= 0


def _json(folder: Path, kind: str) -> Any:
    try:
        return json.loads((folder / FILES[kind][0]).read_bytes())
    except (ValueError, RecursionError):
        return None
