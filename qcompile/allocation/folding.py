"""Rules that name layers, equal blocks folded into patterns."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Sequence

from ..errors import PolicyError
from ..formats import Scheme
from ..plan import Site
from ..policy import Policy
from ..report.fold import NUMBER, bare
from ..rules import Rule

Chosen = Sequence[tuple[Site, Scheme | None]]


def policy_of(chosen: Chosen, name: str) -> Policy:
    """A policy whose rules give each site its scheme: layers whose names differ in numbers alone get one rule with ``*`` for the
    numbers, after rules for those that differ from most of them.

    Raises :class:`~qcompile.errors.PolicyError` where no order of rules tells the layers apart by name.
    """
    folded = _folded(chosen)
    rules = folded if _holds(folded, chosen) else _exact(chosen)
    wrong = _wrong(rules, chosen)
    if wrong:
        raise PolicyError(f"no rules tell {', '.join(map(repr, wrong[:4]))} apart from other layers by name; rename the modules, "
                          "or write the policy by hand from the choices")  # fmt: skip
    return Policy(name, rules, explicit=True)


def _folded(chosen: Chosen) -> list[Rule]:
    groups: dict[str, list[tuple[Site, Scheme | None]]] = defaultdict(list)
    for site, scheme in chosen:
        groups[bare(site.name)].append((site, scheme))
    single: list[Rule] = []
    patterns: list[Rule] = []
    for group in groups.values():
        schemes = [scheme for _, scheme in group]
        usual = max(schemes, key=schemes.count)
        if schemes.count(usual) == 1:
            single += _exact(group)
            continue
        single += _exact([(site, scheme) for site, scheme in group if scheme != usual])
        patterns.append(Rule(NUMBER.sub("*", glob.escape(group[0][0].name)), usual))
    return [*_by_reach(single, chosen), *_by_reach(patterns, chosen)]


def _exact(chosen: Chosen) -> list[Rule]:
    rules = [Rule(glob.escape(site.name), scheme) for site, scheme in chosen]
    return _by_reach(rules, chosen)


def _by_reach(rules: list[Rule], chosen: Chosen) -> list[Rule]:
    """Rules that match fewest layers first: a name is also matched where it ends another's."""
    return sorted(rules, key=lambda rule: sum(rule.matches(site) for site, _ in chosen))


def _holds(rules: Sequence[Rule], chosen: Chosen) -> bool:
    return not _wrong(rules, chosen)


def _wrong(rules: Sequence[Rule], chosen: Chosen) -> list[str]:
    """Layers that the first rule which matches them gives another scheme than theirs."""
    first = [(site, scheme, next((r for r in rules if r.matches(site)), None)) for site, scheme in chosen]
    return [site.name for site, scheme, rule in first if rule is None or rule.scheme != scheme]
