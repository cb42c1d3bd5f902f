"""The way of a graph through qcompile, stated once: discover sites, decide, extend to siblings, plan conversions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qcompile import target
from qcompile.calibration import Calibration
from qcompile.dtensor import packed_in
from qcompile.dtensor import why_not as why_undivided
from qcompile.errors import KernelBuildError
from qcompile.formats import Scheme, register_scheme
from qcompile.kernels import attention_for, begin, for_key, prepare
from qcompile.options import Options
from qcompile.owners import Owners, Slot, slot_at
from qcompile.plan import Decision, Plan, Record, Site
from qcompile.policy import check_rules
from qcompile.recorder import Recorder, recorder_of
from qcompile.report import Picture

from . import notices
from .attention import rewrite
from .calibrate import GPTQ, rounded
from .checkpointing import inlined
from .convert import Conversion
from .discover import attention_of, discover
from .picture import picture
from .qat import Training
from .records import each, kernel_name, packed_record, recording
from .siblings import siblings
from .trained import tunes, why_left
from .walk import Weight

ATTENTION_GRAD = "attention in low precision has no backward; call under torch.no_grad()"

TABLE = "rows of an embedding are to change least themselves"

EXPERTS = "each sample meets few of the experts"

NOT_CALIBRATED = "no graph of the calibration had the layer"


class Compilation:
    """One graph from Dynamo: what it holds, what the policy makes of it, and the records of that.

    ``gm`` and ``example_inputs`` as a backend gets them. After :meth:`conversions` the recorder of the model that owns
    the weights has a record for every site of the graph that stays as it is; a conversion adds its own when it is done.
    """

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        recorder: Recorder | None = None,
        owners: Owners | None = None,
    ) -> None:
        self.device = _device(example_inputs)
        prepare(self.device.type)
        self.gm, self.flat, self.options = gm, inlined(gm), options
        self.training = Training(gm, self.flat, options.qat)
        fitted = options.rounding == "gptq" or options.calibration is not None
        self.rounding: dict[str, str] | None = {} if fitted else None
        self.owners = owners or Owners(example_inputs)
        self.look_at(example_inputs)
        self.root = self.owners.root(self.parameters[0]) if self.parameters else None
        self.recorder = recorder or recorder_of(self.root)
        self.sites = discover(self.flat, self.example_inputs, self.owners.name)
        self.recorder.tunes |= tunes(self.sites, self.values, self.root, self.recorder)
        self.target = target.of(self.device)
        self.recorder.policy = options.policy.resolved(self.target)

    def look_at(self, inputs: Sequence[Any]) -> None:
        """Takes ``inputs`` as those of the graph, and lets go of those before."""
        inputs = self.training.real(inputs, self.owners)
        self.example_inputs = inputs
        names = [n.name for n in self.gm.graph.find_nodes(op="placeholder")]
        self.values = dict(zip(names, inputs, strict=True))
        self.parameters = [v for v in self.values.values() if id(v) in self.owners.slots]

    def conversions(self) -> list[Conversion]:
        """Records every site, and returns the weights to pack, each once: those of this graph, then of its siblings.

        Raises ``PolicyError`` for rules that contradict or match nothing, ``StrictError`` under ``strict=True``.
        """
        loose = [self._restricted(s) for s in self.sites if not self._is_packed(s)]
        self._check_rules()
        notices.warn_of_grad(loose)
        self.recorder.add(*(self._record_packed(s) for s in self.sites if self._is_packed(s)))
        found: dict[int, Conversion] = {}
        self._decide(loose, found)
        if self.options.rounding == "gptq":
            found |= self._calibrated(found)
        if self.root is not None:
            owned = [self.owners.slots[id(v)][0] for v in self.parameters]
            for sibling in siblings(self.owners, self.root, owned):
                renamed = [self._of_sibling(sibling.rename(s)) for s in loose]
                self._decide(renamed, found)
                self.training.check_siblings(loose, renamed)
        if self.options.calibration is not None:
            found = self._as_calibrated(found, self.options.calibration)
        if self.options.rounding == "gptq":
            notices.warn_of_nearest([c.layer for c in found.values() if c.packed is None and not c.looked_up])
        if self.options.strict:
            self.recorder.plan.require_all()
        return list(found.values())

    def ready(self, conversions: list[Conversion]) -> list[Conversion]:
        """``conversions`` whose kernels are built, before any weight is packed for one that cannot be.

        Raises ``KernelBuildError`` that names the layers, unless ``fallback="float"`` leaves them in floating point.
        """
        attention = [r.decision for r in self.plan() if r.decision.site.operator == "attention"]
        wanted = [(c.scheme, c.layer, False) for c in conversions]
        wanted += [(d.scheme, d.site.name, True) for d in attention if d.scheme is not None]
        broken = False
        if self.device.type != "meta":
            begin({register_scheme(c.scheme) for c in conversions}, self.device.type)
        for scheme, attends in dict.fromkeys((s, a) for s, _, a in wanted):
            layers = [layer for s, layer, a in wanted if (s, a) == (scheme, attends)]
            broken |= not self._builds(scheme, attends, layers)
        return self.conversions() if broken else conversions

    def _builds(self, scheme: Scheme, attends: bool, layers: list[str]) -> bool:
        if self.device.type == "meta":
            return True
        key = register_scheme(scheme)
        try:
            if attends:
                attention_for(key, key, self.device.type)
            else:
                for_key(key, self.device.type)
        except KernelBuildError as error:
            if self.options.fallback == "error":
                raise KernelBuildError(f"no kernel for {scheme.label}, which {len(layers)} layers need ({notices.some(layers)}); "
                                       f"leave them by a rule of value 'float', or by fallback='float'.\n{error}") from error
            self.recorder.failures[key] = f"its kernel cannot be built: {str(error).splitlines()[0]}"
            notices.warn_of_fallback(layers, self.recorder.failures[key])
            return False
        return True

    def plan(self) -> Plan:
        """The records of this graph's sites."""
        return Plan(tuple(r for s in self.sites if (r := self.recorder.find(s)) is not None))

    def lower_attention(self) -> int:
        """Exchanges the attention nodes that the policy has a scheme for; returns how many."""
        decisions = [r.decision for r in self.plan() if r.decision.site.operator == "attention"]
        schemes = {d.site.name: d.scheme for d in decisions if d.scheme is not None}
        return rewrite(attention_of(self.gm, self.example_inputs, self.owners.name), schemes) if schemes else 0

    def lower_trained(self) -> int:
        """Puts what quantization-aware training computes in the place of the weights that are trained; returns how many."""
        return self.training.lower()

    def picture(self) -> Picture:
        """The graph as plain data."""
        return picture(self.flat, self.sites, self.values, self.owners.name)

    def _decide(self, sites: list[Site], found: dict[int, Conversion]) -> None:
        """Asks the policy about float ``sites``; adds to ``found``, by parameter, what it wants packed."""
        names = [name for name, _ in self.root.named_modules()] if self.root is not None else ()
        for decision in map(self._refined, self.options.policy.decide(sites, self.target, names)):
            slots = self._slots(decision.site)
            parameter = slots[0].get() if slots else None
            if packed_in(parameter) is not None:
                continue
            if parameter is not None and self.training.takes(parameter):
                self.recorder.add(self.training.decided(decision))
                continue
            runs = decision.scheme is not None and decision.site.operator == "attention"
            kernel = kernel_name(decision.scheme, self.device) if runs else None  # type: ignore[arg-type]
            self.recorder.add(Record.of(decision, kernel))  # a conversion will replace it by what it measured
            if decision.scheme is None or parameter is None:
                continue
            if parameter.requires_grad:
                self.recorder.unfrozen.add(decision.site.parameter or "")
            done = recording(self.recorder, decision, self.rounding)
            if (earlier := found.get(id(parameter))) is not None:
                looked_up = earlier.looked_up or not decision.site.is_linear
                found[id(parameter)] = dataclasses.replace(earlier, done=each(earlier.done, done), looked_up=looked_up)
            else:
                found[id(parameter)] = Conversion(decision.site.name, slots, decision.scheme, decision.site.transposed,
                                                  self.options.weights == "keep", done,
                                                  looked_up=not decision.site.is_linear,
                                                  failed=self._failed(decision.site))  # fmt: skip

    def _refined(self, decision: Decision) -> Decision:
        """``decision`` with the scheme that a calibration packs it in, or with the reason of a failure that left its site in
        floating point before."""
        if self.options.calibration is not None and decision.scheme is not None and decision.site.parameter is not None:
            scheme = self.options.calibration.scheme_for(decision.site.parameter, decision.scheme)
            decision = dataclasses.replace(decision, scheme=scheme)
        keys = (decision.site.parameter, decision.scheme and decision.scheme.key)
        reason = next((self.recorder.failures[k] for k in keys if k in self.recorder.failures), None)
        return decision if reason is None else dataclasses.replace(decision, scheme=None, reason=reason)

    def _failed(self, site: Site) -> Callable[[str], None] | None:
        """What to do when a weight cannot be packed; None: raise."""
        if self.options.fallback == "error" or site.parameter is None:
            return None
        return functools.partial(notices.note_failure, self.recorder, site.parameter, site.name)

    def _calibrated(self, found: dict[int, Conversion]) -> dict[int, Conversion]:
        """The conversions of this graph's weights, as GPTQ rounds them on the inputs of the call."""
        assert self.rounding is not None
        here = {name: found[id(v)] for name, v in self.values.items() if id(v) in found}
        unserved = {name: why for name, c in here.items() if (why := why_unserved(self.values[name], c.looked_up)) is not None}
        self.rounding |= {self.owners.name(self.values[n]) or "": f"rounded to nearest: {why}" for n, why in unserved.items()}
        weights = {name: Weight(self.owners.name(self.values[name]) or name, c.layer, c.scheme, c.transposed, self.values[name])
                   for name, c in here.items() if name not in unserved}  # fmt: skip
        made: dict[int, Conversion] = {}
        for name, result in rounded(self.flat, self.example_inputs, weights).items():
            parameter = self.values[name]
            said = f"rounded to nearest: {result}" if isinstance(result, str) else GPTQ
            self.rounding[self.owners.name(parameter) or ""] = said
            if not isinstance(result, str):
                made[id(parameter)] = dataclasses.replace(found[id(parameter)], packed=result)
        return made

    def _as_calibrated(self, found: dict[int, Conversion], calibration: Calibration) -> dict[int, Conversion]:
        """``found`` with the planes of the calibration. Raises ``PolicyError`` where they are for another weight."""
        assert self.rounding is not None
        made, left = dict(found), []
        for at, conversion in found.items():
            value = conversion.slots[0].get()
            name = self.owners.name(value) if value is not None else None
            if value is None or name is None:
                continue
            if (entry := calibration.weights.get(name)) is None:
                left.append(conversion.layer)
            self.rounding[name] = entry.said if entry is not None else f"rounded to nearest: {NOT_CALIBRATED}"
            if not value.is_meta:
                made[at] = dataclasses.replace(conversion, packed=calibration.packed_for(name, value, conversion.transposed))
        notices.warn_of_uncalibrated(left)
        return made

    def _restricted(self, site: Site) -> Site:
        """``site`` with the reason, if there is one, why its weight cannot be exchanged."""
        if site.operator == "attention" and site.unsupported is None and self._needs_grad():
            return dataclasses.replace(site, unsupported=ATTENTION_GRAD)
        value = self.values.get(site.weight) if site.weight else None
        if site.unsupported is not None or not isinstance(value, torch.Tensor):
            return site
        if isinstance(value, torch._subclasses.FakeTensor):
            reason: str | None = "the weight is a fake tensor; pack the model with qcompile.quantize_ before tracing it"
        elif id(value) not in self.owners.slots:
            reason = "the weight is not a parameter of any module, so it cannot be exchanged for a packed one"
        else:
            reason = why_undivided(value) or self._why_left(value)
        return dataclasses.replace(site, unsupported=reason)

    def _of_sibling(self, site: Site) -> Site:
        """A sibling's ``site``: whether its own weight is trained decides, not that of the graph."""
        slots = self._slots(site)
        parameter = slots[0].get() if slots else None
        if parameter is None or site.unsupported not in (None, notices.GRAD, notices.TRAINED):
            return site
        return dataclasses.replace(site, unsupported=self._why_left(parameter))

    def _why_left(self, parameter: torch.Tensor) -> str | None:
        """Why a weight stays in floating point whatever the policy says: it is trained."""
        return self.training.why_not(parameter) if self.training.takes(parameter) else why_left(parameter, self.recorder)

    def _needs_grad(self) -> bool:
        """Whether a backward pass may come: of attention, whose checkpoints are not looked into for anything else."""
        tensors = (v for v in self.values.values() if isinstance(v, torch.Tensor))
        return self.flat is not self.gm or torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def _is_packed(self, site: Site) -> bool:
        return site.weight is not None and packed_in(self.values.get(site.weight)) is not None

    def _record_packed(self, site: Site) -> Record:
        """The record of a site whose weight is packed already: the one made at conversion, or what the tensor tells."""
        weight = packed_in(self.values[site.weight or ""])
        assert weight is not None
        known = self.recorder.find(site)
        if known is not None and known.decision.scheme == weight.scheme:
            return known
        return packed_record(Decision(site, weight.scheme, rule="packed before compilation"), weight, site.nbytes, None)

    def _check_rules(self) -> None:
        """A rule that matches nothing is an error. Names are known for the whole model; roles only of graphs seen, so a
        rule on a role is refused once this graph holds every matrix of the model."""
        if self.root is None:
            return
        if self.options.calibration is not None:
            self.options.calibration.check_names([name for name, _ in self.root.named_parameters()])
        here = {id(v) for v in self.parameters}
        whole = all(id(p) in here for p in self.root.parameters() if p.dim() >= 2)
        sites = [*self.sites, *self.recorder.sites()]
        check_rules(self.options.policy, sites, [name for name, _ in self.root.named_modules()], whole=whole)

    def _slots(self, site: Site) -> tuple[Slot, ...]:
        """Every place that holds the site's parameter."""
        if self.root is None or site.parameter is None:
            return ()
        slot = slot_at(self.root, site.parameter)
        return tuple(self.owners.slots.get(id(slot.get()), ())) if slot is not None else ()


def why_unserved(weight: torch.Tensor, looked_up: bool = False) -> str | None:
    """Why no calibration rounds a weight, if none does."""
    return TABLE if looked_up else EXPERTS if weight.dim() == 3 else None


def _device(values: Any) -> torch.device:
    return next((v.device for v in values if isinstance(v, nn.Parameter)),
                next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu")))  # fmt: skip
