"""llama.cpp's mixtures of GGUF types as data, which layers get the better type, and where a layer lies in its model.

The facts are those of ``llama_tensor_get_type`` in llama.cpp's ``src/llama-quant.cpp``, release 0.5.0, without an importance
matrix. Two kinds are left out: rules for the Falcon architecture, which no graph shows, and the types that replace K-quants
in rows of no multiple of 256 weights, which are padded here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .plan import ROLES, Site

Q, K, V, O, _, _, DOWN, EMBEDDING, HEAD, CHOOSES = ROLES  # noqa: E741 — the field's letters


@dataclass(frozen=True)
class Place:
    """Where a layer lies: the ``index``-th of ``layers`` that have one like it, with ``groups`` query heads to one
    key-value head and ``experts`` in the model; ``routes``: it chooses among them."""

    index: int = 0
    layers: int = 1
    groups: int = 1
    experts: int = 0
    routes: bool = False


ALWAYS = ""
ROUTER = "router of experts"
EIGHT_EXPERTS = "8 experts"
GROUPED = "4 or more query heads to a key head"
EIGHTY_LAYERS = "80 layers, grouped query heads"
FIRST_TWO = "first 2 layers"
FIRST_FOUR = "first 4 layers"
FIRST_EIGHTH = "first eighth of layers"
FIRST_SIXTEENTH = "first sixteenth of layers"
MORE_BITS = "first and last eighth of layers and every third between"

CONDITIONS: Mapping[str, Callable[[Place], bool]] = {
    ALWAYS: lambda at: True,
    ROUTER: lambda at: at.routes,
    EIGHT_EXPERTS: lambda at: at.experts == 8,
    GROUPED: lambda at: at.groups >= 4,
    EIGHTY_LAYERS: lambda at: at.layers == 80 and at.groups > 1,
    FIRST_TWO: lambda at: at.index < 2,
    FIRST_FOUR: lambda at: at.index < 4,
    FIRST_EIGHTH: lambda at: at.index < at.layers // 8,
    FIRST_SIXTEENTH: lambda at: at.index < at.layers // 16,
    MORE_BITS: lambda at: (
        at.index < at.layers // 8 or at.index >= 7 * at.layers // 8 or (at.index - at.layers // 8) % 3 == 2
    ),
}
"""What a rule may ask of a place, by the words that reports show. 80 layers with grouped heads stand for llama.cpp's size
"70B"."""

Choices = tuple[tuple[str, str], ...]
"""(type, condition), of which the first that holds is taken."""


@dataclass(frozen=True)
class Mixture:
    """``base`` is every embedding's and linear layer's type but the output ``head``'s and where the choices for ``v``, ``o``
    and ``down`` projections give another. Fused projections that hold v count as v."""

    base: str
    v: Choices = ()
    o: Choices = ()
    down: Choices = ()
    head: str = "Q6_K"

    def rules(self) -> tuple[tuple[str, str, str], ...]:
        """(pattern, value, condition) in the order of precedence. With 8 experts k and v are small, and get Q8_0."""
        v, k = ((f"role:{role}", "Q8_0", EIGHT_EXPERTS) for role in (V, K))
        own = [(f"role:{role}", *choice) for role, choices in ((V, self.v), (O, self.o), (DOWN, self.down))
               for choice in choices]  # fmt: skip
        return (("*", "float", ROUTER), (f"role:{HEAD}", self.head, ALWAYS), v, k, *own,
                (f"role:{EMBEDDING}", self.base, ALWAYS), ("*", self.base, ALWAYS))


O_OF_EIGHT = ("Q5_K", EIGHT_EXPERTS)
V_OF_EIGHTY = ("Q5_K", EIGHTY_LAYERS)

MIXTURES = {
    "Q2_K": Mixture(
        "Q2_K",
        v=(V_OF_EIGHTY, ("Q4_K", GROUPED), ("Q3_K", ALWAYS)),
        o=(O_OF_EIGHT, ("Q3_K", ALWAYS)),
        down=(("Q3_K", ALWAYS),),
    ),
    "Q3_K_S": Mixture("Q3_K", v=(V_OF_EIGHTY,), o=(O_OF_EIGHT,)),
    "Q3_K_M": Mixture(
        "Q3_K",
        v=(("Q5_K", FIRST_TWO), V_OF_EIGHTY, ("Q4_K", ALWAYS)),
        o=(O_OF_EIGHT, ("Q4_K", ALWAYS)),
        down=(("Q5_K", FIRST_SIXTEENTH), ("Q4_K", ALWAYS)),
    ),
    "Q3_K_L": Mixture(
        "Q3_K", v=(("Q5_K", ALWAYS),), o=(("Q3_K", EIGHT_EXPERTS), ("Q5_K", ALWAYS)), down=(("Q5_K", ALWAYS),)
    ),
    "Q4_K_S": Mixture(
        "Q4_K", v=(("Q5_K", FIRST_FOUR), V_OF_EIGHTY), o=(O_OF_EIGHT,), down=(("Q5_K", FIRST_EIGHTH),)
    ),
    "Q4_K_M": Mixture("Q4_K", v=(("Q6_K", MORE_BITS), V_OF_EIGHTY), o=(O_OF_EIGHT,), down=(("Q6_K", MORE_BITS),)),
    "Q5_K_S": Mixture("Q5_K"),
    "Q5_K_M": Mixture("Q5_K", v=(("Q6_K", MORE_BITS),), down=(("Q6_K", MORE_BITS),)),
    "Q6_K": Mixture("Q6_K"),
    "Q8_0": Mixture("Q8_0", head="Q8_0"),
}

GGUF_PRESETS = {name: mixture.rules() for name, mixture in MIXTURES.items()}
"""Policies by llama.cpp's names for its file types. "Q2_K", "Q6_K" and "Q8_0" are also formats: as a policy the name means
the mixture, as the value of a rule the format alone."""


def places(sites: Sequence[Site], module_names: Collection[str] = ()) -> list[Place]:
    """One place for each site of one graph. ``module_names`` are all of the model's modules, so that a graph of one layer
    knows its position; without them the model is taken to end with the last layer among the sites.

    Every sequence of layers (an encoder's, a decoder's) counts for itself; a layer without a number is one of one.
    """
    modules = [name.replace("._orig_mod", "") for name in module_names]
    model = _read(tuple(dict.fromkeys([*modules, *(site.name for site in sites)])))
    linears = [s for s in sites if s.is_linear and len(s.shape) == 2]
    routers = {s.key for s in linears if s.roles <= {CHOOSES} and (s.roles or s.name.rpartition(".")[0] in model.experts)}
    stacked = [s.shape[0] for s in sites if s.is_linear and len(s.shape) == 3]
    experts = max([*model.experts.values(), *stacked, *(s.shape[0] for s in linears if s.key in routers)], default=0)
    numbers = {s.name: model.number(s.name) for s in sites}
    stacks: dict[str, list[Site]] = defaultdict(list)
    for site in linears:
        stacks[numbers[site.name].before].append(site)
    groups = {before: _groups(stack) for before, stack in stacks.items()}
    listed = set(modules)

    def place(site: Site) -> Place:
        number = numbers[site.name]
        index, layers = model.position(site, number, experts, site.name in listed)
        return Place(index, layers, groups.get(number.before, 1), experts, site.key in routers)

    return [place(site) for site in sites]


@dataclass(frozen=True)
class _Number:
    """A number in a module's name, with what comes before and after it: "model.layers", 7, "mlp.up_proj"."""

    before: str
    index: int
    after: str


