"""llama.cpp's mixtures: every layer gets the type that ``llama-quantize`` gives it. Expected types are what release 0.5.0 of
llama.cpp writes for models of the same shape."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable

import pytest

from qcompile.errors import PolicyError, UnknownFormatError
from qcompile.formats import Scheme, get
from qcompile.gguf_presets import GGUF_PRESETS
from qcompile.plan import ROLES, Decision, Site
from qcompile.policy import Policy
from qcompile.target import Target

CPU = Target("cpu", "AVX512")
Q, K, V, O, GATE, UP, DOWN, EMBED, HEAD, _ = ROLES  # noqa: E741 — the field's letters
WIDTH = 256


def linear(name: str, *roles: str, rows: int = WIDTH, weight: str | None = None) -> Site:
    parameter = weight or f"{name}.weight"
    return Site(name, "linear", frozenset(roles), name, parameter, (rows, WIDTH), parameter=parameter)


NAMES = {
    Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj", O: "self_attn.o_proj",
    GATE: "mlp.gate_proj", UP: "mlp.up_proj", DOWN: "mlp.down_proj", EMBED: "embed_tokens", HEAD: "lm_head",
}  # fmt: skip
OTHERS = {Q: "att.wq", K: "att.wk", V: "att.wv", O: "att.wo", GATE: "ff.w1", UP: "ff.w3", DOWN: "ff.w2", EMBED: "wte",
          HEAD: "output"}  # fmt: skip


def attention(layer: str, groups: int = 1, fused: bool = False, names: dict[str, str] = NAMES) -> list[Site]:
    shared = WIDTH // groups
    inputs = (
        [linear(f"{layer}.attn.qkv", Q, K, V, rows=WIDTH + 2 * shared)]
        if fused
        else [linear(f"{layer}.{names[r]}", r, rows=WIDTH if r == Q else shared) for r in (Q, K, V)]
    )
    return [*inputs, linear(f"{layer}.{names[O]}", O)]


def mlp(layer: str, names: dict[str, str] = NAMES) -> list[Site]:
    return [linear(f"{layer}.{names[r]}", r) for r in (GATE, UP, DOWN)]


def llama(n: int, groups: int = 1, fused: bool = False, names: dict[str, str] = NAMES, stack: str = "model.layers") -> list[Site]:
    """All sites of a decoder of ``n`` layers."""
    table = names[EMBED]
    embedding = Site(table, "embedding", frozenset({EMBED}), table, "t", (999, WIDTH), parameter=f"{table}.weight")
    layers = [
        s
        for i in range(n)
        for s in [*attention(f"{stack}.{i}", groups, fused, names), *mlp(f"{stack}.{i}", names)]
    ]
    return [embedding, *layers, linear(names[HEAD], HEAD, rows=999)]


def decided(preset: str, sites: list[Site], modules: Iterable[str] = ()) -> list[Decision]:
    return Policy.parse(preset).decide(sites, CPU, list(modules))


def types(preset: str, sites: list[Site], modules: Iterable[str] = ()) -> dict[str, str]:
    """The type of each linear layer, by name."""
    made = decided(preset, sites, modules)
    return {d.site.name: d.scheme.label if d.scheme else "float" for d in made if d.site.is_linear}


def of(role: str, found: dict[str, str], names: dict[str, str] = NAMES) -> list[str]:
    """The types of the layers of one role, in order."""
    return [label for name, label in found.items() if name.endswith(names[role])]


def modules(sites: list[Site]) -> list[str]:
    """Names of all modules of the model that has these sites."""
    parts = [s.name.split(".") for s in sites]
    return list(dict.fromkeys(".".join(p[:i]) for p in parts for i in range(len(p) + 1)))


LAYERS = (0, 1, 2, 3, 4, 5, 6, 7, 9, 26, 27, 28, 31)
MORE = "6 6 6 6 . . 6 . 6 . 6 6 6"
PER_LAYER = {  # preset: q and k; v, layer by layer; o; gate and up; down, layer by layer; head. Digits: types; ".": the base
    "Q2_K":   ("2", "3 3 3 3 3 3 3 3 3 3 3 3 3", "3", "2", "3 3 3 3 3 3 3 3 3 3 3 3 3", "6"),
    "Q3_K_S": ("3", "3 3 3 3 3 3 3 3 3 3 3 3 3", "3", "3", "3 3 3 3 3 3 3 3 3 3 3 3 3", "6"),
    "Q3_K_M": ("3", "5 5 4 4 4 4 4 4 4 4 4 4 4", "4", "3", "5 5 4 4 4 4 4 4 4 4 4 4 4", "6"),
    "Q3_K_L": ("3", "5 5 5 5 5 5 5 5 5 5 5 5 5", "5", "3", "5 5 5 5 5 5 5 5 5 5 5 5 5", "6"),
    "Q4_K_S": ("4", "5 5 5 5 4 4 4 4 4 4 4 4 4", "4", "4", "5 5 5 5 4 4 4 4 4 4 4 4 4", "6"),
    "Q4_K_M": ("4", MORE.replace(".", "4"), "4", "4", MORE.replace(".", "4"), "6"),
    "Q5_K_S": ("5", "5 5 5 5 5 5 5 5 5 5 5 5 5", "5", "5", "5 5 5 5 5 5 5 5 5 5 5 5 5", "6"),
    "Q5_K_M": ("5", MORE.replace(".", "5"), "5", "5", MORE.replace(".", "5"), "6"),
    "Q6_K":   ("6", "6 6 6 6 6 6 6 6 6 6 6 6 6", "6", "6", "6 6 6 6 6 6 6 6 6 6 6 6 6", "6"),
    "Q8_0":   ("8", "8 8 8 8 8 8 8 8 8 8 8 8 8", "8", "8", "8 8 8 8 8 8 8 8 8 8 8 8 8", "8"),
}  # fmt: skip
COUNTS = {
    "Q2_K": {"Q2_K": 128, "Q3_K": 96, "Q6_K": 1},
    "Q3_K_S": {"Q3_K": 224, "Q6_K": 1},
    "Q3_K_M": {"Q3_K": 128, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1},
    "Q3_K_L": {"Q3_K": 128, "Q5_K": 96, "Q6_K": 1},
    "Q4_K_S": {"Q4_K": 216, "Q5_K": 8, "Q6_K": 1},
    "Q4_K_M": {"Q4_K": 192, "Q6_K": 33},
    "Q5_K_S": {"Q5_K": 224, "Q6_K": 1},
    "Q5_K_M": {"Q5_K": 192, "Q6_K": 33},
    "Q6_K": {"Q6_K": 225},
    "Q8_0": {"Q8_0": 225},
}


def digits(labels: list[str]) -> list[str]:
    return [label[1] for label in labels]


def test_every_preset_has_its_row() -> None:
    assert GGUF_PRESETS.keys() == PER_LAYER.keys() == COUNTS.keys()


@pytest.mark.parametrize("preset", GGUF_PRESETS)
def test_types_of_a_llama_of_32_layers(preset: str) -> None:
    qk, v, o, gate_up, down, head = PER_LAYER[preset]
    found = types(preset, llama(32))
    for role, label in ((Q, qk), (K, qk), (O, o), (GATE, gate_up), (UP, gate_up)):
        assert digits(of(role, found)) == [label] * 32
    assert [digits(of(V, found))[i] for i in LAYERS] == v.split()
    assert [digits(of(DOWN, found))[i] for i in LAYERS] == down.split()
    assert found["lm_head"][1] == head
    assert Counter(found.values()) == COUNTS[preset]


@pytest.mark.parametrize("preset", GGUF_PRESETS)
@pytest.mark.parametrize("stack", ["blocks", "0.encoder.layer", "model._orig_mod.layers"])
def test_names_do_not_matter(preset: str, stack: str) -> None:
    """Nor does a number before the layer's, or a wrapper that ``torch.compile`` made."""
    sites = llama(32, names=OTHERS, stack=stack.replace("._orig_mod", ""))
    named = modules(llama(32, names=OTHERS, stack=stack))
    expected = list(types(preset, llama(32)).values())
    assert list(types(preset, sites).values()) == expected
    assert list(types(preset, sites, named).values()) == expected


