"""Scores of positions: one pass of a model, with logits only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.loss import bend_rows, head_weight
from difftrain.model import Kept


class ModelScores:
    """A model's logits as :func:`difftrain.sampling.settling.settle` asks for them.

    Attributes:
        autocast: makes the context in which the model computes.
        visible: who sees whom in the texts that are asked about, as for :meth:`Transformer.forward`; None: all.
        passes: calls of the model so far.
        head_rows: positions that were sent through the head so far.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        mask_id: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.module, self.config, self.mask_id, self.autocast = module, config, mask_id, autocast
        self.visible: Tensor | None = None
        self.passes = self.head_rows = 0

    @torch.no_grad()
    def __call__(self, x: Tensor, where: Tensor) -> Tensor:
        """Logits (n, V) fp32 of the positions ``where`` (B, T) of ids x (B, T), as the loss sees them.

        Raises:
            UserError: some are not finite.
        """
        self.passes += 1
        with self.autocast():
            hidden = self._hidden(x, where)
            self.head_rows += len(hidden)
            logits = torch.nn.functional.linear(hidden, head_weight(self.module)).float()
        if not bool(logits.isfinite().all()):
            raise UserError(
                "the model gives NaN or infinity: its checkpoint is broken, or its numbers overflow"
            )
        return bend_rows(logits, self.mask_id, self.config)

    def _hidden(self, x: Tensor, where: Tensor) -> Tensor:
        """Hidden states (n, D) of the positions."""
        how = {} if self.visible is None else {"visible": self.visible}
        return self.module(x, return_hidden=True, **how)[where]


class KeptKeys(ModelScores):
    """The same, but within a block only its own columns go through the model; an approximation.

    The first pass of a block is a whole one. The others take the keys and values that it found outside the block, though
    what is written in the block would change them, and those of the block anew.

    Source: Fast-dLLM (arXiv:2505.22618), its cache before and after the block.
    """

    kept: list[Kept]

    def begin(self, columns: slice) -> None:
        """Another block: all positions that are asked for from now on lie in these columns."""
        self.kept = [Kept(columns) for _ in self.module.blocks]

    def _hidden(self, x: Tensor, where: Tensor) -> Tensor:
        own = where if self.kept[0].is_new else where[:, self.kept[0].columns]
        return self.module.hidden_of_columns(x, self.kept)[own]
