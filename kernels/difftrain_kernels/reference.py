"""The definition of the loss: plain PyTorch, any device, every formula written once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cases
from .cases import CaseTable
from .validation import Penalty


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

    Arguments, result and errors are those of :func:`difftrain_kernels.fused_diffusion_loss`,
    which validates them; call that one. A label outside [0, V) makes its row's loss and gradient
    NaN. An ignored row has loss 0 and gradient exactly 0, whatever its logits hold. An empty
    batch gives NaN for "mean", 0 for "sum" and an empty tensor for "none".

    Source: the specification's ``diffusion_loss_function``.
    """
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
    is_counted = y != ignore_index
    is_label = (y >= 0) & (y < vocab_size)
    compute_dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32

    # Masked before the softmax, so that a NaN in an ignored row cannot reach its gradient.
    wide_NV = logits_NV.to(compute_dtype).masked_fill(~is_counted[:, None], 0.0)
    target = torch.where(is_label, y, 0)
    log_p = torch.log_softmax(wide_NV, dim=-1).gather(1, target[:, None]).squeeze(1)
    poison = torch.where(is_label | ~is_counted, 1.0, torch.nan).to(compute_dtype)
    nll = torch.where(is_counted, -log_p * poison, 0.0)

    predicted = logits_NV.detach().argmax(dim=-1)
    says_mask = predicted == mask_id
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm, compute_dtype)
    answer = torch.where(says_mask, cases.MASK, torch.where(predicted == y, cases.TARGET, cases.OTHER))
    case = torch.where(is_counted, kind * 3 + answer, cases.IGNORED)
    top = logits_NV.detach().gather(1, predicted[:, None]).squeeze(1).to(compute_dtype)
    gap = torch.where(is_counted, top - logits_NV.detach()[:, mask_id].to(compute_dtype), 0.0)
    return weight * nll, case, nll, gap, torch.where(is_counted, weight * poison, 0.0)


def kind_and_weight(
    x: Tensor, y: Tensor, says_mask: Tensor, mask_id: int, pk: Penalty, pm: Penalty, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each position's row of the case table, and the weight of its loss as :func:`diffusion_loss_reference` says.

    Args:
        x, y: (N,) int64.
        says_mask: (N,) bool, whether the prediction is [MASK].
        dtype: of the weights.
    """
    is_masked = (x == mask_id) & (y != mask_id)
    is_intact = (x == y) & (x != mask_id)
    kind = torch.where(is_masked, cases.MASKED, torch.where(is_intact, cases.INTACT, cases.CORRUPTED))
    pk, pm = (p.detach().to(dtype) if isinstance(p, Tensor) else p for p in (pk, pm))
    weight = torch.ones_like(x, dtype=dtype)
    weight = torch.where(is_masked & says_mask, pk, weight)
    return kind, torch.where(is_intact & says_mask, pm, weight)


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
    target = torch.where((y >= 0) & (y < logits.shape[1]), y, 0).long()[:, None]
    probability.scatter_(1, target, probability.gather(1, target) - 1.0)
    factor = torch.where(is_counted, columns[3] * upstream / divisor, 0.0)
    return probability.mul_(factor[:, None]).to(logits.dtype)


def tabulate_cases(case: Tensor, nll: Tensor, gap: Tensor) -> CaseTable:
    """The :class:`CaseTable` of row statistics (N,)."""
    return cases.tabulate(case // 3, case % 3, case != cases.IGNORED, nll, gap)
