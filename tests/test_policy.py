"""Policies: what rules match, what they set, and every way in which they are refused."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from qcompile.errors import FormatError, PolicyError, UnknownFormatError
from qcompile.formats import FormatSpec, Plane, Scheme, get, register_scheme, symbols
from qcompile.plan import ROLES, Decision, Site
from qcompile.policy import Policy, check_rules
from qcompile.presets import ALIASES, FLOATS, PRESETS
from qcompile.target import Target

CPU, HOPPER, AMPERE = Target("cpu", "AVX512"), Target("cuda", "90"), Target("cuda", "80")


def linear(name: str, *roles: str, weight: str | None = None, **fields: object) -> Site:
    parameter = weight or f"{name}.weight"
    return Site(name, "linear", frozenset(roles), name, parameter, (64, 32), parameter=parameter, **fields)  # type: ignore[arg-type]


def embedding(name: str, *roles: str, weight: str | None = None) -> Site:
    parameter = weight or f"{name}.weight"
    return Site(name, "embedding", frozenset(roles), name, parameter, (96, 32), parameter=parameter)


def decoder(tied: bool = False, fused: bool = False) -> list[Site]:
    """One layer of a decoder, with projections apart or fused, and the head's weight its own or the
    embedding's."""
    block = "model.layers.0"
    attention = (
        [linear(f"{block}.attn.c_attn", *ROLES[:3])]
        if fused
        else [linear(f"{block}.self_attn.{r[10:]}", r) for r in ROLES[:3]]
    )
    return [
        embedding("model.embed_tokens", "embed_tokens"),
        embedding("model.positions"),
        *attention,
        Site(f"{block}.self_attn", "attention", node="attend", shape=(1, 4, 6, 8)),
        linear(f"{block}.self_attn.o_proj", ROLES[3]),
        *(linear(f"{block}.mlp.{r[4:]}", r) for r in ROLES[4:7]),
        linear("model.adapter"),
        linear("lm_head", "lm_head", weight="model.embed_tokens.weight" if tied else None),
    ]


def labels(decisions: list[Decision]) -> dict[str, str]:
    """What became of the linear layers and embeddings."""
    found = {d.site.name.rpartition(".")[2]: d for d in decisions if d.site.operator != "attention"}
    return {name: d.scheme.label if d.scheme else "float" for name, d in found.items()}


def decided(value: object, sites: list[Site] | None = None, target: Target = CPU) -> dict[str, str]:
    return labels(Policy.parse(value).decide(sites or decoder(), target))


QKVO, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("preset", "attention", "mlp", "head", "others"),
    [
        ("int8", "int8", "int8", "int8", "int8"),
        ("fp8", "fp8_e4m3", "fp8_e4m3", "fp8_e4m3", "fp8_e4m3"),
        ("int4", "int4_g128", "int4_g128", "int8", "int4_g128"),
        ("int4_g32", "int4_g32", "int4_g32", "int4_g32", "int4_g32"),
        ("int8_dynamic", *["int8+int8 act"] * 4),
        ("fp8_dynamic", *["fp8_e4m3+fp8 act"] * 4),
        ("int4_dynamic", "int4_g128+int8 act", "int4_g128+int8 act", "int8+int8 act", "int4_g128+int8 act"),
        ("mixed", "fp8_e4m3", "int4_g128", "float", "int8"),
        ("float", *["float"] * 4),
    ],
)
def test_presets(preset: str, attention: str, mlp: str, head: str, others: str) -> None:
    expected = dict.fromkeys(QKVO, attention) | dict.fromkeys(MLP, mlp) | {"lm_head": head, "adapter": others}
    assert decided(preset) == expected | {"embed_tokens": "float", "positions": "float"}


@pytest.mark.parametrize(("target", "label"), [(CPU, "int8"), (AMPERE, "int8"), (HOPPER, "fp8_e4m3")])
def test_default_follows_the_device(target: Target, label: str) -> None:
    assert decided(None, target=target)["q_proj"] == label
    assert (
        Policy.parse(None).decide(decoder(), target)[2].rule == f"preset default ({label.partition('_')[0]})"
    )


