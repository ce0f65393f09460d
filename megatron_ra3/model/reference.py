"""The reference policy q_ref: the model's weights as they were at the start of the run (algorithm.md 3).

They are read again from the initial folder instead of living in checkpoints, so a resumed run has the same reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ra3.model import names
from megatron_ra3.model.trainer import MicroBatch, Trainer


class Reference:
    """Scores with the initial weights, which wait in host memory meanwhile. All methods are collective.

    Args:
        trainer: whose model lends its modules; its weights are the same after every call.
        folder: Hugging Face folder of the initial weights.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer = trainer
        self._weights: list[Tensor] | None = None
        self._folder = folder

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return log q_ref(target) per micro-batch, [K] fp32 in nats each, on every rank of the replica."""
        parameters = list(self._trainer.model.ddp.parameters())
        current = [item.detach().to("cpu", copy=True) for item in parameters]
        try:
            self._load(parameters)
            return self._trainer.score(micro_batches)
        finally:
            _copy(current, parameters)

    def _load(self, parameters: Sequence[Tensor]) -> None:
        if self._weights is None:
            names.import_hf(self._trainer.model, self._folder)
            self._weights = [item.detach().to("cpu", copy=True) for item in parameters]
        else:
            _copy(self._weights, parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
