"""What a frame's weights were packed to in an earlier process, put in place before Dynamo traces, so that it traces once.

A guess and no more: the graph that comes of it is judged as if the weights were float ones, which stay alive until then.
Where the guess is not what the policy decides, they are put back and the ordinary way begins: pack, and trace again.
Planes are mapped from their files meanwhile, which takes no memory; on other devices than CPUs they would be a second model
beside the float one, so nothing is guessed there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from qcompile import kernels, target
from qcompile.dtensor import packed_in
from qcompile.errors import QCompileError, UnknownFormatError
from qcompile.formats import Scheme, register_scheme, scheme_of
from qcompile.options import Options
from qcompile.owners import Owners, Slot, slot_at
from qcompile.packing import Packed, known
from qcompile.store import code_version, the_store
from qcompile.tensor import as_parameter, guess, tensor_class

from .convert import Conversion

PLAN = "plan.json"
DYNAMO = "_compile", "torch._dynamo.convert_frame"
"""Function and module that hold the frame which Dynamo compiles."""


@dataclass
class Guess:
    """A weight that was packed ahead of its trace: the float ``original``, the ``slots`` that held it, what stands there now."""

    original: nn.Parameter
    slots: tuple[Slot, ...]
    packed: Packed
    parameter: nn.Parameter

    def undo(self) -> None:
        """Puts the float weight back."""
        for slot in self.slots:
            slot.set(self.original)


@dataclass
class Foresight:
    """The guesses for the frame that is being compiled; ``parts`` name its plan in the store (None: it has no name);
    ``owners`` of float weights, if they were looked for."""

    parts: dict[str, Any] | None = None
    owners: Owners | None = None
    guesses: dict[int, Guess] = field(default_factory=dict)

    def floats(self, inputs: Sequence[Any]) -> list[Any]:
        """Graph inputs with the float weights in place of the guesses, which are taken back everywhere."""
        for each in self.guesses.values():
            each.undo()
        return [g.original if (g := self.guesses.get(id(v))) is not None else v for v in inputs]

    def confirms(self, inputs: Sequence[Any], conversions: Sequence[Conversion]) -> list[Conversion] | None:
        """The conversions, each with the parameter that was traced, if every guess is what they will give and the graph's
        ``inputs`` need no other; None if not, and then the graph must be traced again."""
        guesses = {id(g.original): g for g in self.guesses.values()}
        wanted = {id(c.slots[0].get()): tensor_class(c.scheme, c.transposed) for c in conversions}
        if any(not isinstance(g.parameter, wanted.get(at, ())) for at, g in guesses.items()):
            return None  # also of a weight that is no input: the trace may have looked at it
        if any(id(v) in wanted for v in inputs):
            return None
        made = []
        for conversion in conversions:
            made_before = guesses.get(id(conversion.slots[0].get()))
            if made_before is not None:
                conversion = dataclasses.replace(conversion, packed=made_before.packed, traced=made_before.parameter)
            made.append(conversion)
        return made

    def remember(self, root: nn.Module | None, owners: Owners, conversions: Sequence[Conversion]) -> None:
        """Keeps what is about to be packed, for later processes; a plan that was kept before was wrong and is dropped."""
        if self.parts is None or root is None:
            return
        weights = []
        for conversion in conversions:
            parameter = conversion.slots[0].get()
            if conversion.packed is not None or parameter is None:
                return  # by a calibration, whose result depends on inputs that nobody knows before the trace
            weights.append([owners.name(parameter), conversion.scheme.key, conversion.transposed])
        store = the_store()
        store.discard("plan", self.parts)
        with store.making("plan", self.parts) as slot:
            slot.put(lambda folder: (folder / PLAN).write_text(json.dumps(weights)))


_under_way = Foresight()
"""Dynamo compiles one frame at a time: it holds a lock meanwhile."""


def begin(backend: object) -> None:
    """At the start of a compilation: packs what the frame's weights were packed to before, if ``backend`` compiles it."""
    global _under_way
    _under_way = Foresight()
    frame = _compiled_frame(backend)
    if frame is None:
        return
    code, values, kwargs = frame
    module = next((v for v in values if isinstance(v, nn.Module)), None)
    if module is None:
        return
    try:
        options = Options.parse(kwargs.get("options"), kwargs.get("mode"))
    except QCompileError:
        return  # the backend raises it where it is shown to the user
    if options.qat or options.rounding != "nearest" or options.weights != "free" or options.calibration is not None:
        return
    _under_way.owners = owners = Owners()
    root, path = owners.path(module)
    _under_way.parts = _parts(root, path, code, options)
    _begin_kernels(root, options)
    found = the_store().find("plan", _under_way.parts)
    if found is not None:
        _under_way.guesses = _guesses(root, owners, json.loads((found / PLAN).read_text()))
        guess(bool(_under_way.guesses))


