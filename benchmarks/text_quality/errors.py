"""Errors planted in a text: words drawn at random, or the model's own, as a sampler meets them."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.data import mask_share, replace_share
from difftrain.data.philox import random_words, uniform
from difftrain.data.self_errors import draw_errors
from difftrain.sampling.loaded import Loaded

KINDS = ("random", "own")
STREAM = 30  # of Philox; those of the trainer are below
BATCH = 64  # windows a pass


def plant(kind: str, model: Loaded, tokens: Tensor, share: float, seed: int) -> Tensor:
    """Windows of a text with int(share * T) words of each replaced by others, at least one; the argument stays.

    Args:
        kind: "random", any other word with equal chance, the same for every model; "own", what the model gives to
            the places when all of them are masked, at temperature 1, but the right words and [MASK].
        tokens: (W, T) int64, at most block_size of the model long.
        share: of the words of each window, in (0, 1].
        seed: of places and words.
    """
    samples = torch.arange(len(tokens), dtype=torch.int64, device="cpu")
    keys = {"seed": seed, "split": "val", "vocab_size": model.tokenizer.vocab_size, "share": share}
    if kind == "random":
        return replace_share(tokens, samples, **keys)[0]
    mask_id = model.tokenizer.mask_id
    masked, _ = mask_share(tokens, samples, **keys)
    u = uniform(random_words(seed, STREAM, samples, tokens.shape[1]))
    words = [
        draw_errors(model.logits(x), t, v, mask_id)
        for x, t, v in zip(masked.split(BATCH), tokens.split(BATCH), u.split(BATCH), strict=True)
    ]
    return torch.where(masked == mask_id, torch.cat(words), tokens)
