"""What one pass over the logits leaves of each row: its case and six numbers, more where terms need them."""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, PROBABILITY, Terms
from .scores import FAINT, LN2, exponents_of, slopes_of, units_of
from .weights import IGNORED, expected_weight, weight_of_case

# Beyond it the shift's own rounding, half a unit in its last place, would show in the loss.
LARGEST_SHIFT = tl.constexpr(2.0**28)

# Columns of the row statistics, (6 and more, N) fp32.
ROW_LOSS = tl.constexpr(0)  # weight * nll, and what the terms make of it
NLL = tl.constexpr(1)
GAP = tl.constexpr(2)  # largest logit - logit of [MASK]
SHIFT = tl.constexpr(3)  # softmax = exp2(logit * LOG2E - SHIFT) / total
PER_TOTAL = tl.constexpr(4)  # weight / total, NaN for a label outside the vocabulary
REST = tl.constexpr(5)  # total without the target, summed without it: total - x would lose it as p -> 1
N_STATISTICS = 6
FIRST = ("ROW_LOSS", "NLL", "GAP", "SHIFT", "PER_TOTAL", "REST")
# Columns that only some terms have, in this order.
FURTHER = (
    "WEIGHTED",  # token weight * smoothed nll
    "SMOOTHING",  # what smoothing adds to it
    "Z",  # token weight * z_loss * lse^2
    "P_MASK",
    "P_TARGET",  # 0 where the target is [MASK]
    "LSE",
    "CONFIDENCE",  # probability of the maximum
    "ENTROPY",
    "TARGET_TERM",  # of the target's gradient, beside -REST * PER_TOTAL
    "UNIFORM",  # taken from every word's gradient
)
Columns = namedtuple("Columns", FURTHER, defaults=[None] * len(FURTHER))


def columns(terms: Terms = PLAIN) -> tuple[str, ...]:
    """The names of the columns that the statistics of these terms have, in order."""
    smooths, is_shared = terms.label_smoothing > 0, terms.gate == PROBABILITY
    has = {
        "WEIGHTED": terms.token_weights is not None or smooths,
        "SMOOTHING": smooths,
        "Z": terms.z_loss > 0,
        "P_MASK": terms.rows or is_shared,
        "P_TARGET": is_shared,
        "LSE": terms.rows,
        "CONFIDENCE": terms.rows,
        "ENTROPY": terms.entropy,
        "TARGET_TERM": smooths or terms.z_loss > 0,
        "UNIFORM": smooths,
    }
    return FIRST + tuple(name for name in FURTHER if has[name])


def n_statistics(terms: Terms = PLAIN) -> int:
    """How many columns the statistics of these terms have."""
    return N_STATISTICS if terms is PLAIN else len(columns(terms))


class RowStatistics(NamedTuple):
    """What one pass over the logits leaves of each row.

    Attributes:
        case: (N,) int32, kind * 3 + answer as in ``cases.py``, 9 for a position that does not count.
        columns: (len(columns(terms)), N) fp32: weighted loss, nll, gap, and three that the gradient
            needs; then what the terms add.
    """

    case: Tensor
    columns: Tensor

    @property
    def row_loss(self) -> Tensor:
        return self.columns.select(0, 0)

    def column(self, name: str, terms: Terms = PLAIN) -> Tensor:
        """One column (N,) by its name in :func:`columns`, of the terms that the statistics were made with."""
        return self.columns[columns(terms).index(name)]


def empty_statistics(n: int, device: torch.device, terms: Terms) -> RowStatistics:
    """Uninitialised statistics of ``n`` rows."""
    return RowStatistics(
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(n_statistics(terms), n, dtype=torch.float32, device=device),
    )


