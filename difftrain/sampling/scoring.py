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
        return self.module(x, return_hidden=True)[where]


class KeptKeys(ModelScores):
    """The same, but within a block only its own columns go through the model; an approximation.

    The first pass of a block is a whole one. The others take the keys and values that it found outside the block, though
    what is written in the block would change them, and those of the block anew.

    Source: Fast-dLLM (arXiv:2505.22618), its cache before and after the block.
    """

    columns = slice(0, 0)
    kept: list[tuple[Tensor, Tensor]] | None = None

    def begin(self, columns: slice) -> None:
        """Another block: all positions that are asked for from now on lie in these columns."""
        self.columns, self.kept = columns, None

    def _hidden(self, x: Tensor, where: Tensor) -> Tensor:
        columns = slice(0, x.shape[1]) if self.kept is None else self.columns
        model, new = self.module, []
        h = model.embedding(x[:, columns])
        if model.positions is not None:
            h = h + model.positions.weight[columns]
        rotation = None if model.rotation is None else model.rotation[columns]
        for i, block in enumerate(model.blocks):
            q, k, v = block.attention.in_heads(block.norm_1(h), rotation)
            if self.kept is None:
                new.append((k.clone(), v.clone()))
            else:
                for kept, own in zip(self.kept[i], (k, v), strict=True):
                    kept[:, :, columns] = own
                k, v = self.kept[i]
            h = h + block.attention.merged(torch.nn.functional.scaled_dot_product_attention(q, k, v))
            h = h + block.mlp(block.norm_2(h))
        self.kept = self.kept or new
        return model.norm(h)[where[:, columns]]