@pytest.mark.parametrize("fused", [False, True])
def test_the_dictionary_of_roles(fused: bool) -> None:
    """Roles match where projections are apart and where they are fused under another name."""
    rules = {"attention.q_proj": "fp8", "mlp.gate_proj": "int4", "embed_tokens": "fp16", "lm_head": "fp16"}
    made = decided(rules, decoder(fused=fused))
    quantized = {name: label for name, label in made.items() if label != "float"}
    assert quantized == {"c_attn" if fused else "q_proj": "fp8_e4m3", "gate_proj": "int4_g128"}


def test_unmatched_sites_stay_float_and_say_so() -> None:
    by_name = {
        d.site.name: d for d in Policy.parse({"lm_head": "int8", "mlp.*": "bf16"}).decide(decoder(), CPU)
    }
    left = by_name["model.adapter"]
    assert (left.scheme, left.rule, left.reason, left.wanted) == (None, "no rule", "no rule matches", None)
    kept = by_name["model.layers.0.mlp.up_proj"]
    assert (kept.scheme, kept.rule, kept.wanted) == (None, "mlp.*: float", None)
    assert by_name["lm_head"].rule == "lm_head: int8" and by_name["lm_head"].reason is None


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("model.layers.0.mlp.up_proj", {"up_proj"}),
        ("mlp.up_proj", {"up_proj"}),
        ("up_proj", {"up_proj"}),
        ("p_proj", set()),
        ("model.layers.*.mlp.*", set(MLP)),
        ("layers.0.self_attn.[qk]_proj", {"q_proj", "k_proj"}),
        ("attention.?_proj", set(QKVO)),
        ("role:mlp.*", set(MLP)),
        ("role:model.layers.0.mlp.up_proj", set()),
        ("Lm_head", set()),
        ("*", {*QKVO, *MLP, "adapter", "lm_head"}),
    ],
)
def test_patterns(pattern: str, matched: set[str]) -> None:
    assert {n for n, label in decided({pattern: "int8"}).items() if label == "int8"} == matched


def test_first_match_wins_in_mappings_and_pairs() -> None:
    rules = [("up_proj", "int4_g32"), ("mlp.*", "fp8"), ("*", "int8")]
    for value in (rules, dict(rules)):
        made = decided(value)
        assert (made["up_proj"], made["gate_proj"], made["adapter"]) == ("int4_g32", "fp8_e4m3", "int8")


def test_values_may_be_schemes_and_formats() -> None:
    scheme = Scheme(get("int8"), "int8")
    assert decided({"up_proj": scheme, "down_proj": get("fp8_e5m2"), "gate_proj": None}) == decided(
        {"up_proj": "int8_dynamic", "down_proj": "fp8_e5m2", "gate_proj": "float"}
    )
    assert decided(scheme)["adapter"] == "int8+int8 act" and decided(get("fp8_e5m2"))["adapter"] == "fp8_e5m2"


def test_what_no_format_is_for_is_left_with_a_reason() -> None:
    site = Site("here", "other", frozenset(), "node", "w", (8, 8), unsupported="conv1d")
    for value, meant in (("int8", False), ({"*": "int8"}, False), ({"h*": "int8"}, False), ({"here": "int8"}, True)):
        (decision,) = Policy.parse(value).decide([site], CPU)
        assert decision.scheme is None and decision.reason == "conv1d"
        assert (decision.wanted is not None) == meant


