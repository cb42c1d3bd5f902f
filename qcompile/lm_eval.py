"""lm-evaluation-harness over packed models.

``python -m qcompile.lm_eval run --model qcompile --model_args pretrained=…,policy=int4 --tasks …`` is lm_eval's own command,
which then knows the model ``qcompile``: importing this module registers it. lm_eval must be installed
(``pip install "lm_eval[hf]"``); :class:`QCompileLM` is what its ``simple_evaluate(model=…)`` takes.
"""

from __future__ import annotations

from typing import Any

import torch

from .api import quantize_
from .errors import PolicyError
from .policy import Policy
from .policy_file import policy_from
from .tensor import QuantizedTensor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"qcompile.lm_eval needs lm-evaluation-harness: pip install 'lm_eval[hf]' ({error})") from error


@register_model("qcompile")
class QCompileLM(HFLM):
    """A Hugging Face model whose weights are packed under ``policy``, then compiled with backend "qcompile", dynamic shapes.

    ``pretrained`` and everything else as for :class:`lm_eval.models.huggingface.HFLM`; ``policy`` as for
    :func:`~qcompile.policy_file.policy_from`. ``compiled=False``: packed and run eagerly.
    Raises :class:`~qcompile.errors.PolicyError` where the policy packs nothing and is not "float".
    """

    def __init__(self, pretrained: Any, policy: Any = None, compiled: bool = True, **kwargs: Any) -> None:
        super().__init__(pretrained, **kwargs)
        wanted = policy_from(policy)
        model = self._model
        model.config.use_cache = False  # scores need no cache, and generation asks for one itself
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            self.report = quantize_(model, ids, policy=wanted)
        packs = any(isinstance(p, QuantizedTensor) for p in model.parameters())
        packs = packs or (compiled and self.report.plan.totals().quantized > 0)  # attention, when it is compiled
        if not packs and wanted != Policy.parse("float"):
            raise PolicyError(f"policy {wanted.name!r} packs no layer of {type(model).__name__}, so float scores would be taken "
                              f"for quantized ones:\n{self.report.summary()}")  # fmt: skip
        if compiled:
            model.compile(backend="qcompile", options={"policy": wanted}, dynamic=True)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