@pytest.mark.parametrize("preset", GGUF_PRESETS)
def test_a_layer_compiled_alone_gets_the_type_of_its_place(preset: str) -> None:
    sites = llama(32, groups=4)
    whole, named = types(preset, sites), modules(sites)
    for i in range(32):
        layer = [s for s in sites if s.name.startswith(f"model.layers.{i}.")]
        assert types(preset, layer, named) == {s.name: whole[s.name] for s in layer}


def test_other_numbers_of_layers() -> None:
    """Of 12: eighths are one layer, and a sixteenth is none."""
    made = {preset: types(preset, llama(12)) for preset in GGUF_PRESETS}
    assert digits(of(DOWN, made["Q4_K_M"])) == list("644644644666")
    assert digits(of(DOWN, made["Q4_K_S"])) == list("544444444444")
    assert digits(of(DOWN, made["Q3_K_M"])) == list("4" * 12)
    assert digits(of(V, made["Q3_K_M"])) == list("55" + "4" * 10)


@pytest.mark.parametrize("preset", GGUF_PRESETS)
@pytest.mark.parametrize("groups", [1, 4])
def test_fused_projections_count_as_v(preset: str, groups: int) -> None:
    apart, fused = types(preset, llama(32, groups)), types(preset, llama(32, groups, fused=True))
    assert [label for name, label in fused.items() if name.endswith("qkv")] == of(V, apart)
    assert [of(r, fused) for r in (O, GATE, UP, DOWN)] == [of(r, apart) for r in (O, GATE, UP, DOWN)]


