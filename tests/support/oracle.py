"""An independent oracle: the loss by a loop over tokens in fp64, importing nothing of ours.

Written from the definition alone (numpy for one row's sums, Python for every decision), so that a
mistake in the reference cannot hide here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class OracleResult:
    nll: np.ndarray  # (N,) unweighted cross-entropy
    weight: np.ndarray  # (N,)
    gradient: np.ndarray  # (N, V) of the SUM of weighted losses; divide by N for the mean
    predicted: np.ndarray  # (N,) first maximum
    counts: np.ndarray  # (3, 3) masked/intact/corrupted x mask/target/other
    nll_sums: np.ndarray  # (3, 3)
    gap_sums: np.ndarray  # (3,)

    @property
    def row_loss(self) -> np.ndarray:
        return self.weight * self.nll

    def loss(self, reduction: str = "mean") -> float:
        total = math.fsum(self.row_loss) if np.isfinite(self.row_loss).all() else self.row_loss.sum()
        if reduction == "sum":
            return float(total)
        return float(total) / len(self.nll) if len(self.nll) else math.nan


def first_maximum(row: np.ndarray) -> int:
    """Index of the first maximum; the first NaN, if there is one, counts as the maximum."""
    best = 0
    for index in range(1, len(row)):
        if math.isnan(row[best]):
            break
        if row[index] > row[best] or math.isnan(row[index]):
            best = index
    return best


def diffusion_loss(logits, y, x, mask_id, pk, pm, ignore_index=-1) -> OracleResult:
    """The loss of (N, V) logits (anything numpy can widen to fp64), y (N,), x (N,)."""
    logits = np.asarray(logits, dtype=np.float64)
    n, vocab_size = logits.shape
    result = OracleResult(
        nll=np.zeros(n),
        weight=np.ones(n),
        gradient=np.zeros((n, vocab_size)),
        predicted=np.zeros(n, dtype=np.int64),
        counts=np.zeros((3, 3), dtype=np.int64),
        nll_sums=np.zeros((3, 3)),
        gap_sums=np.zeros(3),
    )
    for i in range(n):
        row, target, seen = logits[i], int(y[i]), int(x[i])
        predicted = result.predicted[i] = first_maximum(row)
        if target == ignore_index:
            continue
        with np.errstate(all="ignore"):
            shifted = row - row.max()
            exps = np.exp(shifted)
            denominator = exps.sum()
            softmax = exps / denominator
            if 0 <= target < vocab_size:
                nll = np.log(denominator) - shifted[target]
                onehot = np.arange(vocab_size) == target
                gradient = softmax - onehot
                # 1 - p is the sum of the others, which loses nothing as p -> 1.
                gradient[target] = -exps[~onehot].sum() / denominator
            else:
                nll = math.nan
                gradient = np.full(vocab_size, math.nan)
            gap = row[predicted] - row[mask_id]
        if seen == mask_id and target != mask_id:
            kind, weight = 0, pk
        elif seen == target and seen != mask_id:
            kind, weight = 1, pm
        else:
            kind, weight = 2, 1.0
        if predicted != mask_id:
            weight = 1.0
        answer = 0 if predicted == mask_id else 1 if predicted == target else 2
        result.nll[i], result.weight[i] = nll, weight
        result.gradient[i] = weight * gradient
        result.counts[kind, answer] += 1
        result.nll_sums[kind, answer] += nll
        result.gap_sums[kind] += gap
    return result
