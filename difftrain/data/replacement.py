"""Wrong words: another word for each token, from random bits."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.data.philox import below

LARGEST_TOTAL = 1 << 30  # what counts add up to at most, so that 31 random bits reach each


def other_words(tokens: Tensor, words: Tensor, n_words: int, counts: Tensor | None = None) -> Tensor:
    """A word for each token that is not the token itself, (B, T) int64.

    Args:
        tokens: (B, T) int64 in [0, n_words).
        words: (B, T) 32-bit random words.
        counts: (n_words,) int64: how likely each word is among those that are left; by default all are alike.
    """
    if counts is None:
        # One of n_words - 1: skipping the original keeps them equally likely.
        other = below(words, n_words - 1)
        return other + (other >= tokens).long()
    counts = scaled(counts).to(tokens.device)
    ends = counts.cumsum(0)
    own = counts[tokens]
    place = below(words, ends[-1] - own)
    place = place + torch.where(place >= ends[tokens] - own, own, 0)
    return torch.searchsorted(ends, place, right=True)


def scaled(counts: Tensor) -> Tensor:
    """Counts that add up to at most about 2^30; a word that occurs keeps at least 1."""
    total = int(counts.sum())
    if total <= LARGEST_TOTAL:
        return counts
    return torch.where(counts > 0, (counts.double() * (LARGEST_TOTAL / total)).long().clamp(min=1), 0)