@pytest.mark.parametrize(("groups", "label"), [(1, "Q3_K"), (2, "Q3_K"), (4, "Q4_K"), (8, "Q4_K")])
def test_grouped_query_heads(groups: int, label: str) -> None:
    assert of(V, types("Q2_K", llama(32, groups))) == [label] * 32


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("Q2_K", {"Q5_K": 80}),
        ("Q3_K_S", {"Q5_K": 80}),
        ("Q3_K_M", {"Q5_K": 80}),
        ("Q4_K_S", {"Q5_K": 80}),
        ("Q4_K_M", {"Q5_K": 40, "Q6_K": 40}),
        ("Q5_K_M", {"Q5_K": 40, "Q6_K": 40}),
        ("Q6_K", {"Q6_K": 80}),
    ],
)
def test_eighty_layers(preset: str, counts: dict[str, int]) -> None:
    assert Counter(of(V, types(preset, llama(80, groups=8)))) == counts
    assert "Q5_K" not in of(V, types("Q4_K_M", llama(80)))


def mixtral(experts: int, numbered: bool) -> tuple[list[Site], list[str]]:
    """Sites and modules' names of 32 layers with experts, which are modules of their own or of one tensor."""
    sites: list[Site] = []
    held: list[str] = []
    for i in range(32):
        block = f"model.layers.{i}.mlp"
        sites += [*attention(f"model.layers.{i}", groups=4), linear(f"{block}.gate", rows=experts)]
        held.append(f"{block}.experts")
        for j in range(experts if numbered else 0):
            sites += [linear(f"{block}.experts.{j}.{NAMES[r][4:]}", r) for r in (GATE, UP, DOWN)]
    return sites, [*modules(sites), *held]


@pytest.mark.parametrize(
    ("preset", "k", "v", "o", "others"),
    [
        ("Q2_K", "Q8_0", "Q8_0", "Q5_K", {"Q2_K": 64 * 8, "Q3_K": 32 * 8}),
        ("Q3_K_S", "Q8_0", "Q8_0", "Q5_K", {"Q3_K": 96 * 8}),
        ("Q3_K_M", "Q8_0", "Q8_0", "Q5_K", {"Q3_K": 64 * 8, "Q4_K": 30 * 8, "Q5_K": 2 * 8}),
        ("Q3_K_L", "Q8_0", "Q8_0", "Q3_K", {"Q3_K": 64 * 8, "Q5_K": 32 * 8}),
        ("Q4_K_S", "Q8_0", "Q8_0", "Q5_K", {"Q4_K": 92 * 8, "Q5_K": 4 * 8}),
        ("Q4_K_M", "Q8_0", "Q8_0", "Q5_K", {"Q4_K": 80 * 8, "Q6_K": 16 * 8}),
        ("Q5_K_M", "Q8_0", "Q8_0", "Q5_K", {"Q5_K": 80 * 8, "Q6_K": 16 * 8}),
        ("Q6_K", "Q8_0", "Q8_0", "Q6_K", {"Q6_K": 96 * 8}),
    ],
)
@pytest.mark.parametrize("numbered", [False, True])
def test_eight_experts(preset: str, k: str, v: str, o: str, others: dict[str, int], numbered: bool) -> None:
    found = types(preset, *mixtral(8, numbered))
    assert [set(of(r, found)) for r in (K, V, O)] == [{k}, {v}, {o}]
    assert {label for name, label in found.items() if name.endswith(".gate")} == {"float"}
    assert Counter(label for name, label in found.items() if ".experts." in name) == (others if numbered else {})