@dataclass(frozen=True)
class _Model:
    """What the names of a model's modules tell. ``alike``: numbers by what comes before and after them; ``lengths``: one more
    than the largest number, by what comes before; ``experts``: how many experts are numbered, by what holds them."""

    alike: Mapping[tuple[str, str], Sequence[int]]
    lengths: Mapping[str, int]
    experts: Mapping[str, int]

    def number(self, name: str) -> _Number:
        """The layer's: the first number that some other module has another of, else the first; 0 if there is none."""
        found = list(_numbers(name))
        several = (n for n in found if len(self.alike.get((n.before, n.after), ())) > 1)
        return next(several, found[0] if found else _Number(name, 0, ""))

    def position(self, site: Site, number: _Number, experts: int, listed: bool) -> tuple[int, int]:
        """(index, layers). Attention is counted where it is, since hybrid models have other layers between. MLPs too, but out
        of all layers; beside experts by the layer's number. Sites that are no ``listed`` module: by the number."""
        length = self.lengths.get(number.before, 1)
        alike = self.alike.get((number.before, number.after), ()) if listed else ()
        if number.index not in alike:
            alike = range(length)
        rank = alike.index(number.index)
        if any(role.startswith("attention.") for role in site.roles):
            return rank, len(alike)
        return number.index if experts > 1 else rank, length


def _numbers(name: str) -> Iterator[_Number]:
    """Every number in a name but experts'."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and parts[i - 1 : i] != ["experts"]:
            yield _Number(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))


@lru_cache(maxsize=8)
def _read(names: tuple[str, ...]) -> _Model:
    alike: dict[tuple[str, str], set[int]] = defaultdict(set)
    lengths: dict[str, int] = {}
    experts: dict[str, int] = {}
    for name in names:
        for n in _numbers(name):
            alike[n.before, n.after].add(n.index)
            lengths[n.before] = max(lengths.get(n.before, 0), n.index + 1)
        holder, held, rest = f".{name}.".partition(".experts.")
        if held:
            number = rest.partition(".")[0]
            experts[holder[1:]] = max(experts.get(holder[1:], 0), int(number) + 1 if number.isdecimal() else 0)
    return _Model({key: sorted(found) for key, found in alike.items()}, lengths, experts)


def _groups(linears: Sequence[Site]) -> int:
    """Query heads to one key-value head, by the widths of the first projections; 1 where they do not tell."""
    widths = [s.shape[1] for s in linears if O in s.roles] + [s.shape[0] for s in linears if s.roles == {Q}]
    holder = next((s for s in linears if V in s.roles), None)
    if holder is None or not widths:
        return 1
    values = (holder.shape[0] - widths[0] * (Q in holder.roles)) // len(holder.roles & {K, V})
    return max(1, widths[0] // values) if values > 0 else 1
