"""Is a searched policy better than a preset of the same bytes? The trained decoder, on text that the search has not seen."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import training

import qcompile
import qcompile.allocation
from qcompile.evaluation import parameter_bytes

SEEN, UNSEEN, BATCH = 8, 64, 8
"""Windows of 256 tokens that are searched on, and others that perplexity is over."""
INTEGERS = ("int2_g64", "int3_g64", "int4_g128", "int4_g64", "int5_g64", "int6_g64", "int8", "float")
MEASURED, CURVATURE = "search", "search by curvature"
SEARCHES: dict[str, dict[str, Any]] = {MEASURED: {}, "search, integers": {"formats": INTEGERS},
                                       CURVATURE: {"sensitivity": "curvature"}}  # fmt: skip
PRESETS: dict[str, Any] = {"int4_g128, all layers": {"*": "int4_g128"}, "mixed": "mixed", "int4": "int4"}


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """Each preset, then the choice for as many bytes: of all formats of the ladder, of integer ones alone, and by curvature, its
    estimates compared with the measured losses in the last row. Seconds are those of a machine that has kept no loss yet."""
    with tempfile.TemporaryDirectory() as empty, unittest.mock.patch.dict(os.environ, {"QCOMPILE_CACHE_DIR": empty}):
        return _rows()


def _rows() -> list[dict[str, Any]]:
    model, tokenizer, held_out = training.trained_decoder()
    ids = training.encode(tokenizer, [held_out])
    seen = _batches(ids[-SEEN * training.WINDOW :].view(SEEN, training.WINDOW))
    starts = torch.linspace(0, len(ids) - (SEEN + 1) * training.WINDOW, UNSEEN).long()
    unseen = _batches(ids[starts[:, None] + torch.arange(training.WINDOW)])
    rows, found = [], dict[str, qcompile.allocation.Search]()
    for name, preset in PRESETS.items():
        rows.append(_row(name, model, preset, unseen))
        budget = int(rows[-1]["bytes"])
        for label, settings in SEARCHES.items():
            began = time.perf_counter()
            again = label == CURVATURE and label in found  # estimates are not kept in the store, as losses are
            found[label] = found[label].at(budget) if again else qcompile.search(model, seen, budget, progress=False, **settings)
            taken = time.perf_counter() - began
            row, point = _row(f"{label} at the bytes of {name}", model, found[label].policy, unseen), found[label].point
            assert row["bytes"] == point.nbytes, f"{name}: the model has {row['bytes']} bytes, not {point.nbytes}"
            rows.append(row | {"used": row["bytes"] / budget, "predicted KL": point.predicted,
                               **({} if again else {"measured KL": found[label].measured}), "seconds": taken})  # fmt: skip
    return [*rows, _compared(found[CURVATURE], found[MEASURED])]


def _compared(estimated: qcompile.allocation.Search, measured: qcompile.allocation.Search) -> dict[str, Any]:
    """Estimated over measured losses of single layers, of all packed candidates: their geometric mean, least and most."""
    pairs = [(e.loss, m.loss) for one, other in zip(estimated.table.candidates, measured.table.candidates, strict=True)
             for e, m in zip(one, other, strict=True) if m.scheme is not None]  # fmt: skip
    ratios = sorted(e / m for e, m in pairs)
    return {"policy": "losses estimated by curvature over measured ones", "losses": len(ratios),
            "ratio": statistics.geometric_mean(ratios), "least ratio": ratios[0], "most": ratios[-1]}  # fmt: skip


def _batches(windows: torch.Tensor) -> list[dict[str, Any]]:
    return [{"input_ids": group.contiguous(), "use_cache": False} for group in windows.split(BATCH)]


def _row(name: str, model: torch.nn.Module, policy: Any, data: list[dict[str, Any]]) -> dict[str, Any]:
    """``bits`` are per weight of the linear layers; KL in nats a token to the float model."""
    packed = copy.deepcopy(model)
    report = qcompile.quantize_(packed, **data[0], policy=policy)
    found = qcompile.evaluate(model, packed, data)
    linear = {r.decision.site.storage: r for r in report.plan if r.decision.site.is_linear}.values()
    weights = sum(r.decision.site.shape[0] * r.decision.site.shape[1] for r in linear)
    return {"policy": name, "bytes": parameter_bytes(packed), "bits": 8 * sum(r.bytes_after for r in linear) / weights,
            "perplexity": found.perplexity, "over float": found.perplexity / found.reference_perplexity - 1,
            "KL": found.divergence, "agreement": found.agreement}  # fmt: skip