@pytest.mark.parametrize("numbered", [False, True])
def test_other_numbers_of_experts_change_the_router_alone(numbered: bool) -> None:
    found, dense = types("Q4_K_M", *mixtral(4, numbered)), types("Q4_K_M", llama(32, groups=4))
    assert [of(r, found) for r in (Q, K, V, O)] == [of(r, dense) for r in (Q, K, V, O)]
    assert {label for name, label in found.items() if name.endswith(".gate")} == {"float"}


def test_experts_are_numbered_by_layer_and_attention_is_counted() -> None:
    """Attention in six of 16 layers, MLPs in the odd ones: their position is among themselves; but of MLPs beside experts it
    is the layer's."""
    heads, odd = (2, 5, 8, 10, 12, 14), range(1, 16, 2)
    sites = [s for i in range(16) for s in (attention(f"h.{i}") if i in heads else [])]
    sites += [s for i in odd for s in mlp(f"h.{i}")]
    found = types("Q4_K_M", sites, modules(sites) + [f"h.{i}" for i in range(16)])
    assert digits(of(V, found)) == list("446446")
    assert digits(of(DOWN, found)) == list("66446446")
    found = types("Q4_K_M", sites, modules(sites) + ["h.0.mlp.experts.3.up_proj", "h.15"])
    assert digits(of(DOWN, found)) == list("64464466")


def test_every_stack_counts_for_itself() -> None:
    sites = llama(32, stack="encoder.layers")[:-1] + llama(12, stack="decoder.layers")[1:]
    found = types("Q4_K_M", sites)
    assert digits(of(DOWN, found))[32:] == list("644644644666")
    assert found["encoder.layers.11.mlp.down_proj"] == "Q4_K" and found["decoder.layers.11.mlp.down_proj"] == "Q6_K"


def test_a_tied_head_has_the_outputs_type() -> None:
    """The one weight is the head's; an embedding of its own has the base type."""
    sites = llama(4)
    sites[-1] = linear("lm_head", HEAD, weight="embed_tokens.weight")
    first, *_, head = decided("Q4_K_M", sites)
    assert head.rule == first.rule == "preset Q4_K_M (lm_head)" and head.scheme == first.scheme == Scheme(get("Q6_K"))
    assert decided("Q4_K_M", llama(4))[0].scheme == Scheme(get("Q4_K"))
    twins = [linear("lm_head", HEAD, weight="w"), linear("again", weight="w")]
    assert types("Q4_K_M", twins) == {"lm_head": "Q6_K", "again": "Q6_K"}


def test_layers_without_a_role_or_a_number_get_the_base_type() -> None:
    assert types("Q4_K_M", [linear("adapter"), linear("model.layers.3.extra")]) == {
        "adapter": "Q4_K",
        "model.layers.3.extra": "Q4_K",
    }


def test_reports_name_the_condition() -> None:
    rules = {d.site.name: d.rule for d in decided("Q4_K_M", llama(32))}
    every = "first and last eighth of layers and every third between"
    assert rules["model.layers.6.mlp.down_proj"] == f"preset Q4_K_M (mlp.down_proj, {every})"
    assert rules["model.layers.5.mlp.down_proj"] == "preset Q4_K_M"
    assert rules["lm_head"] == "preset Q4_K_M (lm_head)"


def test_presets_survive_json_and_pickle_and_differ() -> None:
    policies = [Policy.parse(preset) for preset in GGUF_PRESETS]
    for policy in policies:
        for copy in (Policy.from_json(policy.to_json()), pickle.loads(pickle.dumps(policy))):
            assert copy == policy and copy.decide(llama(32), CPU) == policy.decide(llama(32), CPU)
    assert len({policy.key for policy in policies}) == len(policies)


def test_an_unknown_condition_is_refused() -> None:
    text = Policy.parse("Q4_K_S").to_json().replace("first 4 layers", "first 5 layers")
    with pytest.raises(PolicyError, match="'first 5 layers' is no condition. Did you mean 'first 4 layers'"):
        Policy.from_json(text)


def test_a_preset_is_a_policy_and_a_format_is_a_value() -> None:
    pure = Policy.parse({"*": "Q2_K"}).decide(llama(32), CPU)
    assert {d.scheme.label for d in pure if d.scheme} == {"Q2_K"}
    with pytest.raises(UnknownFormatError, match="'Q4_K_M'"):
        Policy.parse({"*": "Q4_K_M"})


@pytest.mark.parametrize(("name", "near"), [("Q4_K_N", "Q4_K_M"), ("Q3_KM", "Q3_K_M"), ("Q5_K_XL", "Q5_K_S")])
def test_unknown_presets_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownFormatError, match=f"'{name}'. Did you mean .*'{near}'"):
        Policy.parse(name)
