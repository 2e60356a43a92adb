"""The loss of CPU tensors: the stepwise reference as one function to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import LossCall, Result
from .implementation import (
    forbid_second_derivative,
    make_table,
    reduce_rows,
    row_gradients,
    row_values,
    score_rows,
    sum_cases,
)
from .validation import check_upstream


def cpu_loss(logits: Tensor, call: LossCall) -> Result:
    """``fused_diffusion_loss`` of checked arguments, without a second derivative."""
    if torch.is_grad_enabled() and logits.requires_grad:
        found = []
        loss = _CpuLoss.apply(logits, call, found)
        (statistics,) = found
    else:
        statistics = _score(logits, call)
        loss = reduce_rows(statistics[1][0], call.reduction)
    return call.result(
        loss,
        lambda: make_table(sum_cases(False, statistics, call.terms), call.y.numel()),
        lambda: row_values(False, statistics, call.terms),
    )


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def _score(logits: Tensor, call: LossCall) -> tuple[Tensor, Tensor]:
    return score_rows(False, _rows(logits), *call.labels, terms=call.terms)


class _CpuLoss(torch.autograd.Function):
    """(logits, ...) -> loss; puts the row statistics into the list it is given."""

    @staticmethod
    def forward(ctx, logits, call, found):
        statistics = _score(logits, call)
        found.append(statistics)
        ctx.divisor = max(1, len(call.y)) if call.reduction == "mean" else 1
        ctx.mask_id, ctx.terms = call.mask_id, call.terms.kept()
        ctx.save_for_backward(logits, call.y, *statistics)
        return reduce_rows(statistics[1][0], call.reduction)

    @staticmethod
    def backward(ctx, upstream):
        logits, y, *statistics = ctx.saved_tensors
        with torch.no_grad():
            received = check_upstream(upstream).reshape(-1) if upstream.dim() else check_upstream(upstream)
            gradient = row_gradients(
                False, _rows(logits), y, tuple(statistics), received,
                divisor=ctx.divisor, mask_id=ctx.mask_id, terms=ctx.terms,
            ).view(logits.shape)  # fmt: skip
        if torch.is_grad_enabled():
            (gradient,) = forbid_second_derivative([gradient], upstream, logits)
        return gradient, None, None
