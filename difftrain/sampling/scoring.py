"""Scores of positions: one pass of a model, with logits only where they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difftrain.config import Config
from difftrain.loss import bend_rows, head_weight
from difftrain.runtime import Runtime


class ModelScores:
    """A model's logits as :func:`difftrain.sampling.settling.settle` asks for them.

    Attributes:
        passes: calls of the model so far.
        head_rows: positions that were sent through the head so far.
    """

    def __init__(self, model: nn.Module, config: Config, mask_id: int, runtime: Runtime):
        self.model, self.config, self.mask_id, self.runtime = model, config, mask_id, runtime
        self.passes = self.head_rows = 0

    def __call__(self, x: Tensor, where: Tensor) -> Tensor:
        """Logits (n, V) of the positions ``where`` (B, T) of ids x (B, T)."""
        self.passes += 1
        with torch.no_grad(), self.runtime.autocast():
            hidden = self.model(x, return_hidden=True)[where]
            self.head_rows += len(hidden)
            logits = torch.nn.functional.linear(hidden, head_weight(self.model))
        return bend_rows(logits, self.mask_id, self.config)
