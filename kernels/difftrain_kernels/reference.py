"""The definition of the loss: plain PyTorch, any device, every formula written once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cases
from .cases import CaseTable
from .validation import Penalty, check_loss_arguments


def diffusion_loss_reference(
    logits: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty,
    pm: Penalty,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    return_cases: bool = False,
) -> Tensor | tuple[Tensor, CaseTable]:
    """Cross-entropy weighted by what the model predicts, in eager PyTorch.

    For each position with logits l, target y and input x::

        nll    = logsumexp(l) - l[y]                     (0 where y == ignore_index)
        weight = pk  if x == mask_id and y != mask_id and argmax(l) == mask_id
                 pm  if x == y       and x != mask_id and argmax(l) == mask_id
                 1   otherwise
        loss   = sum(weight * nll) / N                   (N counts ignored positions too)

    argmax takes the first maximum, and NaN counts as maximum. The weight is a constant: no
    gradient flows through it. Arithmetic is fp32 (fp64 for fp64 logits).

    Arguments, result and errors are those of :func:`difftrain_kernels.fused_diffusion_loss`; call
    that one. Derivatives of any order and torch.func's transforms work. A label outside [0, V) makes its row's loss and gradient
    NaN. An ignored row has loss 0 and gradient exactly 0, whatever its logits hold. An empty
    batch gives NaN for "mean", 0 for "sum" and an empty tensor for "none".

    Source: the specification's ``diffusion_loss_function``.
    """
    logits, y, x, mask_id, pk, pm, ignore_index = check_loss_arguments(
        logits, y, x, mask_id, pk, pm, ignore_index, reduction
    )
    logits_NV = logits.reshape(-1, logits.shape[-1])
    row_loss, case, nll, gap, _ = _score(
        logits_NV, y.reshape(-1), x.reshape(-1), mask_id, pk, pm, ignore_index
    )
    if reduction == "none":
        loss = row_loss.view(y.shape)
    else:
        loss = row_loss.sum() if reduction == "sum" else row_loss.mean()
    if not return_cases:
        return loss
    return loss, tabulate_cases(case, nll.detach(), gap)


def _score(logits_NV, y, x, mask_id, pk, pm, ignore_index):
    """Of each row: weight * nll, case as in ``cases.py``, nll, gap and the gradient's factor."""
    y, x = y.long(), x.long()
    vocab_size = logits_NV.shape[1]
    compute_dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    # Masked before the softmax, so that a NaN in an ignored row cannot reach its gradient.
    wide_NV = logits_NV.to(compute_dtype).masked_fill((y == ignore_index)[:, None], 0.0)
    column, _ = _target_column(y, vocab_size)
    log_p = torch.log_softmax(wide_NV, dim=-1).gather(1, column).squeeze(1)

    logits_NV = logits_NV.detach()
    predicted = logits_NV.argmax(dim=-1)
    top = logits_NV.gather(1, predicted[:, None]).squeeze(1).to(compute_dtype)
    gap = top - logits_NV[:, mask_id].to(compute_dtype)
    labels = (y, x, mask_id, pk, pm, ignore_index, vocab_size)
    return _weigh(-log_p, gap, predicted == mask_id, predicted == y, *labels)


