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
    weight: np.ndarray  # (N,) by case
    gradient: np.ndarray  # (N, V) of the SUM of row losses, by rows of the logits; divide by N for the mean
    predicted: np.ndarray  # (N,) first maximum
    counts: np.ndarray  # (3, 3) masked/intact/corrupted x mask/target/other
    nll_sums: np.ndarray  # (3, 3)
    gap_sums: np.ndarray  # (3,)
    row_loss: np.ndarray  # (N,)
    smooth: np.ndarray  # (N,) cross-entropy with the smoothed target
    lse: np.ndarray  # (N,)
    p_mask: np.ndarray  # (N,) probability of [MASK]
    confidence: np.ndarray  # (N,) probability of the maximum
    entropy: np.ndarray  # (N,)
    case: np.ndarray  # (N,) 3 * kind + answer, -1 where a position does not count
    weighted_sums: (
        np.ndarray
    )  # (3, 3) token weight * smooth; shared among answers where the gate is probability
    smoothing_sums: np.ndarray  # (3, 3) of it, what smoothing adds
    z_sum: float  # token weight * z_loss * lse^2

    def loss(self, reduction: str = "mean", normalizer: float | None = None) -> float:
        total = math.fsum(self.row_loss) if np.isfinite(self.row_loss).all() else self.row_loss.sum()
        if normalizer is not None:
            return float(total) / normalizer if normalizer else 0.0
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


def diffusion_loss(
    logits, y, x, mask_id, pk=1.0, pm=1.0, ignore_index=-1, *, token_weights=None, case_weights=None, gate="argmax",
    softcap=None, label_smoothing=0.0, z_loss=0.0, forbid_mask=False, logit_scale=1.0, shift=0, length=None,
) -> OracleResult:  # fmt: skip
    """The loss of (N, V) logits (anything numpy can widen to fp64), y (N,), x (N,).

    ``token_weights`` is (N,), ``case_weights`` (3, 3) in place of ``pk`` and ``pm``. With ``shift``, positions
    come in sequences of ``length``, and position i of one is read against its logits i - shift.
    """
    logits = np.asarray(logits, dtype=np.float64)
    n, vocab_size = logits.shape
    length = length or max(n, 1)
    weights = np.ones((3, 3))
    weights[0, 0], weights[1, 0] = pk, pm
    if case_weights is not None:
        weights = np.asarray(case_weights, dtype=np.float64)
    rows = {
        name: np.zeros(n)
        for name in ("nll", "row_loss", "smooth", "lse", "p_mask", "confidence", "entropy")
    }
    result = OracleResult(
        **rows,
        weight=np.ones(n),
        gradient=np.zeros((n, vocab_size)),
        predicted=np.zeros(n, dtype=np.int64),
        counts=np.zeros((3, 3), dtype=np.int64),
        nll_sums=np.zeros((3, 3)),
        gap_sums=np.zeros(3),
        case=np.full(n, -1),
        weighted_sums=np.zeros((3, 3)),
        smoothing_sums=np.zeros((3, 3)),
        z_sum=0.0,
    )
    takes_part = np.ones(vocab_size, dtype=bool)
    takes_part[mask_id] = not forbid_mask
    for i in range(n):
        target, seen = int(y[i]), int(x[i])
        token_weight = 1.0 if token_weights is None else float(token_weights[i])
        if i % length < shift:
            continue
        with np.errstate(all="ignore"):
            row, slope = logits[i - shift] * logit_scale, np.full(vocab_size, float(logit_scale))
            if softcap is not None:
                row = softcap * np.tanh(row / softcap)
                slope = slope * (1.0 - (row / softcap) ** 2)
        row = np.where(takes_part, row, -np.inf)
        predicted = result.predicted[i] = first_maximum(row)
        if target == ignore_index or token_weight == 0.0:
            continue
        with np.errstate(all="ignore"):
            top = row.max()
            shifted = row - top
            exps = np.exp(shifted)
            denominator = exps.sum()
            softmax = exps / denominator
            lse = top + np.log(denominator)
            is_label = 0 <= target < vocab_size and bool(takes_part[target])
            if is_label:
                nll = np.log(denominator) - shifted[target]
                smooth = nll
                if label_smoothing:  # the mean of lse - logit over the words that take part
                    others = np.log(denominator) - shifted[takes_part].mean()
                    smooth = (1.0 - label_smoothing) * nll + label_smoothing * others
            else:
                nll = smooth = math.nan
            gap = row[predicted] - row[mask_id]
        kind = (
            0 if seen == mask_id and target != mask_id else 1 if seen == target and seen != mask_id else 2
        )
        answer = 0 if predicted == mask_id else 1 if predicted == target else 2
        share = np.zeros(3)  # of each answer in the weight
        share[answer] = 1.0
        if gate == "probability":
            p_target = softmax[target] if is_label and target != mask_id else 0.0
            share = np.array([softmax[mask_id], p_target, 1.0 - softmax[mask_id] - p_target])
        weight = float(share @ weights[kind])
        with np.errstate(all="ignore"):
            z = token_weight * z_loss * lse**2 if z_loss else 0.0
            result.row_loss[i] = token_weight * weight * smooth + z
            if is_label:
                onehot = np.arange(vocab_size) == target
                slant = softmax - (1.0 - label_smoothing) * onehot - label_smoothing / takes_part.sum()
                # 1 - p is the sum of the others, which loses nothing as p -> 1.
                others = -exps[~onehot].sum() / denominator
                slant[target] = others + label_smoothing * (1.0 - 1.0 / takes_part.sum())
                gradient = token_weight * (
                    weight * slant + (2.0 * z_loss * lse * softmax if z_loss else 0.0)
                )
                gradient = np.where(takes_part, gradient * slope, 0.0)
            else:
                gradient = np.where(takes_part, math.nan, 0.0)
            probable = softmax != 0
            entropy = -(softmax[probable] * np.log(softmax[probable])).sum()
        result.nll[i], result.smooth[i], result.weight[i] = nll, smooth, weight
        result.lse[i], result.entropy[i] = lse, entropy
        result.p_mask[i], result.confidence[i] = softmax[mask_id], softmax[predicted]
        result.case[i] = 3 * kind + answer
        result.gradient[i - shift] = gradient
        result.counts[kind, answer] += 1
        result.nll_sums[kind, answer] += nll
        result.gap_sums[kind] += gap
        result.z_sum += z
        result.weighted_sums[kind] += np.where(share != 0, share * token_weight * smooth, 0.0)
        result.smoothing_sums[kind] += np.where(share != 0, share * token_weight * (smooth - nll), 0.0)
    return result
