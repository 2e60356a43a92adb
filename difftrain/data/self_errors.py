"""Self-generated errors: some of the wrong words are the model's own, as a sampler meets them."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.data.philox import random_words, uniform

STREAM = 9  # of Philox; training alone has such errors
UNITS = 1 << 30  # in which probabilities are counted


def choose_errors(
    tokens: Tensor, x: Tensor, samples: Tensor, *, seed: int, mask_id: int, share: float
) -> tuple[Tensor, Tensor]:
    """Which wrong words of x are to be the model's own, each with probability ``share``.

    Args:
        tokens, x: (B, T) int64, the clean ids and what corruption made of them.
        samples: (B,) int64 index of each sequence, on their device.

    Returns:
        is_own: (B, T) bool.
        u: (B, T) fp32 in [0, 1), by which :func:`draw_errors` draws. Both depend on (seed, index) and the sequence alone.
    """
    words = random_words(seed, STREAM, samples, 2 * tokens.shape[1])
    chance, u = uniform(words).chunk(2, dim=1)
    return (x != tokens) & (x != mask_id) & (chance < share), u


def draw_errors(logits: Tensor, tokens: Tensor, u: Tensor, mask_id: int) -> Tensor:
    """A word for each position (B, T) int64 by the model's probabilities, neither the token itself nor [MASK].

    Args:
        logits: (B, T, V) floating point; not modified.
        tokens: (B, T) int64.
        u: (B, T) fp32 in [0, 1): the place in the cumulated probabilities.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    scores[..., mask_id] = -torch.inf
    scores.scatter_(-1, tokens[..., None], -torch.inf)
    # In whole numbers, whose sums are exact: of floats torch below 2.15 refuses them on CUDA in a deterministic run.
    ends = scores.softmax(-1).mul_(UNITS).to(torch.int32).cumsum(-1, dtype=torch.int32)
    # u has 24 bits and is below 1, and so the place below the total: a word is met that has a unit.
    place = ((u[..., None] * 2**24).long() * ends[..., -1:] >> 24).to(torch.int32)
    return torch.searchsorted(ends, place, right=True)[..., 0].clamp(max=mask_id)
