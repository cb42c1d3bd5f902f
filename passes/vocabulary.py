"""Operators by name, as :func:`qcompile.passes.trace.op_name` gives it, in groups that discovery uses."""

from __future__ import annotations

WEIGHT_OPERANDS = {
    "linear": ((0, "input"), (1, "weight")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "matmul": ((0, "input"), (1, "other")),
    "mm": ((0, "input"), (1, "mat2")),
}
"""Operators with a 2-D weight on the right: positions and keyword names of the input and of the weight."""

MULTI_HEAD = "multi_head_attention_forward"
"""Attention with its projections inside: ``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls."""

MULTI_HEAD_WEIGHTS: dict[tuple[int, str], tuple[str, ...]] = {
    (5, "in_proj_weight"): ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    (11, "out_proj_weight"): ("attention.o_proj",),
    (18, "q_proj_weight"): ("attention.q_proj",),
    (19, "k_proj_weight"): ("attention.k_proj",),
    (20, "v_proj_weight"): ("attention.v_proj",),
}
"""Its weights by position and keyword, each that of a linear layer, and their roles."""

PRODUCTS = {"matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "baddbmm": (1, 2), "einsum": (1, 2)}
"""Operators that multiply two activations (scores, weighted values): positions of the factors."""

GROUPED = frozenset("grouped_mm _grouped_mm grouped_mm_fallback".split())
"""Operators that multiply groups of rows by one expert each: PyTorch's, and that of transformers where PyTorch's does not run."""

MULTIPLIES = frozenset(
    "bmm baddbmm einsum bilinear _native_multi_head_attention "
    "_transformer_encoder_layer_fwd".split()
) | GROUPED
"""Operators that multiply by a weight, where no kernel of ours does: they count as linear layers left in floating point."""

ACTIVATIONS = frozenset(
    "silu gelu relu relu6 leaky_relu elu selu celu mish softplus sigmoid tanh hardswish hardsigmoid hardtanh "
    "erf exp glu softsign threshold prelu log_sigmoid".split()
)

ELEMENTWISE = frozenset(
    "add sub rsub mul div neg pow square sqrt rsqrt reciprocal abs "
    "clamp clip clamp_min clamp_max minimum maximum where "
    "to float half bfloat16 double type type_as _to_copy dropout alpha_dropout contiguous clone "
    "view view_as reshape flatten unflatten squeeze unsqueeze transpose permute expand expand_as t T mT "
    "chunk split split_with_sizes tensor_split unbind getitem select slice narrow cat stack "
    "layer_norm rms_norm mean sum var norm vector_norm "
    "from_local redistribute to_local wait_tensor all_reduce".split()
)
"""Operators that keep or rearrange elements, also among processes, and the norms between them."""

MADE = frozenset("tensor zeros ones full empty arange zeros_like ones_like full_like scalar_tensor".split())
"""Operators whose result holds nothing of the model."""

COUNTED = frozenset("arange cumsum range linspace".split())
"""Operators that positions are counted with."""

LOSSES = frozenset("cross_entropy nll_loss log_softmax softmax argmax topk".split())

CHOICES = frozenset("topk argmax".split())
"""Operators that routers choose experts by."""

MASKS = frozenset("masked_fill nan_to_num".split())
"""What may stand between scores and their softmax besides elementwise operators."""

SLICES = frozenset("getitem narrow select slice view".split())

SHAPE_QUERIES = frozenset("size Size dim numel stride shape sym_size ndim dtype device is_floating_point".split())
"""Questions about a tensor that do not read its values."""
