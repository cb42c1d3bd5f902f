"""What each format costs at each layer: the loss when this one weight is packed and everything else is float."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .. import divergence
from ..comparison import Runs
from ..divergence import Sums, check_finite, output_of, sums
from ..errors import CompareError, FingerprintError
from ..formats import Scheme
from ..packing import digest
from ..store import code_version, count, the_store
from ..store.counters import MADE

log = logging.getLogger(__name__)

LOSS = "loss.json"
KL, SQUARES = "KL divergence, nats a position", "relative squared error"


class Sensitivity(Runs):
    """The float ``reference`` and its outputs on ``data``, against which it runs with weights replaced.

    ``measure``: what :meth:`loss` gives, :data:`KL` where every output is logits, else :data:`SQUARES`. Holds the outputs.
    Raises :class:`~qcompile.errors.CompareError` for no data and float outputs that are not finite.
    """

    def __init__(self, reference: nn.Module, data: Iterable[Any]) -> None:
        super().__init__(reference, data, None)
        self.outputs = [output_of(y, item) for y, item in zip(self.expected, self.data, strict=True)]
        self.expected = []
        for i, output in enumerate(self.outputs):
            check_finite(output.values, f"the float model, item {i}")
        if all(output.keep is not None and not output.keep.any() for output in self.outputs):
            raise CompareError("no data: every position of every item is masked; give items whose attention_mask has ones")
        self.measure = KL if all(output.classes for output in self.outputs) else SQUARES
        self._parts = self._fingerprint()

    def loss(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Of the model with ``weights``, by parameter name, in place of the float ones; 0 for equal outputs."""
        total = Sums()
        for i, (item, expected) in enumerate(zip(self.data, self.outputs, strict=True)):
            ours = output_of(self.output(weights, item), item)
            total += sums(ours.values, expected, f"with {', '.join(list(weights)[:3])} packed, item {i}")
        return max(0.0, total.divergence / total.positions) if self.measure == KL else total.relative_square

    def kept(self, layer: str, scheme: Scheme, make: Callable[[], float]) -> float:
        """The loss of ``layer`` alone in ``scheme``: from the store, or by ``make`` and then kept there."""
        if self._parts is None:
            return make()
        parts = self._parts | {"layer": layer, "scheme": scheme.key}
        found = the_store().find("sensitivity", parts)
        if found is not None:
            count("sensitivity read")
            return float(json.loads((found / LOSS).read_text()))
        loss = make()  # under no lock: measuring twice is better than a process that waits for minutes
        count(MADE["sensitivity"])
        the_store().keep("sensitivity", parts, lambda folder: Path(folder, LOSS).write_text(json.dumps(loss)))
        return loss

    def _fingerprint(self) -> dict[str, Any] | None:
        """Everything that decides a loss but layer and scheme; None where it cannot be told, which is said once."""
        leaves, structure = pytree.tree_flatten(self.data)
        try:
            return {
                "code": code_version("qcompile.formats", "qcompile.codegen"),
                "loss": hashlib.sha256(inspect.getsource(divergence).encode()).hexdigest(),
                "torch": torch.__version__,
                "model": f"{type(self.reference).__module__}.{type(self.reference).__qualname__}",
                "weights": {name: digest(t) for name, t in _state(self.reference)},
                "data": [digest(v) if isinstance(v, torch.Tensor) else v for v in leaves],
                "structure": str(structure),
                "outputs": [digest(output.values) for output in self.outputs],
                "device": self.outputs[0].values.device.type,
                "measure": self.measure,
            }
        except FingerprintError as error:
            log.warning("sensitivities are measured and not kept: %s", error)
            return None


def _state(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
