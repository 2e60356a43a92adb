"""The loss of CPU tensors: the stepwise reference as one function to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from . import small_vocabulary
from .calls import LossCall, Result
from .implementation import (
    divisor_of,
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
    if small_vocabulary.takes(logits.shape[-1], logits.device, call.terms):
        return _small_loss(logits, call)
    if torch.is_grad_enabled() and logits.requires_grad:
        statistics = []
        loss = _CpuLoss.apply(logits, call, statistics)
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
    def forward(ctx, logits, call, kept):
        statistics = _score(logits, call)
        kept += statistics
        ctx.divisor = divisor_of(call.reduction, len(call.y))
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


def _small_loss(logits: Tensor, call: LossCall) -> Result:
    """:func:`cpu_loss` of few words: the gradient is made with the loss, and backward multiplies it."""
    scored = small_vocabulary.score_rows(_rows(logits.detach()), *call.labels)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss = _SmallLoss.apply(logits, call, scored)
    else:
        loss = small_vocabulary.reduced(scored.loss, call.reduction)

    def tabulate():
        sums = small_vocabulary.sum_cases(scored.marks, scored.nll, scored.gap)
        return make_table(sums, call.y.numel())

    return call.result(loss, tabulate, None)


class _SmallLoss(torch.autograd.Function):
    """(logits, call, what was scored of them) -> loss."""

    @staticmethod
    def forward(ctx, logits, call, scored):
        loss = small_vocabulary.reduced(scored.loss, call.reduction)
        divisor = divisor_of(call.reduction, call.y.shape[0])
        ctx.factor = small_vocabulary.divided(scored.factor, divisor)
        ctx.is_left_out, ctx.made = scored.is_left_out, None
        if (
            torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        ):  # who has some wants little kept
            ctx.made = small_vocabulary.gradient(scored.exps, scored.total, scored.place, ctx.factor)
        ctx.save_for_backward(logits, call.y)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if not torch.is_grad_enabled():
            return _SmallLoss._gradient(ctx, check_upstream(upstream)), None, None
        with torch.no_grad():
            gradient = _SmallLoss._gradient(ctx, check_upstream(upstream))
        gradients = forbid_second_derivative([gradient], upstream, ctx.saved_tensors[0])
        return *gradients, None, None

    @staticmethod
    def _gradient(ctx, upstream):
        logits, y = ctx.saved_tensors
        # It is given away once. A second backward makes it again.
        made, ctx.made = ctx.made, None
        if made is None:
            made = small_vocabulary.gradient_again(_rows(logits.detach()), y.numpy(), ctx.factor)
        upstream = upstream.reshape(-1) if upstream.dim() else upstream
        made = small_vocabulary.scale_(made, upstream, ctx.is_left_out)
        made = made if made.dtype == logits.dtype else made.to(logits.dtype)
        return made if made.dim() == logits.dim() else made.view(logits.shape)
