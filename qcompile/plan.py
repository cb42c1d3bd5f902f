"""Sites and decisions: the record of one compilation, which can be printed, saved, merged and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .errors import PolicyError, StrictError
from .formats import Scheme, scheme_of
from .formats.layout import matrix_shape

LINEAR = frozenset({"linear", "addmm", "matmul"})
"""Operators of linear layers: what formats are for."""

OPERATORS = LINEAR | {"embedding", "attention", "other"}

ROLES = (
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "embed_tokens",
    "lm_head",
    "router",
)
"""What a layer can be for, as the graph tells it; a fused layer has several."""

SCHEMA = 2
"""Version of the JSON that plans are saved as."""


class Matching(Protocol):
    @property
    def pattern(self) -> str: ...

    @property
    def catches_all(self) -> bool: ...


@dataclass(frozen=True)
class Site:
    """One place in a graph where a weight is used, or attention computed.

    ``name`` is the module's; ``node`` and ``weight`` are names of FX nodes (the weight's placeholder or
    attribute; None when it is no parameter) and ``parameter`` is the parameter's qualified name. ``shape``:
    (N, K) = (out, in features) of a linear layer, (E, N, K) of experts, the weight's own shape for other weights, q's for
    attention (−1: dynamic). ``transposed``: the parameter is stored [K, N] or [E, K, N]. ``unsupported`` says why it cannot be
    quantized at all. ``flops``: floating-point operations (a multiplication and an addition are two) that the
    products by the weight cost in one call, the first that was seen; 0 for what multiplies by no weight.
    ``source``: "file:line" of the model's code.
    """

    name: str
    operator: str
    roles: frozenset[str] = frozenset()
    node: str = ""
    weight: str | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    unsupported: str | None = None
    parameter: str | None = None
    flops: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(
                f"site {self.name!r}: operator {self.operator!r} is none of {', '.join(sorted(OPERATORS))}"
            )

    @property
    def is_linear(self) -> bool:
        return self.operator in LINEAR

    @property
    def is_packable(self) -> bool:
        """Whether kernels in low precision exist: for linear layers, embeddings and attention."""
        return self.is_linear or self.operator in ("embedding", "attention")

    def takes(self, rule: Matching) -> bool:
        """Whether a rule that matches speaks for the site: one for all layers means linear ones only, and attention must be
        named itself ("*.self_attn"), not with all that its block holds ("layers.0.*")."""
        if self.operator == "attention":
            return not rule.pattern.endswith("*")
        return self.is_linear or not rule.catches_all

    @property
    def key(self) -> tuple[str, str]:
        """What a site is known by across graphs."""
        return self.name, self.operator

    @property
    def storage(self) -> str | None:
        """What names the weight across graphs, so that a tied weight is counted once; None without a
        weight."""
        return self.parameter or (self.weight and f"{self.name}:{self.weight}")

    @property
    def nbytes(self) -> int:
        """Bytes of the float weight; 0 without one."""
        return 0 if self.weight is None else math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Decision:
    """What a policy says of a site: ``scheme`` (None: left in floating point, for ``reason``), the ``rule``
    that chose it, and the scheme that was ``wanted`` where the rule asked for one."""

    site: Site
    scheme: Scheme | None
    rule: str
    reason: str | None = None
    wanted: Scheme | None = None


@dataclass(frozen=True)
class Record:
    """A decision and what came of it: the ``kernel`` variant, bytes of the weight before and after, and the
    signal-to-quantization-noise ratio in dB (None: not measured; infinite: exact)."""

    decision: Decision
    kernel: str | None
    bytes_before: int
    bytes_after: int
    sqnr: float | None = None

    @staticmethod
    def of(decision: Decision, kernel: str | None = None, sqnr: float | None = None) -> Record:
        """The record of ``decision`` with the bytes that follow from shape and format, padding included."""
        site = decision.site
        packed = decision.scheme is not None and site.weight is not None
        after = decision.scheme.format.nbytes(*matrix_shape(site.shape)) if packed else site.nbytes  # type: ignore[union-attr]
        return Record(decision, kernel, site.nbytes, after, sqnr)


@dataclass(frozen=True)
class Totals:
    """Sums over a plan; every weight counts once however many sites share it. ``share``: the part of the
    linear layers' weights (in bytes before) that is quantized; 0 when there are none. ``flops``: of the linear
    layers in one call; ``flops_share``: the part of them in quantized ones."""

    sites: int
    quantized: int
    bytes_before: int
    bytes_after: int
    share: float
    flops: int
    flops_share: float


@dataclass(frozen=True)
class Plan:
    """The records of everything compiled so far, in the order the sites were first met."""

    records: tuple[Record, ...] = field(default=())

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def merge(self, other: Iterable[Record]) -> Plan:
        """This plan with the records of another graph: for a site in both (same name and operator) the latest
        wins."""
        merged = {r.decision.site.key: r for r in self.records}
        for record in other:
            merged[record.decision.site.key] = record
        return Plan(tuple(merged.values()))

    def totals(self) -> Totals:
        """Sums in which a weight counts once: as packed if any of its sites is, as a linear layer's if one of
        them is."""
        unique: dict[str, Record] = {}
        linear: set[str] = set()
        for record in self.records:
            name = record.decision.site.storage
            if name is None:
                continue
            if record.decision.site.is_linear:
                linear.add(name)
            if name not in unique or (unique[name].decision.scheme is None and record.decision.scheme is not None):
                unique[name] = record
        whole = sum(unique[name].bytes_before for name in linear)
        packed = sum(unique[name].bytes_before for name in linear if unique[name].decision.scheme is not None)
        linears = [r for r in self.records if r.decision.site.is_linear]
        flops = sum(r.decision.site.flops for r in linears)
        low = sum(r.decision.site.flops for r in linears if r.decision.scheme is not None)
        return Totals(
            sites=len(self.records),
            quantized=sum(r.decision.scheme is not None for r in self.records),
            bytes_before=sum(r.bytes_before for r in unique.values()),
            bytes_after=sum(r.bytes_after for r in unique.values()),
            share=packed / whole if whole else 0.0,
            flops=flops,
            flops_share=low / flops if flops else 0.0,
        )

    def require_all(self) -> None:
        """Raises :class:`StrictError` naming every site that the policy meant to quantize and that was
        left."""
        left = [r.decision for r in self.records if r.decision.wanted is not None and r.decision.scheme is None]
        if left:
            lines = [
                f"  {d.site.name} ({d.site.operator}): {d.reason}, asked for {d.wanted.label} by {d.rule}"  # type: ignore[union-attr]
                for d in left
            ]
            raise StrictError(
                f"strict=True and {len(left)} of {len(self)} sites were left in floating point:\n"
                + "\n".join(lines)
                + "\nGive them a rule with the value 'float', or compile with strict=False."
            )

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types: ``{"version", "records", "totals"}``."""
        totals = self.totals()
        return {
            "version": SCHEMA,
            "records": [_to_dict(r) for r in self.records],
            "totals": dict(vars(totals)),
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of :meth:`to_json`. Raises :class:`PolicyError` for another version of the schema and
        :class:`~qcompile.errors.UnknownFormatError` for a scheme that this process does not have."""
        content = json.loads(text)
        if content.get("version") != SCHEMA:
            raise PolicyError(
                f"a plan of schema version {content.get('version')!r}; this release reads {SCHEMA}. "
                "Compile once more and save the plan again"
            )
        return Plan(tuple(_from_dict(r) for r in content["records"]))


def _to_dict(record: Record) -> dict[str, Any]:
    decision, site = record.decision, record.decision.site
    return {
        "name": site.name,
        "operator": site.operator,
        "roles": sorted(site.roles),
        "node": site.node,
        "weight": site.weight,
        "parameter": site.parameter,
        "shape": list(site.shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "transposed": site.transposed,
        "unsupported": site.unsupported,
        "flops": site.flops,
        "source": site.source,
        "scheme": decision.scheme and decision.scheme.key,
        "wanted": decision.wanted and decision.wanted.key,
        "rule": decision.rule,
        "reason": decision.reason,
        "kernel": record.kernel,
        "bytes_before": record.bytes_before,
        "bytes_after": record.bytes_after,
        "sqnr_db": "inf" if record.sqnr == math.inf else record.sqnr,
    }


def _from_dict(data: dict[str, Any]) -> Record:
    site = Site(
        data["name"],
        data["operator"],
        frozenset(data["roles"]),
        data["node"],
        data["weight"],
        tuple(data["shape"]),
        getattr(torch, data["dtype"]),
        data["transposed"],
        data["unsupported"],
        data["parameter"],
        data["flops"],
        data["source"],
    )
    scheme, wanted = (scheme_of(data[name]) if data[name] else None for name in ("scheme", "wanted"))
    decision = Decision(site, scheme, data["rule"], data["reason"], wanted)
    sqnr = None if data["sqnr_db"] is None else float(data["sqnr_db"])
    return Record(decision, data["kernel"], data["bytes_before"], data["bytes_after"], sqnr)
