"""Constant tables of a generated C++ source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .cpp_expr import float_literal


@dataclass
class Tables:
    """Collects the lines that define tables; each is defined once."""

    lines: list[str] = field(default_factory=list)

    def floats(self, name: str, values: Sequence[float], length: int = 0) -> str:
        """Name of a float32 table of ``values``, repeated up to ``length``."""
        text = ", ".join(float_literal(_float32(v)) for v in repeated(values, length))
        return self._define("float", f"TABLE_{name}", text, max(length, len(values)))

    def bf16(self, name: str, values: Sequence[float], length: int) -> str:
        """Name of a table of the bfloat16 patterns of ``values``, repeated up to ``length``."""
        bits = torch.tensor(repeated(values, length)).to(torch.bfloat16).view(torch.int16).tolist()
        return self._define("uint16_t", f"BF16_{name}", ", ".join(f"0x{v & 0xFFFF:04x}" for v in bits), len(bits))

    def bytes(self, name: str, values: Sequence[int], length: int) -> str:
        """Name of a table of unsigned bytes, repeated up to ``length``."""
        text = ", ".join(map(str, repeated(values, length)))
        return self._define("uint8_t", f"BYTES_{name}", text, max(length, len(values)))

    def _define(self, kind: str, name: str, values: str, length: int) -> str:
        line = f"alignas(64) static const {kind} {name}[{length}] = {{{values}}};"
        if line not in self.lines:
            self.lines.append(line)
        return name


def repeated(values: Sequence[float], length: int) -> list:  # type: ignore[type-arg]
    """``values`` over again up to ``length``, so that index bits beyond the code's own do not matter."""
    return list(values) * max(1, length // len(values))


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
