"""Rounds weights by GPTQ: runs the float graph once on the call's own inputs and asks each linear layer what it is given.

Layers go in graph order, and each passes on what its rounded weight computes, so that later layers are fitted to the
errors of earlier ones. One Hessian is alive at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node

from qcompile.calibrate import gptq
from qcompile.errors import FingerprintError
from qcompile.formats import FormatSpec, reference
from qcompile.formats.spec import TILE_N
from qcompile.packing import Packed, known, packed
from qcompile.store import code_version, the_store

from .fingerprint import fingerprint
from .trace import op_name, operand, resolve
from .vocabulary import WEIGHT_OPERANDS

GPTQ = "rounded by GPTQ"
UNSEEN = "the layer's inputs were not seen before it was packed"
ROUNDED = "rounded.json"
NOT_MULTIPLIED = "no linear layer of this graph multiplies by it"
CHUNK_ELEMENTS = 1 << 24
"""Inputs and weights widened to float32 at a time."""

Planes = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Weight:
    """A weight to round: its ``layer``, for messages, its ``format``, and whether it is stored ``[K, N]``."""

    layer: str
    format: FormatSpec
    transposed: bool = False


def rounded(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], weights: Mapping[str, Weight]
) -> dict[str, Packed | str]:
    """``weights``, by the name of the placeholder, as GPTQ packs them; or the reason why it does not pack one.

    ``example_inputs`` are the real tensors of the call; tensors other than parameters are copied first, so that caches
    which the graph writes to stay as they are, and so does the state of random numbers. A weight used several times is
    fitted to the inputs of its first use alone. The same graph on the same values is run once on a machine. Raises
    :class:`~qcompile.errors.WeightError`, naming the layer, for weights or inputs with NaN or infinite values.
    """
    found: dict[str, Packed | str] = {name: gptq.why_not(w.format) or NOT_MULTIPLIED for name, w in weights.items()}
    served = {name: w for name, w in weights.items() if found[name] == NOT_MULTIPLIED}
    if not served:
        return found
    if any(isinstance(v, torch._subclasses.FakeTensor) for v in example_inputs):
        return found | dict.fromkeys(served, "the inputs are fake tensors")
    values = dict(zip((n.name for n in gm.graph.find_nodes(op="placeholder")), example_inputs, strict=True))
    try:
        parts = {"graph": fingerprint(gm, example_inputs), "formats": {n: w.format.fingerprint for n, w in served.items()},
                 "code": code_version("qcompile.passes", "qcompile.calibrate"), "torch": torch.__version__}  # fmt: skip
    except FingerprintError:
        return found | _packed(values, served, _run(gm, example_inputs, served), None)
    with the_store().making("calibration", parts) as slot:
        if slot.found is not None and (kept := _kept(slot.found, values, served, parts)) is not None:
            return found | kept
        made = _run(gm, example_inputs, served)
        slot.put(lambda folder: (folder / ROUNDED).write_text(json.dumps(list(made))))
        return found | _packed(values, served, made, parts)


def _kept(folder: Path, values: Mapping[str, Any], served: Mapping[str, Weight], parts: Any) -> dict[str, Packed] | None:
    """What an earlier run rounded, if the store still has all of it."""
    found = {}
    for name in json.loads((folder / ROUNDED).read_text()):
        weight = served[name]
        packed = known(values[name], weight.format, transposed=weight.transposed, rounding=["gptq", name, parts])
        if packed is None:
            return None
        found[name] = packed
    return found


def _packed(
    values: Mapping[str, Any], served: Mapping[str, Weight], made: Mapping[str, Planes], parts: Any
) -> dict[str, Packed]:
    """The planes of a run with what reports tell of them, kept under ``parts``; None: not kept."""
    found = {}
    for name, planes in made.items():
        w = served[name]
        found[name] = packed(values[name], w.format, transposed=w.transposed, layer=w.layer, planes=planes,
                             rounding=None if parts is None else ["gptq", name, parts])  # fmt: skip
    return found


def _run(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], weights: Mapping[str, Weight]) -> dict[str, Planes]:
    devices = {v.device for v in example_inputs if isinstance(v, torch.Tensor) and v.is_cuda}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(list(devices)):
        run = _Calibration(gm, weights)
        try:
            run.run(*map(_own, example_inputs))
        except Exception as error:
            error.add_note("raised while qcompile ran the graph once for rounding='gptq'; rounding='nearest' needs no run")
            raise
    return run.planes


def _own(value: Any) -> Any:
    """A graph input that the run may overwrite: parameters as they are, symbolic numbers as those of this call."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, nn.Parameter) else value.clone()
    symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return value.node.hint if symbolic else value


