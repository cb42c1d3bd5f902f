"""A calibration as text: layers with their formats, methods and output errors before and after."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .plain import plain_table, printed

if TYPE_CHECKING:
    from ..calibration import Calibration


def text(calibration: Calibration) -> str:
    """One line for each parameter, in the order in which they were packed; what was left, and the means, below."""
    from rich.markup import escape

    table = plain_table("layer", "format", "method", "note", "error by nearest", "calibrated", words=4)
    for _, e in calibration:
        table.add_row(*map(escape, (e.layer, e.scheme.label, e.method, e.note, _error(e.nearest), _error(e.error))))
    for name in calibration.unseen:
        table.add_row(escape(name), "", "", "no graph used it: Dynamo ran its part eagerly, or no sample reaches it", "", "")
    return f"{printed(table)}\n{_summary(calibration)}"


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