def _begin_kernels(root: nn.Module, options: Options) -> None:
    """Compiles beside the trace what the policy says of all layers, which some will surely need."""
    device = next((p.device for p in root.parameters()), torch.device("meta"))
    if device.type != "meta":
        rules = options.policy.resolved(target.of(device)).rules
        kernels.begin([register_scheme(r.scheme) for r in rules if r.scheme is not None and r.catches_all], device.type)


def take() -> Foresight:
    """The guesses of the compilation under way, which are the caller's from now on."""
    global _under_way
    taken, _under_way = _under_way, Foresight()
    guess(False)
    return taken


def end() -> None:
    """At the end of a compilation: guesses that no graph confirmed are taken back."""
    for each in take().guesses.values():
        each.undo()


def _compiled_frame(backend: object) -> tuple[CodeType, list[Any], Mapping[str, Any]] | None:
    """(code, values of its locals, keyword arguments of the backend) of the frame that Dynamo begins to compile for
    ``backend``; None for another's, or where this release of torch does not show them."""
    at: FrameType | None = sys._getframe(1)
    while at is not None and (at.f_code.co_name, at.f_globals.get("__name__")) != DYNAMO:
        at = at.f_back
    if at is None:
        return None
    wrapped = at.f_locals.get("compiler_fn")
    while (inner := getattr(wrapped, "_torchdynamo_orig_backend", None)) is not None:
        wrapped = inner
    if getattr(wrapped, "compiler_fn", wrapped) is not backend:
        return None
    code, values = at.f_locals.get("code"), at.f_locals.get("locals")
    if not isinstance(code, CodeType) or not isinstance(values, Mapping):
        return None
    flat = [v for value in values.values() for v in (value if isinstance(value, tuple) else (value,))]
    return code, flat, getattr(wrapped, "kwargs", {})


def _parts(root: nn.Module, path: str, code: CodeType, options: Options) -> dict[str, Any]:
    shapes = [(n, tuple(p.shape), str(p.dtype), p.device.type) for n, p in root.named_parameters(remove_duplicate=False)
              if packed_in(p) is None]  # fmt: skip
    return {
        "root": f"{type(root).__module__}.{type(root).__qualname__}",
        "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "module": path,
        "frame": f"{code.co_qualname}:{code.co_firstlineno}",
        "policy": options.policy.key,
        "code": code_version("qcompile.passes", "qcompile.formats"),
        "torch": torch.__version__,
    }


def _known_scheme(key: str) -> Scheme | None:
    """None for a format that this process has not declared: the policy will say so where it matters."""
    try:
        return scheme_of(key)
    except UnknownFormatError:
        return None


def _guesses(root: nn.Module, owners: Owners, weights: Sequence[Any]) -> dict[int, Guess]:
    """Packed parameters in their slots, for the weights that are float ones still and that the store has."""
    wanted = []
    for name, key, transposed in weights:
        slot = slot_at(root, name)
        original = slot.get() if slot is not None else None
        scheme = _known_scheme(key)
        if original is None or scheme is None or packed_in(original) is not None or not original.is_cpu:
            continue
        if not (original.requires_grad and torch.is_grad_enabled()):
            wanted.append((original, scheme, transposed))
    guesses: dict[int, Guess] = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # digests leave the interpreter alone
        found = list(pool.map(lambda w: known(w[0], w[1].format, transposed=w[2], mapped=True), wanted))
    for (original, scheme, transposed), packed in zip(wanted, found, strict=True):
        if packed is None:
            continue
        parameter = as_parameter(packed.tensor(scheme, transposed, original.shape, original.dtype))
        slots = tuple(owners.slots[id(original)])
        for each in slots:
            each.set(parameter)
        guesses[id(parameter)] = Guess(original, slots, packed, parameter)
    return guesses