class _Calibration(Interpreter):
    """Runs the graph; before a linear-like node, rounds its weight and puts the rounded one in its place."""

    def __init__(self, gm: torch.fx.GraphModule, weights: Mapping[str, Weight]) -> None:
        super().__init__(gm)
        self.planes: dict[str, Planes] = {}
        self._weights = {n: weights[n.name] for n in gm.graph.find_nodes(op="placeholder") if n.name in weights}
        self._latest: tuple[Node, int, gptq.Curvature] | None = None

    def run_node(self, n: Node) -> Any:
        name = op_name(n)
        if name in WEIGHT_OPERANDS:
            (x, *x_words), (w, *w_words) = WEIGHT_OPERANDS[name]
            right = operand(n, w, *w_words)
            source = resolve(right, self._weights)  # type: ignore[arg-type]  # only its keys are looked at
            inputs = operand(n, x, *x_words)
            if source.parameter is not None and source.computed is None and isinstance(inputs, Node):
                self._put_rounded(source.parameter, right, inputs, name == "linear")  # type: ignore[arg-type]
        return super().run_node(n)

    def _put_rounded(self, parameter: Node, right: Node, inputs: Node, is_linear: bool) -> None:
        """Rounds the weight at its first use; gives the rounded one to this use and to later ones.

        For a weight with several uses the sum of all their Hessians would be the better one; it is only known at the end.
        """
        weight, value = self._weights[parameter], self.env[right]
        matrix = value if is_linear else value.t()
        n, k = matrix.shape
        if parameter.name not in self.planes:
            curvature = self._curvature(inputs, weight.format.whole(k), weight.layer)
            self.planes[parameter.name] = tuple(gptq.quantize(weight.format, matrix, curvature, weight.layer))
        decoded = _decoded(weight.format, self.planes[parameter.name], n, k, value.dtype)
        self.env[right] = decoded if is_linear else decoded.t()

    def _curvature(self, inputs: Node, cols: int, layer: str) -> gptq.Curvature:
        """That of a node's value; kept until another is asked for, since q, k and v, or gate and up, share their inputs."""
        if self._latest is None or self._latest[:2] != (inputs, cols):
            self._latest = None
            self._latest = inputs, cols, gptq.Curvature.of(hessian(self.env[inputs]), cols, layer)
        return self._latest[2]


def hessian(x: torch.Tensor) -> torch.Tensor:
    """Sum of x xᵀ over the rows of ``x`` ``[..., K]``: float32 ``[K, K]``."""
    rows = x.reshape(-1, x.shape[-1])
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
    for part in rows.split(max(1, CHUNK_ELEMENTS // x.shape[-1])):
        wide = part.to(torch.float32)
        total.addmm_(wide.t(), wide)
    return total


def _decoded(spec: FormatSpec, planes: Planes, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The ``[N, K]`` weight in ``dtype``, made in row chunks, since decoding works in float32."""
    out = torch.empty(n, k, dtype=dtype, device=planes[0].device)
    step = max(1, CHUNK_ELEMENTS // k // TILE_N) * TILE_N
    for start in range(0, n, step):
        part = out[start : start + step]
        part.copy_(reference.decode(spec, reference.tile_rows(spec, planes, start, len(part)), len(part), k))
    return out