def test_attention_is_computed_in_what_a_rule_of_its_own_says() -> None:
    site = Site("model.layers.0.self_attn", "attention", node="attend", shape=(1, 4, 6, 8))
    for value in ("int8", "mixed", {"*": "int8"}, {"layers.0.*": "int8"}, {"model.*": "int8"}):
        (left,) = Policy.parse(value).decide([site], CPU)
        assert left.scheme is None and left.wanted is None and left.reason
    for pattern in ("*.self_attn", "self_attn", "model.layers.*.self_attn"):
        (named,) = Policy.parse({pattern: "fp8"}).decide([site], CPU)
        assert named.scheme == named.wanted == Scheme(get("fp8_e3m4"))
    (refused,) = Policy.parse({"self_attn": "Q4_K"}).decide([site], CPU)
    assert refused.scheme is None and "scales must be floats that follow from one token's range" in (refused.reason or "")
    (odd,) = Policy.parse({"self_attn": "fp8"}).decide([dataclasses.replace(site, unsupported="it drops")], CPU)
    assert odd.scheme is None and odd.reason == "it drops" and odd.wanted is not None


def test_unsupported_linear_layers_are_wanted_but_left() -> None:
    (decision,) = Policy.parse("int8").decide([linear("odd", unsupported="it is sliced")], CPU)
    assert (
        decision.scheme is None
        and decision.reason == "it is sliced"
        and decision.wanted == Scheme(get("int8"))
    )
    product = Site(
        "x", "matmul", frozenset(), "matmul", None, (2, 2), unsupported="both factors are activations"
    )
    assert Policy.parse("int8").decide([product], CPU)[0].wanted is None


def test_embeddings_are_packed_where_a_rule_names_them() -> None:
    table = Site("model.embed", "embedding", frozenset({"embed_tokens"}), "node", "w", (64, 32))
    for value in ("int8", "int4", {"*": "int8"}):
        (left,) = Policy.parse(value).decide([table], CPU)
        assert left.scheme is None and left.wanted is None
        assert "name 'model.embed' in a rule of its own" in (left.reason or "")
    for value, wanted in (({"embed_tokens": "int8"}, "int8"), ({"model.*": "int4_g32"}, "int4_g32"), ("Q4_K_M", "Q4_K")):
        (packed,) = Policy.parse(value).decide([table], CPU)
        assert packed.scheme == Scheme(get(wanted))


@pytest.mark.parametrize(
    "value", ["int8", "int4", {"*": "int8"}, {"lm_head": "int8"}, {"lm_*": "int8"}, {"embed_tokens": "int8"}]
)
def test_a_head_and_an_embedding_that_are_one_weight_are_packed_as_one(value: object) -> None:
    by_name = {d.site.name: d for d in Policy.parse(value).decide(decoder(tied=True), CPU)}
    assert by_name["lm_head"].scheme == by_name["model.embed_tokens"].scheme == Scheme(get("int8"))


def test_a_tie_to_what_cannot_be_packed_keeps_the_weight() -> None:
    conv = Site("conv", "other", frozenset(), "node", "w", (8, 8), parameter="w", unsupported="conv1d")
    sites = [linear("head", weight="w"), conv]
    head = Policy.parse("int8").decide([dataclasses.replace(s, parameter="w") for s in sites], CPU)[0]
    assert head.scheme is None and "tied to other 'conv'" in (head.reason or "")


def test_tied_linears_share_the_specific_rule() -> None:
    sites = [linear("a", weight="w"), linear("b", weight="w"), linear("c")]
    assert decided({"*": "int8", "b": "float"}, sites) == dict.fromkeys("abc", "int8")
    assert decided([("b", "int4_g32"), ("*", "int8")], sites) == {
        "a": "int4_g32",
        "b": "int4_g32",
        "c": "int8",
    }
    assert decided({"b": "fp8"}, sites) == {"a": "fp8_e4m3", "b": "fp8_e4m3", "c": "float"}


def test_tied_head_and_embedding_kept_float_by_one_rule() -> None:
    made = Policy.parse([("embed_tokens", "fp16"), ("*", "int8")]).decide(decoder(tied=True), CPU)
    head = next(d for d in made if d.site.name == "lm_head")
    assert head.scheme is None and head.wanted is None and head.rule == "embed_tokens: float"


