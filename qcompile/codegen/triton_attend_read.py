"""Reads packed keys and values in attention kernels: functions for each format, whose calls look alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.algebra import gen_table
from ..formats.spec import ROW
from . import triton_decode as decode
from . import triton_text as text
from .triton_print import Printer


def hoists(printer: Printer) -> bool:
    """Whether scales are applied outside of the products."""
    return printer.granule == ROW


def shifts(printer: Printer) -> bool:
    """Whether the offset of a row is applied outside of the products."""
    return hoists(printer) and printer.form.offset != 0


def lift(printer: Printer) -> float:
    """A power of two near the largest ``gen``: coeff times this is as large as a token's values, so that probabilities times
    that are no smaller in float16 than the values themselves."""
    table = gen_table(printer.spec)
    largest = float(table[torch.isfinite(table)].abs().max())
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0


def reader(printer: Printer, name: str, values: bool) -> str:
    """A function that loads and decodes the keys or ``values`` of BT tiles of 16 tokens.

    ``tile`` int64 [BT] counts tiles of 16 tokens over all pages and heads; ``kept`` [BT·16] says which tokens count: values
    of others become zero whatever is stored. Gives [BT·16, BK] in ``DEC``; keys have the order of channels that
    :func:`channels` names. Then, if scales leave the product, coeff (times the unit of elements) and perhaps offset [BT·16].
    """
    arguments = (f"{text.plane_arguments(printer)}, local_tile, kept, "
                 + text.constexprs("KP", "BT", "BK", "PAIR", "DEC"))  # fmt: skip
    body = [
        "L: tl.constexpr = 16",
        "EVEN: tl.constexpr = KP == BK",
        "first_tile: tl.constexpr = 0",
        "step: tl.constexpr = 0",
        *decode.loads(printer),
        *(_zeroed(printer) if values else ()),
        *(decode.elements(printer) if hoists(printer) else decode.values(printer)),
        *_ordered(printer, values),
        *_factors(printer, values),
    ]
    return text.kernel(name, arguments, body)


def _zeroed(printer: Printer) -> Iterator[str]:
    """Words and scales of tokens that do not count: 0 times a stored NaN would be NaN."""
    for part, r in printer.words:
        name = f"q_{part.name}_{r}"
        yield f"{name} = tl.where(tl.reshape(kept, [BT, 1, L]), {name}, 0)"
    for plane in printer.spec.scales:
        zero = f"tl.zeros_like(v_{plane.name})"
        yield f"v_{plane.name} = tl.where(tl.reshape(kept, [BT, 1, 1, L]), v_{plane.name}, {zero})"


def _ordered(printer: Printer, values: bool) -> Iterator[str]:
    """``g`` [BT·L, BK]. Keys have the bytes of a word where a thread of the left operand's layout holds them."""
    if values:
        yield "g = tl.reshape(tl.permute(g, 0, 2, 1, 3), [BT * L, BK]).to(DEC)"
        return
    yield f"g = tl.reshape(g, [BT, BG, L, {printer.group} // PAIR, PAIR])"
    yield "g = tl.reshape(tl.permute(g, 0, 2, 3, 1, 4), [BT * L, BK]).to(DEC)"


def _factors(printer: Printer, values: bool) -> Iterator[str]:
    if not hoists(printer):
        yield "return g"
        return
    unit = repr(lift(printer)) if values else "UNIT"
    coeff, offset = printer.form.coeff, printer.form.offset
    found = [f"({text.factor(printer, coeff)}) * {unit}" if coeff.free_symbols else None]
    if offset != 0:
        found.append(text.factor(printer, offset) if offset.free_symbols else None)
    numbers = [repr(0.0 if e.free_symbols else float(e)) for e in (coeff, offset)]
    numbers[0] += f" * {unit}"
    shaped = [f"tl.reshape({e}, [BT * L])" if e else f"tl.full([BT * L], {n}, tl.float32)"
              for e, n in zip(found, numbers, strict=False)]  # fmt: skip
    yield f"return g, {', '.join(shaped)}"


def channels(printer: Printer) -> list[str]:
    """``d`` [BK]: the channels of a query in the order that :func:`reader` gives those of keys."""
    group = printer.group
    return ["order = tl.arange(0, BK)", f"KG: tl.constexpr = BK // {group}",
            f"d = order % PAIR + PAIR * (order // PAIR // KG) + {group} * (order // PAIR % KG)"]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The formats of keys and values, and the names of the functions that read them."""

    keys: Printer
    values: Printer
    read_keys: str
    read_values: str

    def planes(self) -> str:
        names = [f"{side}_{part.name}" for side, printer in (("k", self.keys), ("v", self.values)) for part in printer.spec.parts]
        return ", ".join(names)

    def read(self, side: str) -> str:
        """The call that reads one block of tokens; its planes are named ``k_…`` or ``v_…``."""
        printer, name = (self.keys, self.read_keys) if side == "k" else (self.values, self.read_values)
        planes = ", ".join(f"{side}_{part.name}" for part in printer.spec.parts)
        sizes = "KP, BT, BK, PAIR, DOT" if side == "k" else "VP, BT, BV, PAIR, DOT"
        results = ["g", *([f"{side}_coeff"] if hoists(printer) else []), *([f"{side}_offset"] if shifts(printer) else [])]
        return f"{', '.join(results)} = {name}({planes}, place, kept, {sizes})"
