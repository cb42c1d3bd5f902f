"""What Dynamo calls: the composition root. Nothing imports this module; the entry point ``qcompile`` names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._guards import CompileContext

from . import artifacts, collector, trail
from .dynamo_errors import as_themselves
from .errors import PackageError
from .guards import drop_plane_guards
from .options import Options
from .owners import compiler
from .passes import foresight
from .passes.convert import Pending, Retrace
from .passes.kv_cache import packs_caches
from .passes.pipeline import Compilation
from .repro import on_failure, write


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
    listen()
    with as_themselves():
        parsed = Options.parse(options, mode)
        with on_failure(gm, example_inputs, parsed):
            return _compiled(gm, example_inputs, parsed)


def _compiled(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Callable[..., Any]:
    Pending.finish_all()
    compilation = Compilation(gm, example_inputs, parsed)
    switched = packs_caches(compilation.root, parsed.kv_cache)
    conversions = compilation.ready(compilation.conversions())
    if conversions or switched or compilation.training.weights:
        trail.graph(gm, "before")
    foreseen = foresight.foresee(gm, example_inputs, conversions) if conversions and not switched else None
    if (conversions or switched) and foreseen is None:
        if CompileContext.try_get() is None:
            raise PackageError("aot_compile traces a model once, and cannot again over packed weights; pack them before, by "
                               "qcompile.quantize_(model, *inputs, policy=…)")  # fmt: skip
        raise Retrace(conversions)
    foresight.retraced(gm)
    compilation.recorder.saw(compilation.picture())
    compilation.lower_attention()
    compilation.lower_trained()
    drop_plane_guards(gm, example_inputs)
    if foreseen is not None:
        for conversion in foreseen.conversions:
            conversion.run()
        compilation.look_at(foreseen.inputs)
        example_inputs = foreseen.fakes
    _leave(gm, compilation)
    from torch._inductor.compile_fx import compile_fx

    from . import inductor

    inductor.install()
    with inductor.keyed(gm):
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=parsed.inductor_patches())
    return compiled


def _leave(gm: torch.fx.GraphModule, compilation: Compilation) -> None:
    """Logs, traces and files of a graph that goes to Inductor."""
    plan = compilation.plan()
    trail.graph(gm, "after")
    trail.decisions(plan)
    trail.kernels(plan, compilation.device)
    if (folder := trail.folder()) is not None:
        write(folder, gm, compilation.example_inputs, compilation.options)


def _reset() -> None:
    """Called on ``torch._dynamo.reset()``: CUDA graphs recorded for our compilations go too."""
    if torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


qcompile.reset = _reset  # type: ignore[attr-defined]


def _begin(args: CallbackArgs) -> None:
    """Dynamo begins to trace."""
    if args.callback_trigger is CallbackTrigger.DYNAMO and compiler() is qcompile:
        collector.set_aside()


def _end(_: object) -> None:
    collector.bring_back()
    foresight.end()


def listen() -> None:
    """Has Dynamo tell when compilations begin and end. ``torch._dynamo.reset()`` makes it forget; the next graph reminds it."""
    if _end not in callback_handler.end_callbacks:
        callback_handler.register_start_callback(_begin)
        callback_handler.register_end_callback(_end)


artifacts.register()
listen()
