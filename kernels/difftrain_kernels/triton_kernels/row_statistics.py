"""What one pass over the logits leaves of each row: its case and six numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .weights import IGNORED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, since -inf minus -inf is NaN; its product with LOG2E too.
FLOOR = tl.constexpr(-2e38)
# Beyond it the shift's own rounding, half a unit in its last place, would show in the loss.
LARGEST_SHIFT = tl.constexpr(2.0**28)

# Columns of the row statistics, (6, N) fp32.
ROW_LOSS = tl.constexpr(0)  # weight * nll
NLL = tl.constexpr(1)
GAP = tl.constexpr(2)  # largest logit - logit of [MASK]
SHIFT = tl.constexpr(3)  # softmax = exp2(logit * LOG2E - SHIFT) / total
PER_TOTAL = tl.constexpr(4)  # weight / total, NaN for a label outside the vocabulary
REST = tl.constexpr(5)  # total without the target, summed without it: total - x would lose it as p -> 1
N_STATISTICS = 6


class RowStatistics(NamedTuple):
    """What one pass over the logits leaves of each row.

    Attributes:
        case: (N,) int32, kind * 3 + answer as in ``cases.py``, 9 for an ignored position.
        columns: (6, N) fp32: weighted loss, nll, gap, and three that the gradient needs.
    """

    case: Tensor
    columns: Tensor

    @property
    def row_loss(self) -> Tensor:
        return self.columns[0]


def empty_statistics(rows: Tensor) -> RowStatistics:
    """Uninitialised statistics of so many rows, on their device."""
    n, device = rows.shape[0], rows.device
    return RowStatistics(
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(N_STATISTICS, n, dtype=torch.float32, device=device),
    )


@triton.jit
def store_statistics(
    case_ptr, statistics_ptr, row, n_rows, inside, case, weight, target_logit, mask_logit, top, shift, rest, is_label
):  # fmt: skip
    """All that is kept of one row (or of a block of rows)."""
    log2_p = tl.fma(target_logit, LOG2E, -shift)
    total = rest + tl.exp2(log2_p)
    is_exact = tl.abs(shift) < LARGEST_SHIFT
    poison = tl.where(is_label & is_exact, 1.0, float("nan"))
    # An empty total: NaN, or every logit below FLOOR. It must not pass for a number.
    nll = tl.where(total > 0, LN2 * (tl.log2(total) - log2_p), float("nan")) * poison
    is_counted = case != IGNORED
    base = statistics_ptr + row
    tl.store(case_ptr + row, case, mask=inside)
    tl.store(base + ROW_LOSS * n_rows, tl.where(is_counted, weight * nll, 0.0), mask=inside)
    tl.store(base + NLL * n_rows, tl.where(is_counted, nll, 0.0), mask=inside)
    tl.store(base + GAP * n_rows, tl.where(is_counted, top - mask_logit, 0.0), mask=inside)
    tl.store(base + SHIFT * n_rows, tl.where(is_counted, shift, 0.0), mask=inside)
    per_total = tl.where(is_counted, weight * poison / total, 0.0)
    tl.store(base + PER_TOTAL * n_rows, per_total, mask=inside)
    tl.store(base + REST * n_rows, tl.where(is_counted, rest, 0.0), mask=inside)
    return per_total


@triton.jit
def store_ignored(case_ptr, statistics_ptr, row, n_rows):
    """The same of a row that does not count."""
    tl.store(case_ptr + row, IGNORED)
    for column in tl.static_range(6):
        tl.store(statistics_ptr + row + column * n_rows, 0.0)


@triton.jit
def gradient_of(values, shift, factor):
    """softmax * scale, before the target's share; ``factor`` is scale / total."""
    return tl.exp2(tl.fma(values, LOG2E, -shift)) * factor