@pytest.mark.parametrize(
    ("value", "fused", "tied", "words"),
    [
        (
            {"attention.q_proj": "fp8", "attention.k_proj": "int8"},
            True,
            False,
            ["attention.q_proj", "attention.k_proj", "c_attn"],
        ),
        (
            {"attention.v_proj": "float", "attention.*": "int8"},
            True,
            False,
            ["attention.v_proj", "'attention.*'", "c_attn"],
        ),
        (
            {"lm_head": "int8", "embed_tokens": "fp16"},
            False,
            True,
            ["'lm_head'", "'embed_tokens'", "share one weight"],
        ),
    ],
)
def test_contradictions_are_named(value: object, fused: bool, tied: bool, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.parse(value).decide(decoder(tied, fused), CPU)
    assert all(word in str(error.value) for word in words), error.value


def test_agreement_is_no_contradiction() -> None:
    fused = decoder(fused=True)
    assert decided({"attention.q_proj": "fp8", "attention.k_proj": "fp8_e4m3"}, fused)["c_attn"] == "fp8_e4m3"
    assert decided({"attention.q_proj": "fp8", "*": "int8"}, fused)["c_attn"] == "fp8_e4m3"
    named = [("c_attn", "int8"), ("attention.q_proj", "fp8"), ("attention.k_proj", "int4")]
    assert decided(named, fused)["c_attn"] == "int8"


def test_weights_that_are_not_float_are_refused_where_named() -> None:
    site = linear("counts", dtype=torch.int32)
    with pytest.raises(PolicyError, match=r"'counts'.*int32"):
        Policy.parse({"counts": "int8"}).decide([site], CPU)
    (decision,) = Policy.parse("int8").decide([site], CPU)
    assert decision.scheme is None and "int32" in (decision.reason or "")


@pytest.mark.parametrize("name", ["int5", "int4_g1", "fp16x", "nf4_dynamicc"])
def test_unknown_formats_name_the_nearest(name: str) -> None:
    for value in (name, {"*": name}):
        with pytest.raises(UnknownFormatError, match=f"'{name}'.*Known: .*int8"):
            Policy.parse(value)
    with pytest.raises(UnknownFormatError, match="Did you mean .*'mixed'"):
        Policy.parse("mixd")


def test_formats_that_somebody_asked_for_are_not_offered() -> None:
    for group in range(200, 320, 2):
        Policy.parse(f"int3_g{group}")
    with pytest.raises(UnknownFormatError, match="'int3_g1'.*Known: .*int8") as raised:
        Policy.parse("int3_g1")
    assert "int3_g2" not in str(raised.value).replace("int3_g256", "")


def test_mixed_is_no_value_of_a_rule() -> None:
    with pytest.raises(UnknownFormatError, match="'mixed'"):
        Policy.parse({"*": "mixed"})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"*": 8}, "8 (int) is no value"),
        (3.5, "3.5 (float) is no policy"),
        ({}, "without rules"),
        ([("a", "int8"), ("a", "fp8")], "'a' comes twice"),
        ([("a",)], "is no rule"),
        ([(1, "int8")], "is no rule"),
        ([("", "int8")], "is no rule"),
        ([None], "is no rule"),
    ],
)
def test_malformed_policies(value: object, words: str) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.parse(value)
    assert words in str(error.value)


def test_activations_are_checked_by_the_scheme() -> None:
    with pytest.raises(FormatError, match="activations='fp8'"):
        Policy.parse({"*": Scheme(get("int8"), "fp8")})


def test_rules_that_match_nothing_name_the_nearest() -> None:
    sites = decoder()
    policy = Policy.parse({"attention.qproj": "fp8", "mlp.up_prj": "int4", "lm_head": "int8"})
    assert [r.pattern for r in policy.unmatched(sites)] == ["attention.qproj", "mlp.up_prj"]
    with pytest.raises(PolicyError) as error:
        check_rules(policy, sites, [s.name for s in sites])
    message = str(error.value)
    assert "'attention.qproj'" in message and "'attention.q_proj'" in message and "'mlp.up_proj'" in message
    assert "lm_head" in message and "'lm_head': int8 matches" not in message


