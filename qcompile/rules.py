"""One rule of a policy: what it matches, what it sets, and how a user's words for either are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .errors import PolicyError, UnknownFormatError, nearest
from .formats import FormatSpec, Scheme, activations_of, find, names
from .gguf_presets import ALWAYS, CONDITIONS, Place
from .kv_cache import ALIASES as TOKENS
from .plan import Site
from .presets import ALIASES, DYNAMIC, FLOATS

ROLE_ONLY = "role:"


def label_of(scheme: Scheme | None) -> str:
    return scheme.label if scheme is not None else "float"


@dataclass(frozen=True, eq=False)
class Rule:
    """``pattern`` matches, ``scheme`` is set (None: left in floating point).

    A pattern is a glob over a module's name ("model.layers.*.mlp.up_proj"), over its last components
    ("mlp.up_proj", "lm_head"), or over a role ("attention.q_proj", "mlp.*"); after ``role:`` over roles
    alone. ``when`` is one of :data:`~qcompile.gguf_presets.CONDITIONS` on the layer's place in the model.
    ``tokens`` is set for keys and values of attention, where the short name that was written means another format for them.
    """

    pattern: str
    scheme: Scheme | None
    when: str = ALWAYS
    tokens: Scheme | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.when not in CONDITIONS:
            raise PolicyError(f"rule {self.pattern!r}: {self.when!r} is no condition. {nearest(self.when, CONDITIONS)}")

    @property
    def catches_all(self) -> bool:
        return self.pattern == "*" and not self.when

    def scheme_for(self, site: Site) -> Scheme | None:
        """What is set for ``site``."""
        return self.tokens if self.tokens is not None and site.operator == "attention" else self.scheme

    @property
    def label(self) -> str:
        return label_of(self.scheme)

    @property
    def outcome(self) -> str | None:
        """What two rules that agree have in common."""
        return self.scheme.key if self.scheme is not None else None

    def matches_name(self, name: str) -> bool:
        """Over the whole name or its last components; "*.self_attn" is also a module of the root."""
        return any(fnmatchcase(name, p) for p in (self.pattern, f"*.{self.pattern}", self.pattern.removeprefix("*.")))

    def matches_role(self, role: str) -> bool:
        return fnmatchcase(role, self.shown)

    @property
    def shown(self) -> str:
        """The pattern as reports show it."""
        return self.pattern.removeprefix(ROLE_ONLY)

    def matches(self, site: Site, place: Place | None = None) -> bool:
        """Whether the rule speaks for ``site``; one with a condition needs to know its ``place``."""
        if self.when and (place is None or not CONDITIONS[self.when](place)):
            return False
        return self.matches_name(site.name) or any(map(self.matches_role, site.roles))


def scheme_named(name: str, extra: Iterable[str] = ()) -> Scheme | None:
    """The scheme that a value's name means; None for the names that leave a layer in floating point.

    Raises :class:`~qcompile.errors.UnknownFormatError` with the nearest of all names (and of ``extra``).
    """
    if name in FLOATS:
        return None
    base = name.removesuffix(DYNAMIC)
    spec = find(ALIASES.get(base, base))
    if spec is None:
        raise UnknownFormatError(name, {*ALIASES, *names(), *FLOATS, *(a + DYNAMIC for a in ALIASES), *extra})
    if base == name:
        return Scheme(spec)
    return Scheme(spec, next(iter(activations_of(spec)), "int8"))


def scheme_from(pattern: str, value: object) -> Scheme | None:
    """The scheme of a value in any of its spellings, for the rule ``pattern``. Raises :class:`PolicyError`
    for others."""
    if value is None:
        return None
    if isinstance(value, str):
        return scheme_named(value)
    if isinstance(value, Scheme):
        return value
    if isinstance(value, FormatSpec):
        return Scheme(value)
    raise PolicyError(
        f"rule {pattern!r}: {value!r} ({type(value).__name__}) is no value; use a format's name, a Scheme, "
        "a FormatSpec, or 'float'"
    )


def rules_from(value: object) -> list[Rule]:
    """Ordered rules from a mapping or from pairs. Raises :class:`PolicyError` for anything else and for
    repeated patterns."""
    if isinstance(value, Mapping):
        pairs: list[Any] = list(value.items())
    elif isinstance(value, Sequence):
        pairs = list(value)
    else:
        raise PolicyError(
            f"{value!r} ({type(value).__name__}) is no policy; use a preset's or format's name, a Scheme, a "
            "mapping from patterns to values, or a sequence of such pairs"
        )
    if not pairs:
        raise PolicyError("a policy without rules quantizes nothing; write 'float' if that is meant")
    rules: list[Rule] = []
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str) and pair[0]):
            raise PolicyError(f"{pair!r} is no rule; a rule is a pair of a pattern and a value")
        if any(rule.pattern == pair[0] for rule in rules):
            raise PolicyError(f"pattern {pair[0]!r} comes twice; the second rule could never match, remove one")
        tokens = scheme_named(TOKENS[pair[1]]) if isinstance(pair[1], str) and pair[1] in TOKENS else None
        rules.append(Rule(pair[0], scheme_from(pair[0], pair[1]), tokens=tokens))
    return rules
