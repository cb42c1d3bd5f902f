"""Plans: bytes, totals, merging, saving; and the report made of them."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from rich.console import Console

from qcompile.errors import PolicyError, StrictError, UnknownFormatError
from qcompile.formats import Scheme, get
from qcompile.plan import SCHEMA, Decision, Plan, Record, Site
from qcompile.report import Machine, Report, Timing
from qcompile.report.table import COLUMNS, decibels, size
from qcompile.store import COUNTS

INT8, INT4 = Scheme(get("int8")), Scheme(get("int4_g128"))


def site(name: str, operator: str = "linear", shape: tuple[int, ...] = (64, 256), **fields: object) -> Site:
    given = {
        "node": name,
        "weight": f"p_{name}",
        "parameter": f"{name}.weight",
        "dtype": torch.bfloat16,
    } | fields
    return Site(name, operator, shape=shape, **given)  # type: ignore[arg-type]


def record(
    name: str,
    scheme: Scheme | None = None,
    sqnr: float | None = None,
    reason: str = "no rule matches",
    **fields: object,
) -> Record:
    where = site(name, **fields)  # type: ignore[arg-type]
    wanted = scheme or (INT8 if reason != "no rule matches" else None)
    return Record.of(
        Decision(where, scheme, "*: int8", None if scheme else reason, wanted),
        scheme and f"cpp {scheme.label}",
        sqnr,
    )


PLAN = Plan(
    (
        record("embed", operator="embedding", shape=(100, 256), roles=frozenset({"embed_tokens"})),
        record("up", INT8, 41.25, roles=frozenset({"mlp.up_proj", "mlp.gate_proj"})),
        record("down", INT4, math.inf, shape=(256, 64), transposed=True),
        record("attn", operator="attention", shape=(1, -1, 4, 8), weight=None, parameter=None),
        record("head", shape=(100, 256), reason="the weight is tied", parameter="embed.weight"),
    )
)


def test_bytes_follow_from_shape_and_format() -> None:
    up, down, attention, head = PLAN.records[1:]
    assert (up.bytes_before, up.bytes_after) == (64 * 256 * 2, 64 * 256 + 64 * 4)
    assert (down.bytes_before, down.bytes_after) == (
        256 * 64 * 2,
        256 * 128 // 2 + 256 * 4,
    )  # K = 64 is padded to 128
    assert (attention.bytes_before, attention.bytes_after) == (0, 0)
    assert head.bytes_before == head.bytes_after == 100 * 256 * 2


def test_totals_count_a_tied_weight_once() -> None:
    totals = PLAN.totals()
    table, layers = 100 * 256 * 2, 64 * 256 * 2 * 2
    assert (totals.sites, totals.quantized) == (5, 2)
    assert totals.bytes_before == table + layers
    assert totals.bytes_after == table + sum(r.bytes_after for r in PLAN.records[1:3])
    assert totals.share == pytest.approx(layers / (table + layers))
    assert Plan().totals().share == 0.0


def test_merging_replaces_sites_by_name_and_operator() -> None:
    later = [record("up", INT4), record("up", operator="embedding"), record("new", INT8)]
    merged = PLAN.merge(later)
    assert [r.decision.site.key for r in merged] == [
        *(r.decision.site.key for r in PLAN),
        ("up", "embedding"),
        ("new", "linear"),
    ]
    assert merged.records[1] == later[0] and len(PLAN) == 5
    assert merged.merge(merged) == merged


def test_plans_survive_json() -> None:
    text = PLAN.to_json()
    assert Plan.from_json(text) == PLAN
    content = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert content["version"] == SCHEMA and content["totals"]["quantized"] == 2
    first = content["records"][1]
    assert (
        first["roles"] == ["mlp.gate_proj", "mlp.up_proj"]
        and first["scheme"] == INT8.key
        and first["sqnr_db"] == 41.25
    )
    assert content["records"][2]["sqnr_db"] == "inf" and content["records"][0]["sqnr_db"] is None


def test_plans_of_another_release_or_unknown_formats_are_refused() -> None:
    content = PLAN.as_dict()
    with pytest.raises(PolicyError, match="schema version 99"):
        Plan.from_json(json.dumps(content | {"version": 99}))
    content["records"][1]["scheme"] = "int9@0000000000000000"
    with pytest.raises(UnknownFormatError, match="int9"):
        Plan.from_json(json.dumps(content))


def test_strict_lists_what_was_meant_and_left() -> None:
    with pytest.raises(StrictError) as error:
        PLAN.require_all()
    message = str(error.value)
    assert (
        "1 of 5 sites" in message
        and "head (linear): the weight is tied, asked for int8 by *: int8" in message
    )
    assert "embed" not in message
    Plan(PLAN.records[:4]).require_all()


def test_sites_have_known_operators() -> None:
    with pytest.raises(ValueError, match="'conv'"):
        site("x", "conv")


def test_report_is_whole_where_there_is_no_terminal() -> None:
    long = "model.layers.17.a_module_with_a_name.that_is_longer_than_most.projection_of_something_or_other"
    report = Report(PLAN.merge([record(long, reason="a reason that takes many words " * 4)]))
    out = io.StringIO()
    report.print(Console(file=out, width=40))
    text = out.getvalue().rstrip("\n")
    assert text == str(report) and "\x1b" not in text
    (line,) = (line for line in text.splitlines() if long in line)
    assert ("a reason that takes many words " * 4).strip() in line
    assert all(name in text.splitlines()[1] for name in COLUMNS)


def test_report_shows_every_field_and_totals() -> None:
    text = str(Report(PLAN))
    line = {row.split()[0]: row for row in text.splitlines() if row.strip()}
    assert all(
        word in line["up"]
        for word in ("64×256", "int8", "cpp int8", "*: int8", "32.8 kB → 16.6 kB", "41.2 dB")
    )
    assert "exact" in line["down"] and "256×64" in line["down"] and "1×?×4×8" in line["attn"]
    assert "bfloat16" in line["head"] and "51.2 kB" in line["head"] and "the weight is tied" in line["head"]
    assert "2 of 5 sites quantized; 56.1% of the linear layers' weights; 117 kB → " in text
    assert "2 × no rule matches" in text and "1 × the weight is tied" in text
    assert json.loads(Report(PLAN).to_json()) == PLAN.as_dict() | {"cache": dict(COUNTS), "products": []}


@pytest.mark.parametrize("width", [100, 160])
def test_report_on_a_terminal_fits_and_escapes_markup(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    Report(Plan((record("layers[0].up", INT8, 40.0),))).print(console)
    lines = out.getvalue().splitlines()
    assert any("layers[0].up" in line and "40.0 dB" in line for line in lines)
    assert max(map(len, lines)) <= width and any(line.startswith("1 of 1 sites quantized") for line in lines)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (5 * 10**12, "5.00 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_decibels() -> None:
    assert [decibels(x) for x in (None, 31.25, math.inf)] == ["", "31.2 dB", "exact"]


def layers(count: int) -> Plan:
    """Equal layers that differ in their SQNR, and one that was left."""
    found = [record(f"m.layers.{i}.up", INT8, 40.0 + i, flops=1000) for i in range(count)]
    left = [record(f"m.layers.{i}.attn", reason=f"rule says 'm.layers.{i}.attn'", operator="attention", weight=None)
            for i in range(count)]  # fmt: skip
    return Plan((*found, *left, record("m.head", INT4, 20.0, flops=3000, roles=frozenset({"lm_head"}))))


def test_equal_layers_are_one_row_with_their_sums() -> None:
    report = Report(layers(32))
    text = str(report)
    (row,) = (line for line in text.splitlines() if "m.layers.{0…31}.up" in line)
    assert " 32 " in row and "40.0…71.0 dB" in row and "1.05 MB → " in row
    assert "32 × rule says 'm.layers.{0…31}.attn'" in text and "100.0% of their 35.0 kFLOP" in text
    assert "layers.7.up" in str(report.unfolded()) and len(report.plan) == 65
    other = Report(layers(3).merge([record("m.layers.1.up", INT4, 20.0, flops=1000)]))
    assert "m.layers.{0,2}.up" in str(other) and "m.layers.1.up" in str(other)


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, 9), ({"name": "*.up"}, 4), ({"operator": "attention"}, 4), ({"role": "lm_*"}, 1), ({"format": "int4*"}, 1),
     ({"left": True}, 4), ({"left": False}, 5), ({"name": "*.up", "left": True}, 0)],
)  # fmt: skip
def test_reports_are_filtered(given: dict[str, Any], count: int) -> None:
    assert len(Report(layers(4)).filter(**given).plan) == count


def test_times_stand_beside_their_bounds() -> None:
    times = {(f"m.layers.{i}.up", "linear"): Timing(1e-6, 3e-6) for i in range(4)}
    report = Report(layers(4), times=times)
    (row,) = (line for line in str(report).splitlines() if "{0…3}.up" in line)
    assert "4 µs" in row and "12 µs" in row
    records = json.loads(report.to_json())["records"]
    assert records[0]["seconds"] == {"bound": 1e-6, "measured": 3e-6} and "seconds" not in records[-1]
    assert Machine(1e9, 1e12).bound(2000, 10**6) == 2e-6 and Machine(1e9, 1e12).bound(2000, 10**7) == 1e-5
