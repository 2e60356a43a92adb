"""The reference in two steps without autograd: the statistics of rows, and their gradient from these.

For whoever makes the gradient himself: chunks of the linear loss, and operators, inside which autograd
does not record. The formula is that of ``reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cases
from .reference import Scores, bend, columns_taking_part, other_columns, score, target_column
from .terms import PLAIN, Terms
from .validation import Penalty

N_STATISTICS = 4  # columns of the plain loss: weighted loss, nll, gap, factor of the gradient


def score_rows(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int,
    terms: Terms = PLAIN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The statistics of rows of logits (N, V): case (N,) int32, and columns fp32 (fp64 for fp64).

    The columns are (4 + further, N): those of :func:`other_columns` follow the plain loss's.
    """
    with torch.no_grad():
        return columns_of(score(logits, y, x, mask_id, pk, pm, ignore_index, terms), terms)


def columns_of(scores: Scores, terms: Terms) -> tuple[Tensor, Tensor]:
    row_loss, case, nll, gap, factor, others = scores
    return case.int(), torch.stack((row_loss, nll, gap, factor, *(others[n] for n in other_columns(terms))))


def scores_of(statistics: tuple[Tensor, Tensor], terms: Terms, n_plain: int = N_STATISTICS) -> Scores:
    """The inverse of :func:`columns_of`."""
    case, columns = statistics
    others = dict(zip(other_columns(terms), columns[n_plain:], strict=True))
    row_loss, nll, gap, factor = columns[:N_STATISTICS]
    return Scores(row_loss, case, nll, gap, factor, others)


def row_gradients(
    logits: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor, divisor: float,
    *, mask_id: int, terms: Terms = PLAIN,
) -> Tensor:  # fmt: skip
    """The gradient of sum(row losses * upstream) / divisor, (N, V) in the logits' dtype; new.

    Args:
        statistics: what :func:`score_rows` returned for these logits and labels.
        upstream: 0-d or (N,).
    """
    scores = scores_of(statistics, terms)
    is_counted = scores.case != cases.IGNORED
    bent = bend(logits, terms, mask_id)
    p = torch.softmax(bent.masked_fill(~is_counted[:, None], 0.0), dim=-1)
    column, is_target = target_column(y, logits.shape[1])
    factor = torch.where(is_counted, scores.factor * upstream / divisor, 0.0)
    if terms == PLAIN:
        p.scatter_(1, column, p.gather(1, column) - 1.0)
        return p.mul_(factor[:, None]).to(logits.dtype)
    z_factor = scores.others["z_factor"] * upstream / divisor if terms.z_loss else None
    n_words = logits.shape[1] - terms.forbid_mask
    gradient = slanted(p, bent, column, is_target, factor, z_factor, mask_id, n_words, terms)
    return gradient.masked_fill_(~is_counted[:, None], 0.0).to(logits.dtype)


def slanted(p, bent, column, is_target, factor, z_factor, mask_column, n_words, terms) -> Tensor:
    """The gradient of rows: p * (factor + z_factor) - factor * smoothed target, times the logits' slope.

    Args:
        p: (N, V) softmax, or a slice of it.
        bent: the logits that it was made of; ``column`` (N, 1) of them is the target's where ``is_target`` (N,).
        factor, z_factor: (N,); the second may be None.
        n_words: how many words take part, over all slices.
    """
    gradient = p * (factor if z_factor is None else factor + z_factor)[:, None]
    # p - 1 before the factor, which loses least as p -> 1.
    p_target = p.gather(1, column).squeeze(1)
    at_target = factor * (p_target - (1.0 - terms.label_smoothing) * is_target.to(p.dtype))
    if z_factor is not None:
        at_target = at_target + z_factor * p_target
    gradient.scatter_(1, column, at_target[:, None])
    if terms.label_smoothing:
        gradient -= (factor * (terms.label_smoothing / n_words))[:, None]
    if terms.softcap is not None:
        gradient *= 1.0 - (bent / terms.softcap).square()
    if terms.logit_scale is not None:
        scale = terms.logit_scale
        gradient *= scale.to(gradient.dtype) if isinstance(scale, Tensor) else scale
    if terms.forbid_mask:
        gradient.masked_fill_(~columns_taking_part(p.shape[1], mask_column, terms, p.device), 0.0)
    return gradient
