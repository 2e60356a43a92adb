"""From left to right: the sampler of gpt2 mode."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.progress import progress
from difftrain.sampling.choosing import Choice, choose, random_numbers, recent_words
from difftrain.sampling.settling import Scores, without_mask


@torch.no_grad()
def continue_causal(
    scores: Scores,
    x: Tensor,
    length: int,
    mask_id: int,
    *,
    block_size: int,
    choice: Choice,
    seed: int,
    samples: Tensor,
) -> Tensor:
    """Append tokens from left to right until ``x`` (B, T) has ``length`` columns, one pass each.

    The model sees the last ``block_size`` columns, at positions from 0 on: rotary positions count
    distances alone, and learned ones were trained on exactly these.

    Args:
        samples: (B,) int64, the index of each text: its random numbers depend on it and the seed alone.

    Source: nanoGPT's ``generate``.
    """
    for _ in progress(range(length - x.shape[1]), what="sampling", unit="token"):
        seen = x[:, -block_size:]
        logits = without_mask(scores(seen, _last(seen)).float(), mask_id)
        u = random_numbers(seed, samples, x.shape[1], 1)[:, 0]
        longer = torch.nn.functional.pad(x, (0, 1), value=mask_id)
        recent = recent_words(longer, _last(longer), mask_id) if choice.repetition > 1 else None
        word, _ = choose(logits, choice, u, recent)
        x = torch.cat((x, word[:, None]), dim=1)
    return x


def _last(x: Tensor) -> Tensor:
    is_last = torch.zeros_like(x, dtype=torch.bool)
    is_last[:, -1:] = True
    return is_last
