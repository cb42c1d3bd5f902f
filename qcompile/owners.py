"""Who owns a parameter: the modules that hold it, and the names users know them by."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import CatchErrorsWrapper

from .collector import all_in_sight

CALL = nn.Module._call_impl.__code__
COMPILE = CatchErrorsWrapper.__call__.__code__


@dataclass(frozen=True)
class Slot:
    """``module._parameters[name]``: one place that holds a parameter."""

    module: nn.Module
    name: str

    def get(self) -> nn.Parameter | None:
        return self.module._parameters.get(self.name)

    def set(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter


class Owners:
    """Index of modules: parameter → slots, module → parents. Holds strong references; keep it briefly.

    ``tensors``: inputs of a graph, whose models are enough; None: of all modules alive, which takes longer to find.
    """

    @all_in_sight()
    def __init__(self, tensors: Iterable[object] | None = None) -> None:
        self.slots: dict[int, list[Slot]] = {}
        self.parents: dict[int, list[tuple[nn.Module, str]]] = {}
        self._names: dict[int, dict[int, str]] = {}
        modules = _around(tensors) if tensors is not None else None
        for module in modules if modules is not None else _modules_alive():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.slots.setdefault(id(parameter), []).append(Slot(module, name))
            for name, child in module._modules.items():
                if child is not None:
                    self.parents.setdefault(id(child), []).append((module, name))

    def path(self, module: nn.Module) -> tuple[nn.Module, str]:
        """(root, dotted name of ``module`` below it), a shared module by its first name; wrappers made by
        ``torch.compile`` add no name of their own and are no root."""
        root, seen = module, {id(module)}
        while parents := [p for p, _ in self.parents.get(id(root), ()) if id(p) not in seen]:
            root = min(parents, key=_is_compile_wrapper)
            seen.add(id(root))
        root = unwrapped(root)
        if id(root) not in self._names:
            self._names[id(root)] = {id(m): _plain(name) for name, m in root.named_modules()}
        return root, self._names[id(root)].get(id(module), "")

    def name(self, parameter: torch.Tensor) -> str | None:
        """Qualified name of a parameter, such as ``model.layers.0.self_attn.q_proj.weight``; None if no module owns it."""
        slots = self.slots.get(id(parameter))
        if not slots:
            return None
        root, path = self.path(slots[0].module)
        if len(slots) == 1:
            return ".".join(filter(None, (path, slots[0].name)))
        held = {id(s.module): s.name for s in slots}
        first = next(m for m in self._names[id(root)] if m in held)
        return ".".join(filter(None, (self._names[id(root)][first], held[first])))

    def root(self, parameter: torch.Tensor) -> nn.Module | None:
        """The outermost module that holds ``parameter``."""
        slots = self.slots.get(id(parameter))
        return self.path(slots[0].module)[0] if slots else None

    def is_compiled(self, module: nn.Module) -> bool:
        """Whether ``module`` or one that holds it was given to ``torch.compile`` or ``.compile()``."""
        waiting, seen = [module], {id(module)}
        while waiting:
            at = waiting.pop()
            if at._compiled_call_impl is not None or _is_compile_wrapper(at):
                return True
            above = [p for p, _ in self.parents.get(id(at), ()) if id(p) not in seen]
            seen.update(map(id, above))
            waiting += above
        return False


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``."""
    return module._modules["_orig_mod"] if _is_compile_wrapper(module) else module  # type: ignore[return-value]


def _is_compile_wrapper(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule)


def _around(tensors: Iterable[object]) -> list[nn.Module] | None:
    """The modules of the trees that hold all parameters among ``tensors``, as the call under way knows them; None where some is
    in none, or another module may hold a tree, such as the model that a compiled part was taken out of."""
    wanted = {id(t) for t in tensors if isinstance(t, nn.Parameter)}
    variables = _variables()
    modules = _below(variables)
    held = {id(p): module for module in modules for p in module._parameters.values()}
    if not wanted <= held.keys():
        return None
    children = {id(child) for module in modules for child in module._modules.values()}
    roots = [m for m in modules if id(m) not in children and any(id(p) in wanted for p in m.parameters())]
    known = {id(module._modules) for module in modules} | set(map(id, variables))
    holders = gc.get_referrers(*roots, *map(unwrapped, roots)) if roots else []
    others = (h for h in holders if isinstance(h, dict) and id(h) not in known)
    return None if any(all(v is None or issubclass(type(v), nn.Module) for v in h.values()) for h in others) else modules


def _modules_alive() -> list[nn.Module]:
    """Half a million objects live beside PyTorch: the interpreter sorts them out by type without running a line for each. Those
    that ``gc.freeze()`` has taken off its list are found where the call under way knows them."""
    classes, waiting = {nn.Module}, [nn.Module]
    while waiting:
        new = set(type.__subclasses__(waiting.pop())) - classes
        classes |= new
        waiting += new
    objects = gc.get_objects()
    found: list[nn.Module] = [*compress(objects, map(classes.__contains__, map(type, objects)))]
    if gc.get_freeze_count():
        found += _below(_variables())
    return [module for module in {id(m): m for m in found}.values() if "_parameters" in module.__dict__]


def _variables() -> list[Mapping[str, Any]]:
    """Modules that are being called in this thread, and the variables of the frame that Dynamo compiles. No other function is
    looked at: before Python 3.13 that would keep what its variables hold, float weights among them, until it returns."""
    found: list[Mapping[str, Any]] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CALL:
            found.append({"self": frame.f_locals["self"]})
        elif frame.f_code is COMPILE:
            compiled = frame.f_locals["frame"]
            found += [compiled.f_locals, compiled.f_globals]
        frame = frame.f_back
    return found


def compiler() -> Callable[..., Any] | None:
    """The backend of the compilation under way in this thread, as it was given to ``torch.compile``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not COMPILE:
        frame = frame.f_back
    found = frame.f_locals["self"] if frame is not None else None
    while inner := getattr(found, "_torchdynamo_orig_backend", None):
        found = inner
    return getattr(found, "compiler_fn", found)


def _below(variables: Iterable[Mapping[str, Any]]) -> list[nn.Module]:
    """The modules among ``variables``, and those inside."""
    values = (value for each in variables for value in list(each.values()))
    tops = {id(v): v for v in values if issubclass(type(v), nn.Module) and "_parameters" in v.__dict__}
    return [*{id(m): m for top in tops.values() for m in top.modules()}.values()]


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted ``path``, looking through compile wrappers; None if there is none."""
    module: nn.Module | None = unwrapped(root)
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
        module = unwrapped(module) if module is not None else None
    return module


def slot_at(root: nn.Module, name: str) -> Slot | None:
    """The slot of a parameter's qualified ``name`` below ``root``; None if there is none."""
    path, _, own = name.rpartition(".")
    module = find(root, path)
    return Slot(module, own) if module is not None and module._parameters.get(own) is not None else None
