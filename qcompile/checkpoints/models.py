"""An empty model to load into: made from its configuration without memory for its parameters, and its places by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, CorruptCheckpointError
from ..owners import Slot


@dataclass
class Place:
    """A parameter or persistent buffer of a model: its names (several if it is tied), and the slots that hold it."""

    names: list[str] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    is_buffer: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        slot = self.slots[0]
        held = slot.module._buffers if self.is_buffer else slot.module._parameters
        tensor = held[slot.name]
        assert tensor is not None
        return tensor

    @property
    def is_conv1d(self) -> bool:
        """Whether it is a matrix that is stored [K, N]: GPT-2's Conv1D computes x @ weight."""
        return any(type(slot.module).__name__ == "Conv1D" for slot in self.slots)


def places(model: nn.Module) -> list[Place]:
    """Every parameter and persistent buffer of ``model``, each once."""
    found: dict[int, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for is_buffer, held in ((False, module._parameters), (True, module._buffers)):
            for name, tensor in held.items():
                if tensor is None or (is_buffer and name in module._non_persistent_buffers_set):
                    continue
                place = found.setdefault(id(tensor), Place(is_buffer=is_buffer))
                place.names.append(f"{prefix}.{name}" if prefix else name)
                if all(slot.module is not module or slot.name != name for slot in place.slots):
                    place.slots.append(Slot(module, name))
    return list(found.values())


def build(config: Mapping[str, Any], dtype: torch.dtype | None, tensors: Iterable[str], check: Callable[[nn.Module], Any],
          ) -> nn.Module:  # fmt: skip
    """The Hugging Face model of ``config``, eval mode, parameters on the meta device, buffers in memory.

    ``dtype``: of the parameters (None: what the configuration says, or float32). ``tensors`` are names in the checkpoint: a
    configuration with more layers than they tell of is refused before anything is built. ``check`` gets the model wholly on
    the meta device first, so that sizes which do not fit the file take no memory. Raises :class:`CheckpointError` without
    transformers, or for a configuration that it does not take.
    """
    config = _float(config)
    _check_depth(config, tensors)
    check(empty_model(config, dtype))
    with parameters_on_meta():
        return _made(config, dtype or _dtype_of(config) or torch.float32)


def empty_model(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """The Hugging Face model of ``config``, eval mode, wholly on the meta device; ``dtype`` and errors as of :func:`build`."""
    config = _float(config)
    with torch.device("meta"):
        return _made(config, dtype or _dtype_of(config) or torch.float32)


def _float(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what it says of a quantized checkpoint."""
    return {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}


def _made(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    transformers = _transformers()
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"model_type {kind!r} of the configuration is not one of this transformers release; build the "
                              "model yourself and pass it as model=")  # fmt: skip
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    try:
        made = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
        if known:
            return cls._from_config(made, dtype=dtype).eval()  # type: ignore[union-attr]
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype).eval()
    except Exception as error:
        raise CheckpointError(f"transformers cannot build a {kind!r} model from the configuration ({type(error).__name__}: "
                              f"{str(error)[:300]}); build it yourself and pass it as model=") from error  # fmt: skip


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("building the model takes transformers: pip install transformers, or pass model=") from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise CheckpointError(f"building the model takes transformers 5, found {transformers.__version__}: pip install -U "
                              "transformers, or pass model=")  # fmt: skip
    return transformers


def _check_depth(config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """A damaged number of layers must not build for hours."""
    depth = next((config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
    if depth is None:
        return
    indexes = [int(i) for name in tensors for i in re.findall(r"\.(\d{1,6})\.", f".{name}.")]
    if not isinstance(depth, int) or depth > max(indexes, default=0) + 1:
        raise CorruptCheckpointError(f"the configuration says {depth} layers, the checkpoint has tensors of "
                                     f"{max(indexes, default=0) + 1}")  # fmt: skip


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype | None:
    found = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register meanwhile go to the meta device; buffers are computed as always, since their values
    (frequencies of rotary embeddings) are in no file."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