def _target_column(y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which of so many columns is the target's, (N, 1), and whether one is, (N,); 0 where none is."""
    is_here = (y >= 0) & (y < size)
    return torch.where(is_here, y, 0).long()[:, None], is_here


def _weigh(nll, gap, says_mask, says_target, y, x, mask_id, pk, pm, ignore_index, vocab_size):
    """What the labels make of each row's nll and answer; returns what :func:`_score` does, 0 where ignored."""
    is_counted = y != ignore_index
    _, is_label = _target_column(y, vocab_size)
    # Not of an ignored row: the NaN would stop short of its gradient, but anomaly detection would see it.
    poison = torch.ones_like(nll).masked_fill(is_counted & ~is_label, torch.nan)
    nll = torch.where(is_counted, nll * poison, 0.0)

    is_masked = (x == mask_id) & (y != mask_id)
    is_intact = (x == y) & (x != mask_id)
    pk, pm = (p.to(nll.dtype) if isinstance(p, Tensor) else p for p in (pk, pm))
    weight = torch.ones_like(x, dtype=nll.dtype)
    weight = torch.where(is_masked & says_mask, pk, weight)
    weight = torch.where(is_intact & says_mask, pm, weight)

    kind = torch.where(is_masked, cases.MASKED, torch.where(is_intact, cases.INTACT, cases.CORRUPTED))
    answer = torch.where(says_mask, cases.MASK, torch.where(says_target, cases.TARGET, cases.OTHER))
    case = torch.where(is_counted, kind * 3 + answer, cases.IGNORED)
    gap = torch.where(is_counted, gap, 0.0)
    return weight * nll, case, nll, gap, torch.where(is_counted, weight * poison, 0.0)


# The same in two steps without autograd, for whoever makes the gradient himself: chunks of the
# linear loss, and operators, inside which autograd does not record.

N_STATISTICS = 4  # columns: weighted loss, nll, gap, factor of the gradient


def score_rows(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The statistics of rows of logits (N, V): case (N,) int32, and columns (4, N) fp32 (fp64 for fp64)."""
    with torch.no_grad():
        row_loss, case, *others = _score(logits, y, x, mask_id, pk, pm, ignore_index)
        return case.int(), torch.stack((row_loss, *others))


def row_gradients(
    logits: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor, divisor: float
) -> Tensor:
    """The gradient of sum(row losses * upstream) / divisor, (N, V) in the logits' dtype; new.

    Args:
        statistics: what :func:`score_rows` returned for these logits and labels.
        upstream: 0-d or (N,).
    """
    case, columns = statistics
    is_counted = case != cases.IGNORED
    probability = torch.softmax(logits.to(columns.dtype).masked_fill(~is_counted[:, None], 0.0), dim=-1)
    column, _ = _target_column(y, logits.shape[1])
    probability.scatter_(1, column, probability.gather(1, column) - 1.0)
    factor = torch.where(is_counted, columns[3] * upstream / divisor, 0.0)
    return probability.mul_(factor[:, None]).to(logits.dtype)


def tabulate_cases(case: Tensor, nll: Tensor, gap: Tensor) -> CaseTable:
    """The :class:`CaseTable` of row statistics (N,)."""
    return cases.tabulate(case // 3, case % 3, case != cases.IGNORED, nll, gap)


# The same where each of several processes holds a slice of the vocabulary: what a slice tells the
# others of its rows, the rows' statistics from what all told, and the gradient of a slice. In fp32
# (fp64 for fp64). exp(l - top) where the kernels have exp2(l * log2e - shift): without a fused
# product the subtraction must come first to be exact.


def describe_slice(logits: Tensor, y: Tensor, mask_id: int, *, start: int) -> Tensor:
    """What a slice tells of each row, (5, N).

    Its largest logit, the sum of exp without the target on that logit's scale, the answer (1 [MASK]
    + 2 target), the target's and [MASK]'s logit (0 in other slices).

    Args:
        logits: (N, V_r), columns [start, start + V_r) of the whole rows; V_r >= 1.
        y: (N,) targets in the whole vocabulary, like ``mask_id``.
    """
    wide, size = logits.to(torch.promote_types(logits.dtype, torch.float32)), logits.shape[1]
    column, has_target = _target_column(y - start, size)
    mask = mask_id - start
    has_mask = 0 <= mask < size

    predicted = wide.argmax(1)
    top = wide.gather(1, predicted[:, None])
    exps = torch.exp(wide - _finite(top))
    exps.scatter_(1, column, torch.where(has_target[:, None], 0.0, exps.gather(1, column)))
    answer = (has_target & (predicted == column[:, 0])) * 2 + (predicted == mask) * has_mask
    message = [
        top[:, 0],
        exps.sum(1),
        answer,
        torch.where(has_target, wide.gather(1, column)[:, 0], 0.0),
        wide[:, mask] if has_mask else torch.zeros_like(top[:, 0]),
    ]
    return torch.stack([part.to(wide.dtype) for part in message])


def _finite(top: Tensor) -> Tensor:
    """-inf to the lowest number: (-inf) - (-inf) would be NaN. NaN and +inf stay, and make NaN."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def combine_slices(
    messages: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int,
    *, vocab_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Statistics of whole rows: case (N,), and columns (6, N) of which the last three serve :func:`slice_gradients`.

    Args:
        messages: (slices, 5, N), in the order of the vocabulary; see :func:`describe_slice`.
        vocab_size: of all slices together.
    """
    y, x = y.long(), x.long()
    tops, rests, answers, target_logits, mask_logits = messages.unbind(1)  # (slices, N) each
    first = tops.argmax(0, keepdim=True)  # the first maximum, NaN counting as one, as within a row
    top, answer = tops.gather(0, first)[0], answers.gather(0, first)[0]
    shift = _finite(top)
    rest = (rests * torch.exp(_finite(tops) - shift)).sum(0)
    log_p = target_logits.sum(0) - shift
    total = rest + torch.exp(log_p)

    gap = top - mask_logits.sum(0)
    labels = (y, x, mask_id, pk, pm, ignore_index, vocab_size)
    row_loss, case, nll, gap, factor = _weigh(
        torch.log(total) - log_p, gap, (answer == 1) | (answer == 3), answer == 2, *labels
    )
    columns = torch.stack([row_loss, nll, gap, shift, factor / total, rest])
    return case, columns.masked_fill(case == cases.IGNORED, 0.0)


def slice_gradients(
    logits: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor, divisor: float
) -> Tensor:
    """The gradient of sum(row losses * upstream) / divisor for a slice, (N, V_r) in its dtype; new.

    Args:
        y: targets less the slice's start.
        statistics: what :func:`combine_slices` returned.
        upstream: 0-d or (N,).
    """
    if logits.shape[1] == 0:
        return torch.empty_like(logits)
    case, columns = statistics
    shift, per_total, rest = columns[3:]
    factor = per_total * (upstream / divisor)
    gradient = torch.exp(logits.to(columns.dtype) - shift[:, None]) * factor[:, None]
    column, has_target = _target_column(y, logits.shape[1])
    # 1 - p is the sum of the others, which loses nothing as p -> 1.
    at_target = torch.where(has_target[:, None], -(rest * factor)[:, None], gradient.gather(1, column))
    gradient.scatter_(1, column, at_target)
    return gradient.masked_fill_((case == cases.IGNORED)[:, None], 0.0).to(logits.dtype)
