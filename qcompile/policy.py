"""Which layer is stored as what: ordered rules, of which the first that matches wins."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from .errors import PolicyError, UnknownFormatError
from .formats import FormatSpec, Scheme, scheme_of
from .formats.ranges import why_no_range
from .formats.reference import why_no_stack
from .gguf_presets import ALWAYS, GGUF_PRESETS, Place, places
from .plan import ROLES, Decision, Site
from .presets import DEFAULT, PRESETS, ROUTERS, default_preset
from .rules import Rule, label_of, rules_from, scheme_from, scheme_named
from .target import Target

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Choice:
    """A site, the rule that speaks for it, why a ``tie`` to another site leaves it as it is, if so, and whether it has the
    rule because it ``shared`` a weight."""

    site: Site
    rule: Rule | None
    tie: str | None = None
    shared: bool = False


class Policy:
    """Immutable, compared and hashed by value. Make one with :meth:`parse`.

    ``name`` is the preset's or ``"rules"``; ``explicit`` policies are a user's own rules, whose
    contradictions and unused rules are errors. The ``default`` policy has no rules of its own: they depend on
    the device.
    """

    def __init__(self, name: str, rules: Iterable[Rule], explicit: bool) -> None:
        self.name, self.rules, self.explicit = name, tuple(rules), explicit
        text = json.dumps(self.as_dict(), sort_keys=True)
        self.key = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        """Stable digest of every rule, for caches."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        rules = ", ".join(f"{r.pattern!r}: {r.label!r}{f' ({r.when})' if r.when else ''}" for r in self.rules)
        return f"Policy({self.name}: {{{rules}}})"

    @staticmethod
    def parse(value: object = None) -> Policy:
        """A policy from what a user writes.

        None: fp8 where the device computes it, else int8. A string: a preset ("fp8", "int8", "int4", "mixed",
        each of the first three also with "_dynamic"), a mixture of llama.cpp's ("Q4_K_M"), any registered format,
        or "float". A :class:`Scheme` or :class:`FormatSpec`: every linear layer but routers of experts, which presets
        leave too. A mapping, or a sequence of
        pairs, from pattern to value: ordered rules; values are formats' names, Schemes, FormatSpecs, or "fp16",
        "bf16", "fp32", "float", None for "leave it in floating point". Raises :class:`PolicyError` for malformed
        values and a pattern that comes twice, :class:`~qcompile.errors.UnknownFormatError` for unknown names.
        """
        if isinstance(value, Policy):
            return value
        if value is None:
            return Policy(DEFAULT, (), explicit=False)
        if isinstance(value, str):
            names = {*PRESETS, *GGUF_PRESETS}
            lines = GGUF_PRESETS.get(value) or PRESETS.get(value, (ROUTERS, ("*", value)))
            return Policy(value, [Rule(p, scheme_named(v, names), *when) for p, v, *when in lines], explicit=False)
        if isinstance(value, (Scheme, FormatSpec)):
            scheme = scheme_from("*", value)
            assert scheme is not None
            return Policy(scheme.label, [Rule(ROUTERS[0], None), Rule("*", scheme)], explicit=False)
        return Policy("rules", rules_from(value), explicit=True)

    def as_dict(self) -> dict[str, Any]:
        """The policy as JSON types; a scheme is written as its operator key (format, fingerprint,
        activations), a condition, and what else attention gets, only where a rule has one."""
        rules = [
            {"pattern": r.pattern, "scheme": r.outcome}
            | ({"when": r.when} if r.when else {})
            | ({"tokens": r.tokens.key} if r.tokens else {})
            for r in self.rules
        ]
        return {"name": self.name, "explicit": self.explicit, "rules": rules}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    @staticmethod
    def from_json(text: str) -> Policy:
        """Inverse of :meth:`to_json`. Raises :class:`~qcompile.errors.UnknownFormatError` for a scheme that
        this process does not have, also when its format was declared differently then; :class:`PolicyError`
        for other JSON."""
        try:
            content = json.loads(text)
            rules = [
                Rule(r["pattern"], _kept(r["scheme"]), r.get("when", ALWAYS), tokens=_kept(r.get("tokens")))
                for r in content["rules"]
            ]
            return Policy(content["name"], rules, content["explicit"])
        except UnknownFormatError:
            raise
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise PolicyError(f"this is no policy saved by Policy.to_json(): {error!r}") from error

    def resolved(self, target: Target) -> Policy:
        """This policy with the default's rules filled in for ``target``."""
        if self.name != DEFAULT or self.rules:
            return self
        preset = default_preset(target.computes_fp8)
        return Policy(f"{DEFAULT} ({preset})", Policy.parse(preset).rules, explicit=False)

    def decide(self, sites: Sequence[Site], target: Target, module_names: Collection[str] = ()) -> list[Decision]:
        """One decision for each site, in order. Sites that share a weight get one outcome. ``module_names`` are
        all of the model's modules: rules that depend on a layer's position count them (see
        :func:`~qcompile.gguf_presets.places`).

        Raises :class:`PolicyError` when rules contradict each other on a fused layer or a tied weight, and
        when a rule of the user's asks to quantize a weight that is not float32, float16 or bfloat16.
        """
        policy = self.resolved(target)
        conditional = any(rule.when for rule in policy.rules)
        at = places(sites, module_names) if conditional else [None] * len(sites)
        choices = [_Choice(site, policy._first(site, place)) for site, place in zip(sites, at, strict=True)]
        tied: dict[str, list[_Choice]] = defaultdict(list)
        for choice in choices:
            if choice.site.storage is not None:
                tied[choice.site.storage].append(choice)
        for group in tied.values():
            if len(group) > 1:
                policy._unite(group)
        return [policy._decision(choice.site, choice.rule, choice.tie, choice.shared) for choice in choices]

    def _first(self, site: Site, place: Place | None) -> Rule | None:
        """The first rule that matches; checks that the roles of a fused layer ask for one thing."""
        first = next((r for r in self.rules if r.matches(site, place)), None)
        if not self.explicit or first is None or first.catches_all:
            return first
        for role in sorted(site.roles):
            for rule in self.rules:
                if rule.catches_all or not (rule.matches_name(site.name) or rule.matches_role(role)):
                    continue
                if rule.outcome != first.outcome:
                    raise PolicyError(
                        f"rules {first.pattern!r}: {first.label} and {rule.pattern!r}: {rule.label} "
                        f"contradict each other on {site.name!r}, one weight that is "
                        f"{' and '.join(sorted(site.roles))}. "
                        f"Give both one value, or put a rule for {site.name!r} first"
                    )
                break
        return first

    def _unite(self, group: list[_Choice]) -> None:
        """One outcome for sites of one weight: the earliest specific rule's, else that of the catch-all for its
        linear layers. A site that cannot be packed keeps the weight in floating point, and its partners get the
        reason."""
        ruled = [(c.site, c.rule) for c in group if c.rule is not None and c.site.takes(c.rule)]
        specific = [(site, rule) for site, rule in ruled if not rule.catches_all]
        for site, rule in specific[1:] if self.explicit else ():
            other, first = specific[0]
            if rule.outcome != first.outcome:
                raise PolicyError(
                    f"{other.name!r} and {site.name!r} share one weight, but rule {first.pattern!r} says "
                    f"{first.label} and rule {rule.pattern!r} says {rule.label}. Give both one value"
                )
        winner = min((rule for _, rule in specific or ruled), key=self.rules.index, default=None)
        holder = next((c.site for c in group if not c.site.is_packable), None)
        for choice in group:
            if not choice.site.is_packable:
                continue
            if choice.rule is None or winner is None or choice.rule.outcome != winner.outcome:
                choice.rule = winner
            choice.shared = winner is not None
            if holder is not None:
                choice.tie = f"the weight is tied to {holder.operator} {holder.name!r}, which stays in floating point"

    def _decision(self, site: Site, rule: Rule | None, tie: str | None, shared: bool) -> Decision:
        if rule is None:
            return Decision(site, None, self._source(None, site), "no rule matches")
        source, scheme = self._source(rule, site), rule.scheme_for(site)
        if scheme is None:
            return Decision(site, None, source, "the policy leaves it in floating point")
        wanted = scheme if self._means(rule, site, tie is not None) else None
        reason = site.unsupported or tie
        if reason is None and not site.is_packable:
            reason = f"{site.operator} has no quantized kernel"
        if reason is None and not shared and not site.takes(rule):
            reason = f"rule {rule.pattern!r} means linear layers; name {site.name!r} in a rule of its own to have it"
        if reason is None and len(site.shape) == 3 and site.is_linear:
            reason = why_no_stack(scheme.format)
        if reason is None and site.operator == "attention":
            reason = why_no_range(scheme.format)
        if reason is None and site.dtype not in WEIGHT_DTYPES:
            reason = f"its weight is {site.dtype}, not float32, float16 or bfloat16"
            if self.explicit and not rule.catches_all:
                raise PolicyError(
                    f"rule {rule.pattern!r} asks for {rule.label} on {site.name!r}, but {reason}. "
                    "Give the layer the value 'float'"
                )
        return Decision(site, None if reason else scheme, source, reason, wanted)

    def _means(self, rule: Rule, site: Site, tied: bool) -> bool:
        """Whether a rule that matches a site asks for it, so that leaving it is a failure under ``strict``:
        linear layers, but a weight tied to an embedding only where the user named it, and anything else only
        where named without a glob."""
        if site.operator == "attention":
            return self.explicit and site.takes(rule)
        if site.weight is None:
            return False
        if site.is_linear:
            return not tied or (self.explicit and not rule.catches_all)
        return self.explicit and not set(rule.pattern) & set("*?[")

    def _source(self, rule: Rule | None, site: Site) -> str:
        if self.explicit:
            return f"{rule.pattern}: {label_of(rule.scheme_for(site))}" if rule is not None else "no rule"
        if rule is None or rule.catches_all:
            return f"preset {self.name}"
        return f"preset {self.name} ({', '.join(filter(None, (rule.shown, rule.when)))})"

    def unmatched(self, sites: Iterable[Site], module_names: Iterable[str] = (), whole: bool = True) -> list[Rule]:
        """Rules of a user's own policy that match no site and no module's name; unless the sites are the
        ``whole`` model's, a rule on a role that some later graph may have counts as matched."""
        if not self.explicit:
            return []
        sites, names = list(sites), list(module_names)
        roles = () if whole else ROLES
        return [
            r
            for r in self.rules
            if not any(map(r.matches, sites))
            and not any(map(r.matches_name, names))
            and not any(map(r.matches_role, roles))
        ]


