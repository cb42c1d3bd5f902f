"""qcompile as a quantizer of transformers: float checkpoints packed while they load, packed ones saved and loaded.

Importing this module registers the method ``"qcompile"`` with transformers, so ``from_pretrained`` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, CorruptCheckpointError, OptionError, nearest
from ..formats.layout import check_planes
from ..options import Options
from ..owners import slot_at
from ..passes.convert import Conversion
from ..passes.trace_ahead import conversions_of
from ..policy import Policy
from ..recorder import recorder_of
from ..tensor import QuantizedTensor, as_parameter, tensor_class
from . import own
from .files import MappedFile, Stored, TensorFiles, safetensors_header
from .save import flattened
from .weight import Weight


@register_quantization_config(own.KEY)
class QCompileConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``from_pretrained(path, quantization_config=QCompileConfig(policy="int4"))``: packs each weight as it is read.

    ``policy`` as in ``options["policy"]`` of the backend (None: its default). Raises :class:`~qcompile.errors.PolicyError` and
    :class:`~qcompile.errors.UnknownFormatError` for one that cannot be read. A model saved with ``save_pretrained`` has such a
    configuration, and its files say how each weight is packed.
    """

    def __init__(self, policy: Any = None, saved: str | None = None, **kwargs: Any) -> None:
        if unknown := sorted(set(kwargs) - {"quant_method"}):
            raise OptionError(f"QCompileConfig has no setting {unknown[0]!r}. {nearest(unknown[0], ['policy'])}")
        self.quant_method = own.KEY  # type: ignore[assignment]
        self.saved = saved if saved is not None else Policy.parse(policy).to_json()
        """The policy as JSON; read again only where weights are to be packed."""

    @property
    def policy(self) -> Policy:
        return Policy.from_json(self.saved)


@register_quantizer(own.KEY)
class QCompileQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads a model with a :class:`QCompileConfig`, and while it saves one."""

    requires_calibration = False

    def __init__(self, quantization_config: QCompileConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.conversions: dict[str, Conversion] = {}
        self.weights: Mapping[str, Weight] = {}

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self.conversions = _planned(model, self.quantization_config.policy)
            return
        files = _opened(checkpoint_files or [])
        if not own.is_own(files):
            raise CheckpointError(f"{files.path}: config.json says quant_method {own.KEY!r}, but the files are not of "
                                  "save_pretrained or qcompile.save")  # fmt: skip
        checkpoint = own.read(files)
        self.weights = {name: weight for name, weight in checkpoint.weights.items() if weight.scheme is not None}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = None  # how planes were read is no way to write them
        self.conversions, self.weights = {}, {}
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.conversions

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]
        """The names of planes after those of their parameters' last part."""
        names: dict[str, set[str]] = {}
        for name, weight in self.weights.items():
            assert weight.scheme is not None
            own_name = name.rpartition(".")[2]
            names.setdefault(own_name, set()).update(f"{own_name}.{p}" for p in weight.scheme.format.part_names)
        return {name: sorted(planes) for name, planes in names.items()}

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Attach}

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if any(isinstance(p, QuantizedTensor) and p.dim() == 3 for p in model.parameters()):
            model._weight_conversions = []  # those of the architecture would split experts as if they were float
        tensors, entry = flattened(model)
        return tensors, {own.KEY: entry}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    """A float weight of the file → packed."""

    def __init__(self, hf_quantizer: QCompileQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        return {full_layer_name: self.hf_quantizer.conversions[full_layer_name].pack(value)}


class _Attach(ConversionOps):  # type: ignore[misc]
    """The planes of a packed weight → the weight."""

    def __init__(self, hf_quantizer: QCompileQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attach:
        return self  # transformers copies it for every weight

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, torch.Tensor]:
        weight, own_name = self.hf_quantizer.weights.get(full_layer_name), full_layer_name.rpartition(".")[2]
        if weight is None or weight.scheme is None:
            raise CorruptCheckpointError(f"{full_layer_name}: has planes in the file, but no entry in its header")
        spec = weight.scheme.format
        planes = [input_dict[f"{own_name}.{p}"][0] for p in spec.part_names]
        made = tensor_class(weight.scheme, weight.transposed)(planes, weight.shape, weight.dtype or torch.float32)
        check_planes(spec, planes, *made.stored_shape, full_layer_name)
        return {full_layer_name: as_parameter(made)}


def adopt(model: Any) -> None:
    """Lets ``save_pretrained`` write a Hugging Face model that was packed without transformers' help."""
    model.hf_quantizer = QCompileQuantizer(QCompileConfig(), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config


def _planned(model: Any, policy: Policy) -> dict[str, Conversion]:
    """What ``policy`` means for a model on the meta device, by names of parameters: one call of it is traced."""
    for alias, source in getattr(model, "all_tied_weights_keys", {}).items():
        slot, original = slot_at(model, alias), slot_at(model, source)  # transformers ties them after loading
        if slot is not None and original is not None and (parameter := original.get()) is not None:
            slot.set(parameter)
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    options = Options.parse({"policy": policy}, None)
    with torch.no_grad():
        found = conversions_of(model, options, recorder_of(model), (), {"input_ids": ids, "use_cache": False})
    by_slot = {(id(s.module), s.name): c for c in found for s in c.slots}
    return {
        f"{prefix}.{name}" if prefix else name: by_slot[id(module), name]
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._parameters
        if (id(module), name) in by_slot
    }


def _opened(paths: list[str]) -> TensorFiles:
    """All tensors of a checkpoint's files."""
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        found, more = safetensors_header(MappedFile(Path(path)))
        tensors |= {t.name: t for t in found}
        metadata |= more
    return TensorFiles(Path(paths[0]).parent if paths else Path(), tensors, metadata)
