"""Scores of positions: one pass of a model, with logits only where they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.loss import bend_rows, head_weight


class ModelScores:
    """A model's logits as :func:`difftrain.sampling.settling.settle` asks for them.

    Attributes:
        passes: calls of the model so far.
        head_rows: positions that were sent through the head so far.
    """

    def __init__(self, module: nn.Module, config: Config, mask_id: int):
        self.module, self.config, self.mask_id = module, config, mask_id
        self.passes = self.head_rows = 0

    @torch.no_grad()
    def __call__(self, x: Tensor, where: Tensor) -> Tensor:
        """Logits (n, V) fp32 of the positions ``where`` (B, T) of ids x (B, T), as the loss sees them.

        Raises:
            UserError: some are not finite.
        """
        self.passes += 1
        hidden = self.module(x, return_hidden=True)[where]
        self.head_rows += len(hidden)
        logits = torch.nn.functional.linear(hidden, head_weight(self.module)).float()
        if not bool(logits.isfinite().all()):
            raise UserError(
                "the model gives NaN or infinity: its checkpoint is broken, or its numbers overflow"
            )
        return bend_rows(logits, self.mask_id, self.config)