def _kept(key: str | None) -> Scheme | None:
    """The scheme that a saved policy names."""
    return scheme_of(key) if key else None


def check_rules(policy: Policy, sites: Sequence[Site], module_names: Iterable[str], whole: bool = True) -> None:
    """Raises :class:`PolicyError` for a rule that matches nothing, with the nearest names and roles.

    ``sites`` are all that are known, ``module_names`` all of the model's modules: a rule for a module that a
    later graph will hold (graph breaks, regional compilation) is not refused. Roles count when some site has
    them; unless the sites are the ``whole`` model's, every role might still come.
    """
    names = list(module_names)
    unused = policy.unmatched(sites, names, whole)
    if not unused:
        return
    roles = {role for site in sites for role in site.roles}
    known = {s.name for s in sites} | set(names)
    tails = {".".join(parts[i:]) for parts in (n.split(".") for n in known) for i in range(len(parts))}
    lines = []
    for rule in unused:
        bare = rule.shown
        close = get_close_matches(bare, sorted(roles | tails), n=3, cutoff=0.5)
        lines.append(
            f"rule {rule.pattern!r}: {rule.label} matches no layer and no role."
            + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
        )
    present = ", ".join(sorted(roles)) or "none"
    layers = sorted(s.name for s in sites if s.is_linear)
    some = ", ".join(layers[:8]) + (", …" if len(layers) > 8 else "") if layers else "none"
    raise PolicyError("\n".join(lines) + f"\nRoles here: {present}. Layers: {some}")
