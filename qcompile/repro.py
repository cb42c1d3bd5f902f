"""A script that runs one graph again as it was compiled: for failures, and under ``TORCH_COMPILE_DEBUG=1``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__
from .dynamo_errors import RESTARTS
from .errors import OptionError, PolicyError, StrictError, UnknownFormatError
from .logs import log
from .options import Options
from .owners import Owners
from .tensor import QuantizedTensor, as_parameter
from .trail import debug_folder

LIMIT_BYTES = 1 << 28
"""Values are saved up to this size; larger graphs are repeated with random ones of the same shapes."""

MISUSE = (OptionError, PolicyError, StrictError, UnknownFormatError)
"""What a user reads and corrects: nothing to repeat."""

SCRIPT = '''"""Runs one graph again that qcompile {version} compiled, with its inputs, options and grad mode: python repro.py"""

from __future__ import annotations

import os

{environment}
from pathlib import Path

import torch
from torch import device, inf, nan, tensor

import qcompile.repro

{graph}


OPTIONS = {options}
ORDER = {order}

if __name__ == "__main__":
    saved = torch.load(Path(__file__).with_name("values.pt"), weights_only=True)
    model = qcompile.repro.Model(Repro(), ORDER, saved["parameters"])
    with torch.set_grad_enabled({grad}):
        torch.compile(model, backend="qcompile", options=qcompile.repro.options(OPTIONS), dynamic=False)(*saved["inputs"])
    print("no failure")
'''


class Model(nn.Module):
    """``graph`` with the parameters at their names. ``order`` says for every argument of the graph which parameter, or the how
    many-th input, it is."""

    def __init__(self, graph: nn.Module, order: Sequence[str | int], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.graph, self.order = graph, list(order)
        for name, value in parameters.items():
            path, _, own = name.rpartition(".")
            module: nn.Module = self
            for part in path.split(".") if path else ():
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            packed = isinstance(value, QuantizedTensor)
            module.register_parameter(own, as_parameter(value) if packed else nn.Parameter(value, value.requires_grad))  # type: ignore[arg-type]
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        return self.graph(*[self.get_parameter(o) if isinstance(o, str) else inputs[o] for o in self.order])


def options(written: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the backend from what a script holds."""
    from .policy import Policy

    return {**written, "policy": Policy.from_json(written["policy"])}


def write(folder: Path, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Path:
    """Writes ``repro.py`` and ``values.pt`` into ``folder``; returns the script. A KV cache is in the graph, so the option for
    it is left out."""
    from torch._dynamo.debug_utils import NNModuleToString

    names = Owners().name
    parameters: dict[str, torch.Tensor] = {}
    inputs: list[Any] = []
    order: list[str | int] = []
    small = sum(_nbytes(v) for v in example_inputs) <= LIMIT_BYTES
    for value in example_inputs:
        name = names(value) if isinstance(value, nn.Parameter) else None
        if name is not None:
            parameters[name] = _kept(value, small)
            order.append(name)
        else:
            order.append(len(inputs))
            inputs.append(_kept(value, small))
    written = {"policy": parsed.policy.to_json(), "strict": parsed.strict, "weights": parsed.weights, "rounding": parsed.rounding,
               "fallback": parsed.fallback, "inductor": {**parsed.inductor_patches()}}  # fmt: skip
    environment = {n: v for n, v in os.environ.items() if n == "CXX" or n.startswith("QCOMPILE_")}
    text = SCRIPT.format(
        version=__version__,
        environment="\n".join(f"os.environ.setdefault({n!r}, {v!r})" for n, v in sorted(environment.items())),
        graph=NNModuleToString.convert(gm).strip(),
        options=repr(written),
        order=repr(order),
        grad=torch.is_grad_enabled(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"parameters": parameters, "inputs": inputs}, folder / "values.pt")
    script = folder / "repro.py"
    script.write_text(text, encoding="utf-8")
    return script


def _nbytes(value: Any) -> int:
    if isinstance(value, QuantizedTensor):
        return value.packed_nbytes
    return value.nbytes if isinstance(value, torch.Tensor) and not value.is_meta else 0


def _kept(value: Any, small: bool) -> Any:
    """What is saved of an input: numbers as those of the call; tensors as they are, or random ones like them."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if not isinstance(value, torch.Tensor):
        return value
    fake = isinstance(value, torch._subclasses.FakeTensor)
    if small and not fake:
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, QuantizedTensor):
        return value.with_planes([torch.zeros_like(p) for p in value.planes])
    shape = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape]
    device = "cpu" if value.is_meta else value.device
    made = torch.randn(shape, device=device) if value.is_floating_point() else torch.zeros(shape, device=device)
    return made.to(value.dtype).requires_grad_(value.requires_grad)


@contextlib.contextmanager
def on_failure(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Iterator[None]:
    """An error that is not a user's misuse leaves a repro, and says where, in the log and in a note of its own."""
    try:
        yield
    except (*RESTARTS, *MISUSE):
        raise
    except Exception as error:
        try:
            script = write(debug_folder(), gm, example_inputs, parsed)
        except Exception as second:  # the first error is the one that matters
            log.error("qcompile could not write a repro: %s: %s", type(second).__name__, second)
        else:
            error.add_note(f"qcompile left a script that repeats this failure: python {script}")
            log.error("%s; a script that repeats it: python %s", type(error).__name__, script)
        raise
