"""The reference where each of several processes holds a slice of the vocabulary.

What a slice tells the others of its rows, the rows' statistics from what all told, and the gradient of
a slice; the formula is that of ``reference.py``. In fp32 (fp64 for fp64). exp(l - top) where the kernels
have exp2(l * log2e - shift): without a fused product the subtraction must come first to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cases
from .reference import Scores, bend, columns_taking_part, other_columns, target_column, weigh
from .stepwise_reference import slant, slants_of
from .terms import PLAIN, PROBABILITY, Terms
from .validation import Penalty

N_MESSAGE = 5
N_SLICED = 6  # columns of the plain loss: those of whole rows up to the gap, and what a slice needs


def message_size(terms: Terms) -> int:
    """How many numbers of each row a slice tells the others."""
    return N_MESSAGE + 2 * bool(terms.label_smoothing) + terms.entropy


def describe_slice(logits: Tensor, y: Tensor, mask_id: int, *, start: int, terms: Terms = PLAIN) -> Tensor:
    """What a slice tells of each row, (message_size, N).

    Its largest logit, the sum of exp without the target on that logit's scale, the answer (1 [MASK]
    + 2 target), the target's and [MASK]'s logit (0 in other slices). With label smoothing, how many
    words take part and the sum of their logits less the largest; with entropy, the sum of exp * logit
    less the largest, without the target.

    Args:
        logits: (N, V_r), columns [start, start + V_r) of the whole rows; V_r >= 1.
        y: (N,) targets in the whole vocabulary, like ``mask_id``.
    """
    size, mask = logits.shape[1], mask_id - start
    bent = bend(logits, terms, mask)
    column, has_target = target_column(y - start, size)
    has_mask = 0 <= mask < size

    predicted = bent.argmax(1)
    top = bent.gather(1, predicted[:, None])
    offset = bent - _finite(top)
    exps = torch.exp(offset)
    exps.scatter_(1, column, torch.where(has_target[:, None], 0.0, exps.gather(1, column)))
    answer = (has_target & (predicted == column[:, 0])) * 2 + (predicted == mask) * has_mask
    message = [
        top[:, 0],
        exps.sum(1),
        answer,
        torch.where(has_target, bent.gather(1, column)[:, 0], 0.0),
        bent[:, mask] if has_mask else torch.zeros_like(top[:, 0]),
    ]
    if terms.label_smoothing:
        takes_part = columns_taking_part(size, mask, terms, bent.device)
        message += [takes_part.sum().expand(len(bent)), offset.masked_fill(~takes_part, 0.0).sum(1)]
    if terms.entropy:
        message.append(torch.where(exps > 0, exps * offset, exps).sum(1))
    return torch.stack([part.to(bent.dtype) for part in message])


def _finite(top: Tensor) -> Tensor:
    """-inf to the lowest number: (-inf) - (-inf) would be NaN. NaN and +inf stay, and make NaN."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def combine_slices(
    messages: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int,
    *, vocab_size: int, terms: Terms = PLAIN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Statistics of whole rows: case (N,), and the columns that :func:`slice_gradients` and the table need.

    Args:
        messages: (slices, message_size, N), in the order of the vocabulary; see :func:`describe_slice`.
        vocab_size: of all slices together.
    """
    y, x = y.long(), x.long()
    tops, rests, answers, target_logits, mask_logits = messages[:, :N_MESSAGE].unbind(1)  # (slices, N) each
    further = iter(messages[:, N_MESSAGE:].unbind(1))
    first = tops.argmax(0, keepdim=True)  # the first maximum, NaN counting as one, as within a row
    top, answer = tops.gather(0, first)[0], answers.gather(0, first)[0]
    shift = _finite(top)
    fall = _finite(tops) - shift
    rest = (rests * torch.exp(fall)).sum(0)
    log_p = target_logits.sum(0) - shift
    total = rest + torch.exp(log_p)
    mask_logit = mask_logits.sum(0)

    nll = smooth = torch.log(total) - log_p
    if terms.label_smoothing:
        n_words, sums = next(further), next(further)
        mean = (sums + n_words * fall).sum(0) / n_words.sum(0)  # of the logits, less the largest
        smooth = nll - terms.label_smoothing * (mean - log_p)
    lse = shift + torch.log(total) if terms.z_loss or terms.rows else None
    shown = {}
    if terms.gate == PROBABILITY or terms.rows:
        shown["p_mask"] = torch.exp(mask_logit - shift) / total
    if terms.rows:
        shown["confidence"] = torch.exp(top - shift) / total
    if terms.entropy:
        sums = (torch.exp(fall) * (next(further) + torch.where(rests > 0, fall * rests, 0.0))).sum(0)
        at_target = torch.where(log_p > -torch.inf, torch.exp(log_p) * log_p, 0.0)
        shown["entropy"] = torch.log(total) - (sums + at_target) / total
    labels = (y, x, mask_id, pk, pm, ignore_index, vocab_size)
    is_mask, is_target = (answer == 1) | (answer == 3), answer == 2
    scores = weigh(nll, smooth, lse, top - mask_logit, is_mask, is_target, shown, *labels, terms)
    columns = [scores.row_loss, scores.nll, scores.gap, shift, scores.factor / total, rest]
    columns += [scores.others[name] for name in other_columns(terms)]
    if terms != PLAIN:
        columns.append(total)
    # An infinite total would leave something in rows that do not count.
    return scores.case, torch.stack(columns).masked_fill(scores.case == cases.IGNORED, 0.0)


def sliced_scores(statistics: tuple[Tensor, Tensor], terms: Terms) -> Scores:
    """The scores of whole rows, from what :func:`combine_slices` returned; ``factor`` is 1 / total of it."""
    case, columns = statistics
    names = other_columns(terms)
    others = dict(zip(names, columns[N_SLICED : N_SLICED + len(names)], strict=True))
    return Scores(columns[0], case, columns[1], columns[2], columns[4], others)


def slice_gradients(
    logits: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor, divisor: float,
    *, mask_id: int, vocab_size: int, terms: Terms = PLAIN,
) -> Tensor:  # fmt: skip
    """The gradient of sum(row losses * upstream) / divisor for a slice, (N, V_r) in its dtype; new.

    Args:
        y: targets less the slice's start, like ``mask_id``.
        statistics: what :func:`combine_slices` returned.
        upstream: 0-d or (N,).
        vocab_size: of all slices together.
    """
    if logits.shape[1] == 0:
        return torch.empty_like(logits)
    case, columns = statistics
    is_counted = (case != cases.IGNORED)[:, None]
    shift, per_total, rest = columns[3:N_SLICED]
    factor = per_total * (upstream / divisor)
    bent = bend(logits, terms, mask_id)
    column, is_target = target_column(y, logits.shape[1])
    exps = torch.exp(bent - shift[:, None])
    if terms == PLAIN:
        gradient = exps * factor[:, None]
        # 1 - p is the sum of the others, which loses nothing as p -> 1.
        at_target = torch.where(is_target[:, None], -(rest * factor)[:, None], gradient.gather(1, column))
        gradient.scatter_(1, column, at_target)
        return gradient.masked_fill_(~is_counted, 0.0).to(logits.dtype)
    total = columns[-1]
    z_factor = (
        sliced_scores(statistics, terms).others["z_factor"] * (upstream / divisor) if terms.z_loss else None
    )
    n_words = vocab_size - terms.forbid_mask
    slants = slants_of(factor * total, z_factor, total, n_words, terms)
    slants[1] = torch.where(is_target, slants[1], 0.0)
    gradient = slant(exps, slants, column, bent, mask_id, terms, out=exps)
    return gradient.masked_fill_(~is_counted, 0.0).to(logits.dtype)
