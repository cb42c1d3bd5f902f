"""What Dynamo calls: the composition root. Nothing imports this module; the entry point ``qcompile`` names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .dynamo_errors import as_themselves
from .guards import drop_plane_guards
from .options import Options
from .passes.convert import Pending, Retrace
from .passes.kv_cache import packs_caches
from .passes.pipeline import Compilation


def qcompile(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Quantizes what ``options["policy"]`` names, then gives the graph to Inductor.

    ``gm`` is Dynamo's graph, parameters being inputs; ``example_inputs`` are the real tensors. On the first call for a
    model its weights are packed and Dynamo traces again over the packed ones. For the options see
    :class:`~qcompile.options.Options`. Raises the errors of :mod:`qcompile.errors` as themselves.
    """
    with as_themselves():
        Pending.finish_all()
        parsed = Options.parse(options, mode)
        compilation = Compilation(gm, example_inputs, parsed)
        switched = packs_caches(compilation.root, parsed.kv_cache)
        conversions = compilation.conversions()
    if conversions or switched:
        raise Retrace(conversions)
    compilation.lower_attention()
    drop_plane_guards(gm, example_inputs)
    from torch._inductor.compile_fx import compile_fx

    from . import inductor

    inductor.install()
    with inductor.keyed(gm):
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=parsed.inductor_patches())
    return compiled


def _reset() -> None:
    """Called on ``torch._dynamo.reset()``: CUDA graphs recorded for our compilations go too."""
    if torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


qcompile.reset = _reset  # type: ignore[attr-defined]
