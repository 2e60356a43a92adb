"""What one pass tells of each row: for samplers, curricula and policy methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import IGNORED


@dataclass(frozen=True)
class RowOutputs:
    """What the pass over the logits saw at each position, of y's shape and without gradient.

    A position that does not count (ignored, of token weight 0, or without logits under ``shift``) has
    0 everywhere, and case -1. A label outside the vocabulary has nll NaN; the rest is as the logits say.

    Attributes:
        nll: cross-entropy in nats, without any weight or smoothing; fp32 (fp64 for fp64 logits), like
            all but ``case``.
        lse: log-sum-exp of the logits, after scale and softcap.
        p_mask: probability of [MASK].
        confidence: probability of the prediction, the first maximum.
        case: int8, 3 * kind + answer in the order of :class:`CaseTable`.
        entropy: of the prediction's distribution in nats; None unless asked for.
    """

    nll: Tensor
    lse: Tensor
    p_mask: Tensor
    confidence: Tensor
    case: Tensor
    entropy: Tensor | None = None


def row_outputs(case: Tensor, values: dict[str, Tensor], shape: torch.Size, shift: int) -> RowOutputs:
    """Row statistics (N,), in the order of the logits' rows, as positions of y."""
    case = torch.where(case == IGNORED, -1, case).to(torch.int8)
    shown = {name: move_back(value.view(shape), shift) for name, value in values.items()}
    return RowOutputs(case=move_back(case.view(shape), shift, fill=-1), **shown)


def move_back(values: Tensor, shift: int, fill: float = 0) -> Tensor:
    """Values (..., T) of rows of logits at the positions that were read against them; ``fill`` where none was."""
    if shift == 0:
        return values
    kept = values[..., : max(0, values.shape[-1] - shift)]
    return torch.nn.functional.pad(kept, (values.shape[-1] - kept.shape[-1], 0), value=fill)