def row_values(statistics: RowStatistics, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """The case of each row, and what terms with ``rows`` show of it, by name; views."""
    names = ["nll", "lse", "p_mask", "confidence", *(["entropy"] if terms.entropy else [])]
    return statistics.case, {name: statistics.column(name.upper(), terms) for name in names}


@triton.jit
def _store(pointers, value, is_counted, inside):
    """A column of rows; 0 where they do not count."""
    tl.store(pointers, tl.where(is_counted, value, 0.0), mask=inside)


@triton.jit
def _gap(top_unit, mask_unit, scaling, terms):
    """How far [MASK] is below the maximum."""
    gap = top_unit - mask_unit
    if (terms.logit_scale is not None) or (terms.softcap is not None):
        gap *= scaling.factor * LN2
    return gap


@triton.jit
def _times_token_and_scale(value, token_weight, scaling, terms):
    """A factor of the gradient, times what the whole row is multiplied with."""
    if terms.token_weights is not None:
        value *= token_weight
    if terms.logit_scale is not None:
        value *= scaling.scale
    return value


@triton.jit
def store_statistics(
    case_ptr, statistics_ptr, row, n_rows, inside, kind, case, weight, y, is_label, mask_id, token_weight, pk, pm,
    target_unit, mask_unit, top_unit, shift, rest, exponent_sum, moment, vocab_size, scaling, terms,
):  # fmt: skip
    """All that is kept of one row (or of a block of rows); what its gradient needs is returned too.

    ``weight`` is that of ``pk`` and ``pm``. The units are -inf where there is no such word.
    ``exponent_sum`` is the sum of all exponents; ``moment`` that of exp2 times exponent, without the target.
    """
    log2_p = exponents_of(target_unit, shift, scaling)
    total = rest + tl.exp2(log2_p)
    is_exact = tl.abs(shift) < LARGEST_SHIFT
    poison = tl.where(is_label & is_exact, 1.0, float("nan"))
    # An empty total: NaN, or every logit below FLOOR. It must not pass for a number.
    is_number = total > 0
    log2_total = tl.log2(total)
    nll = tl.where(is_number, LN2 * (log2_total - log2_p), float("nan")) * poison
    # The same of what a label outside the vocabulary does not spoil.
    known = tl.where(is_number & is_exact, 1.0, float("nan"))
    lse = (shift + log2_total) * LN2 * known
    p_mask, p_target = 0.0, 0.0
    if terms.columns.P_MASK is not None:
        p_mask = tl.exp2(exponents_of(mask_unit, shift, scaling)) / total * known
        p_target = tl.where(y == mask_id, 0.0, tl.exp2(log2_p) / total * known)
    words = tl.cast(vocab_size - 1 if terms.FORBID_MASK else vocab_size, tl.float32)

    if terms.PROBABILITY:
        weight = expected_weight(kind, p_mask, p_target, pk, pm, terms)
    elif terms.case_weights is not None:
        weight = weight_of_case(case, pk, pm, terms)
    is_counted = case != IGNORED
    base = statistics_ptr + row
    tl.store(case_ptr + row, case, mask=inside)
    loss, smoothing = nll, 0.0
    if terms.label_smoothing is not None:
        mean = (log2_total - exponent_sum / words) * LN2 * poison  # of lse - logit
        loss = nll * (1.0 - terms.label_smoothing) + mean * terms.label_smoothing
        smoothing = (mean - nll) * terms.label_smoothing
    z, z_slope = 0.0, 0.0
    row_loss = weight * loss
    of_softmax = weight
    if terms.z_loss is not None:
        z = lse * lse * terms.z_loss
        z_slope = lse * (2.0 * terms.z_loss)
        row_loss += z
        of_softmax += z_slope
    if terms.token_weights is not None:
        row_loss *= token_weight
        loss *= token_weight
        smoothing *= token_weight
        z *= token_weight

    _store(base + ROW_LOSS * n_rows, row_loss, is_counted, inside)
    _store(base + NLL * n_rows, nll, is_counted, inside)
    _store(base + GAP * n_rows, _gap(top_unit, mask_unit, scaling, terms), is_counted, inside)
    _store(base + SHIFT * n_rows, shift, is_counted, inside)
    per_total = _times_token_and_scale(of_softmax, token_weight, scaling, terms) * poison / total
    per_total = tl.where(is_counted, per_total, 0.0)
    tl.store(base + PER_TOTAL * n_rows, per_total, mask=inside)
    _store(base + REST * n_rows, rest, is_counted, inside)

    places = terms.columns
    if places.WEIGHTED is not None:
        _store(base + places.WEIGHTED * n_rows, loss, is_counted, inside)
    if places.SMOOTHING is not None:
        _store(base + places.SMOOTHING * n_rows, smoothing, is_counted, inside)
    if places.Z is not None:
        _store(base + places.Z * n_rows, z, is_counted, inside)
    if places.P_MASK is not None:
        _store(base + places.P_MASK * n_rows, p_mask, is_counted, inside)
    if places.P_TARGET is not None:
        _store(base + places.P_TARGET * n_rows, p_target, is_counted, inside)
    if places.LSE is not None:
        _store(base + places.LSE * n_rows, lse, is_counted, inside)
    if places.CONFIDENCE is not None:
        confidence = tl.exp2(exponents_of(top_unit, shift, scaling)) / total * known
        _store(base + places.CONFIDENCE * n_rows, confidence, is_counted, inside)
    if places.ENTROPY is not None:
        # The target's own share of the moment, which is 0 where its probability is.
        moment += tl.exp2(log2_p) * tl.maximum(log2_p, FAINT)
        entropy = (log2_total - moment / total) * LN2 * known
        _store(base + places.ENTROPY * n_rows, entropy, is_counted, inside)
    target_term, uniform = 0.0, 0.0
    if places.TARGET_TERM is not None:
        target_term = z_slope
        if terms.label_smoothing is not None:
            target_term += weight * terms.label_smoothing * (1.0 - 1.0 / words)
        target_term = _times_token_and_scale(target_term, token_weight, scaling, terms)
        _store(base + places.TARGET_TERM * n_rows, target_term, is_counted, inside)
    if places.UNIFORM is not None:
        uniform = weight * terms.label_smoothing / words
        uniform = _times_token_and_scale(uniform, token_weight, scaling, terms)
        _store(base + places.UNIFORM * n_rows, uniform, is_counted, inside)
    return per_total, target_term, uniform


@triton.jit
def store_ignored(case_ptr, statistics_ptr, row, n_rows, N_COLUMNS: tl.constexpr):
    """The same of a row that does not count."""
    tl.store(case_ptr + row, IGNORED)
    for column in tl.static_range(N_COLUMNS):
        tl.store(statistics_ptr + row + column * n_rows, 0.0)


@triton.jit
def gradient_of(logits, shift, factor, uniform, scaling, terms):
    """softmax * scale, before the target's share; ``factor`` is scale / total."""
    gradient = tl.exp2(exponents_of(units_of(logits, scaling, terms), shift, scaling))
    if terms.columns.UNIFORM is None:
        gradient *= factor
    else:
        gradient = tl.fma(gradient, factor, -uniform)
    if terms.softcap is not None:
        gradient *= slopes_of(logits, scaling)
    return gradient


@triton.jit
def target_gradient_of(target_logit, rest, factor, target_term, scaling, terms):
    """The target's: the softmax less one, as the others' sum, which loses nothing as p -> 1."""
    gradient = -rest * factor
    if terms.columns.TARGET_TERM is not None:
        gradient += target_term
    if terms.softcap is not None:
        gradient *= slopes_of(target_logit, scaling)
    return gradient
