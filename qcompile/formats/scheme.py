"""A scheme: what a linear layer's weight is stored as, and what its activations are quantized to."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FormatError, UnknownFormatError
from .algebra import codebook_of_gen, integer_gen
from .spec import FormatSpec

ACTIVATIONS = {"int8": 127.0, "fp8": 448.0}
"""Activation types and the largest magnitude that a token's absolute maximum is mapped to."""


def activations_of(spec: FormatSpec) -> tuple[str, ...]:
    """Types of activations that a format's codes can be multiplied by in 8-bit units: "int8" if ``gen`` is an integer times
    a power of two, within a byte; "fp8" if it is e4m3 or e5m2."""
    book = codebook_of_gen(spec)
    fp8 = book is not None and book.minifloat is not None and book.cast is not None
    return (("int8",) if integer_gen(spec) is not None else ()) + (("fp8",) if fp8 else ())


@dataclass(frozen=True)
class Scheme:
    """``format`` of the weight and type of the ``activations`` (None: as they come; "int8", "fp8": dynamic per token).

    Per token: scale = max|x| over the K inputs of a row / 127 (int8) or / 448 (fp8 e4m3).
    Raises :class:`FormatError` when the format cannot be multiplied by such activations.
    """

    format: FormatSpec
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.activations is None:
            return
        if self.activations not in ACTIVATIONS:
            raise FormatError(f"activations={self.activations!r}: use None, 'int8' or 'fp8'")
        if self.activations not in activations_of(self.format):
            legal = "formats with integer values" if self.activations == "int8" else "fp8 formats"
            raise FormatError(f"activations={self.activations!r} go with {legal}; {self.format.name} is not one")

    @property
    def key(self) -> str:
        """The name under which operators find this scheme, with the format's fingerprint: never another's kernel."""
        tail = f"+{self.activations}" if self.activations else ""
        return f"{self.format.name}@{self.format.fingerprint}{tail}"

    @property
    def label(self) -> str:
        """Short name for reports: ``int4_g128``, ``int8+int8 activations``."""
        return f"{self.format.name}+{self.activations} act" if self.activations else self.format.name


_schemes: dict[str, Scheme] = {}


def register_scheme(scheme: Scheme) -> str:
    """Makes ``scheme`` known to the operators of this process; returns its key."""
    return _schemes.setdefault(scheme.key, scheme).key


def scheme_of(key: str) -> Scheme:
    """The scheme of an operator's key. Raises :class:`UnknownFormatError` for one this process does not have.

    Registered formats are found by themselves, so that graphs from a compilation cache run in a fresh process.
    """
    if key not in _schemes:
        from . import find

        name, _, rest = key.partition("@")
        _, _, activations = rest.partition("+")
        spec = find(name)
        found = Scheme(spec, activations or None) if spec is not None else None
        if found is None or found.key != key:
            raise UnknownFormatError(key, _schemes)
        register_scheme(found)
    return _schemes[key]
