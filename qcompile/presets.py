"""Policies by name, as data: ordered (pattern, value) pairs in the words that a user's own policy is written
in."""

from __future__ import annotations

ALIASES = {"int8": "int8", "int4": "int4_g128", "fp8": "fp8_e4m3"}
"""Short names of formats; every other registered format goes by its own name."""

FLOATS = frozenset({"float", "fp32", "fp16", "bf16"})
"""Values that leave a layer in floating point as it is; none of them converts."""

DYNAMIC = "_dynamic"
"""Ending of a format's name that adds activations quantized per token: int8, or fp8 for float formats."""

ROUTERS = ("role:router", "float")
"""What every policy without rules of the user's own begins with: routers are small, and a wrong choice of experts is no small
error."""

PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    "int8": (ROUTERS, ("*", "int8")),
    "fp8": (ROUTERS, ("*", "fp8")),
    "int4": (ROUTERS, ("role:lm_head", "int8"), ("*", "int4")),
    "int8_dynamic": (ROUTERS, ("*", "int8_dynamic")),
    "fp8_dynamic": (ROUTERS, ("*", "fp8_dynamic")),
    "int4_dynamic": (ROUTERS, ("role:lm_head", "int8_dynamic"), ("*", "int4_dynamic")),
    "mixed": (
        ROUTERS,
        ("role:embed_tokens", "float"),
        ("role:lm_head", "float"),
        ("role:attention.*", "fp8"),
        ("role:mlp.*", "int4"),
        ("*", "int8"),
    ),
}
"""``*`` means linear layers; an embedding is packed where it shares the weight of one."""

DEFAULT = "default"
"""Name of the policy of a compilation that gives none: the preset below for its device."""


def default_preset(computes_fp8: bool) -> str:
    """fp8 where matrix units compute it; int8 elsewhere, as 8-bit weights of either kind move equally many
    bytes."""
    return "fp8" if computes_fp8 else "int8"