def test_rules_for_graphs_to_come_are_not_refused() -> None:
    """A module's name is enough; a role must be on some site unless only a part of the model was seen."""
    seen = [linear("model.layers.0.mlp.up_proj", "mlp.up_proj")]
    modules = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    check_rules(Policy.parse({"layers.1.mlp.*": "int4", "lm_head": "int8"}), seen, modules)
    check_rules(Policy.parse({"attention.q_proj": "int4"}), seen, modules, whole=False)
    with pytest.raises(PolicyError, match=r"attention\.q_proj"):
        check_rules(Policy.parse({"attention.q_proj": "int4"}), seen, modules)
    with pytest.raises(PolicyError, match=r"attention\.q_prj"):
        check_rules(Policy.parse({"attention.q_prj": "int4"}), seen, modules, whole=False)
    check_rules(Policy.parse("mixed"), [], [])


@pytest.mark.parametrize(
    "value", [*PRESETS, None, "int4_sym_g64", "bf16", {"a": "int4", "b": None, "*": "int8_dynamic"}]
)
def test_policies_survive_json_and_pickle_and_compare_by_value(value: object) -> None:
    policy = Policy.parse(value)
    for copy in (
        Policy.from_json(policy.to_json()),
        pickle.loads(pickle.dumps(policy)),
        Policy.parse(value),
        Policy.parse(policy),
    ):
        assert copy == policy and hash(copy) == hash(policy) and copy.key == policy.key
        assert [d.scheme and d.scheme.key for d in copy.decide(decoder(), HOPPER)] == [
            d.scheme and d.scheme.key for d in policy.decide(decoder(), HOPPER)
        ]


def test_keys_tell_policies_apart() -> None:
    values = [
        None,
        *PRESETS,
        *FLOATS,
        {"a": "int8"},
        {"a": "fp8"},
        {"b": "int8"},
        {"*": "int8"},
        {"a": "int8", "b": "int8"},
        {"b": "int8", "a": "int8"},
    ]
    assert len({Policy.parse(v).key for v in values}) == len(values)
    assert Policy.parse({"a": "int8"}).key == Policy.parse([("a", Scheme(get("int8")))]).key
    assert Policy.parse({"a": "int4"}).key != Policy.parse([("a", ALIASES["int4"])]).key  # which attention gets too


@pytest.mark.parametrize("name,weights,tokens", [
    ("fp8", "fp8_e4m3", "fp8_e3m4"), ("int4", "int4_g128", "int4_g32"), ("int8", "int8", "int8"),
    ("fp8_e4m3", "fp8_e4m3", "fp8_e4m3"),
])  # fmt: skip
def test_short_names_mean_for_attention_what_they_mean_for_caches(name: str, weights: str, tokens: str) -> None:
    policy = Policy.parse({"*.self_attn": name, "*": name})
    sites = [linear("a"), Site("model.layers.0.self_attn", "attention", node="attend", shape=(1, 4, 6, 8))]
    for again in (policy, Policy.from_json(policy.to_json())):
        found = again.decide(sites, CPU)
        assert [d.scheme and d.scheme.label for d in found] == [weights, tokens]
        assert [d.rule for d in found] == [f"*: {weights}", f"*.self_attn: {tokens}"]


def test_a_saved_policy_with_another_declaration_of_its_format_is_refused() -> None:
    q, scale = symbols("q scale")
    spec = FormatSpec("mine_g32", (Plane("scale", "f32", 32), Plane("q", "u4")), value=scale * (q - 8))
    policy = Policy.parse({"*": spec})
    with pytest.raises(UnknownFormatError, match="mine_g32"):
        Policy.from_json(policy.to_json())
    register_scheme(Scheme(spec))
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "explicit": true, "rules": [{}]}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="no policy saved"):
        Policy.from_json(text)
