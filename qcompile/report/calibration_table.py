"""A calibration as text: layers with their formats, methods and output errors before and after."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from .table import WIDE

if TYPE_CHECKING:
    from ..calibration import Calibration


def text(calibration: Calibration) -> str:
    """One line for each parameter, in the order in which they were packed; what was left, and the means, below."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "format", "method", "error by nearest", "calibrated", "note"):
        table.add_column(name, justify="right" if name in ("error by nearest", "calibrated") else "left", no_wrap=True)
    for _, e in calibration:
        table.add_row(*map(escape, (e.layer, e.scheme.label, e.method, _error(e.nearest), _error(e.error), e.note)))
    for name in calibration.unseen:
        table.add_row(escape(name), "", "", "", "", "no graph used it: Dynamo ran its part eagerly, or no sample reaches it")
    out = io.StringIO()
    Console(file=out, width=WIDE, color_system=None, force_terminal=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, _summary(calibration)])


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _summary(calibration: Calibration) -> str:
    done = [e for _, e in calibration if e.method == calibration.method]
    pairs = [(e.nearest, e.error) for e in done if e.nearest and e.error]
    head = f"{len(done)} of {len(calibration)} weights calibrated by {calibration.method} on {calibration.samples} samples"
    if not pairs:
        return head
    ratio = math.exp(sum(math.log(error / near) for near, error in pairs) / len(pairs))
    return f"{head}; outputs' errors are {ratio:.2f} of those by rounding to nearest (geometric mean)"
