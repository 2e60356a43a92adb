"""Corruption: clean tokens -> (x, y), a pure function of the tokens and each sample's index."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.config import Config
from difftrain.data.philox import below, random_words, uniform

STREAMS = {"train": 1, "val": 2}  # Philox streams; those of the text windows are in corpus.py
MASKING_STREAMS = {"train": 5, "val": 6}
LEAST_P_MASK = 1e-3  # so that 1 / p_mask, a position's weight, stays below a thousand


def corrupt_by_recipe(
    tokens: Tensor,
    samples: Tensor,
    config: Config,
    *,
    split: str,
    vocab_size: int,
    level: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x and y as the run's recipe has them, and p_mask (B, 1) where it masks alone, else None.

    Args:
        tokens, samples, split, vocab_size: those of :func:`corrupt`.
        level: how much instead of as in training: the largest corruption, or p_mask where it masks alone.
    """
    keys = {"seed": config.seed, "split": split, "vocab_size": vocab_size}
    if config.recipe != "specification":
        return mask_alone(tokens, samples, p_mask=level, **keys)
    most = config.max_corruption if level is None else level
    return *corrupt(tokens, samples, max_corruption=most, **keys), None


def corrupt(
    tokens: Tensor,
    samples: Tensor,
    *,
    seed: int,
    split: str,
    vocab_size: int,
    max_corruption: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Mask some tokens and replace others by wrong words, as training does.

    With M = max_corruption and U, U' uniform in [0, 1): the mask rate is U*M, the replacement
    rate U'*(M - mask rate); counts are truncated to integers. The first positions of a random
    permutation become [MASK] (target: the original), the next ones a different word (target:
    [MASK]); the rest stay (target: the token itself).

    Args:
        tokens: (B, T) int64 data words in [0, vocab_size - 1); not modified.
        samples: (B,) int64 index of each sequence in its split, on the tokens' device.
        seed: run seed.
        split: "train" or "val".
        vocab_size: data words and [MASK], which is the last id; at least 3.
        max_corruption: M, one for all or (B,) fp32.

    Returns:
        x, y: (B, T) int64, what the model sees and what it should answer. A sample's result
        depends on (seed, split, its index) and its tokens, not on the batch it came in.

    Source: the specification, "Corruption".
    """
    length = tokens.shape[1]
    words = random_words(seed, STREAMS[split], samples, 2 + 2 * length)
    u_mask, u_replace = uniform(words[:, 0]), uniform(words[:, 1])
    mask_rate = u_mask * max_corruption
    replace_rate = u_replace * (max_corruption - mask_rate)
    n_mask = (length * mask_rate).long()
    n_replace = (length * replace_rate).long()
    return _apply(tokens, words[:, 2:], n_mask, n_replace, vocab_size)


def mask_alone(
    tokens: Tensor, samples: Tensor, *, seed: int, split: str, vocab_size: int, p_mask: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask each token independently, with one probability for its sequence, and replace none.

    With U uniform in (0, 1] the probability is 0.001 + 0.999 * U. It need not mask any token.

    Args:
        tokens, samples, seed, split, vocab_size: those of :func:`corrupt`, which draws other numbers.
        p_mask: the probability instead, for all sequences.

    Returns:
        x, y: (B, T) int64; the target of every position is its token.
        p_mask: (B, 1) fp32. A sample's result depends on what that of :func:`corrupt` depends on.

    Source: LLaDA (arXiv:2502.09992), algorithm 1, with the smallest probability of its guidelines.
    """
    is_masked, p = _masks(samples, tokens.shape[1], seed, split, p_mask)
    return torch.where(is_masked, vocab_size - 1, tokens), tokens, p


def count_masked(samples: Tensor, length: int, *, seed: int, split: str) -> int:
    """How many tokens :func:`mask_alone` masks in all, told without their device.

    Args:
        samples: (B,) int64 index of each sequence in its split, on the CPU, which draws the same numbers.
        length: T.
    """
    is_masked, _ = _masks(samples, length, seed, split, None)
    return int(is_masked.sum())


def _masks(
    samples: Tensor, length: int, seed: int, split: str, p_mask: float | None
) -> tuple[Tensor, Tensor]:
    """Which tokens of each sequence become [MASK] (B, T), and with what probability (B, 1)."""
    u = uniform(random_words(seed, MASKING_STREAMS[split], samples, 1 + length))
    if p_mask is None:
        p = LEAST_P_MASK + (1.0 - LEAST_P_MASK) * (1.0 - u[:, :1])
    else:
        p = torch.full_like(u[:, :1], p_mask)
    return u[:, 1:] < p, p


def mask_share(
    tokens: Tensor, samples: Tensor, *, seed: int, split: str, vocab_size: int, share: float
) -> tuple[Tensor, Tensor]:
    """Mask exactly int(share * T) tokens of each sequence, but at least one, and replace none.

    The other arguments and the result are those of :func:`corrupt`.
    """
    length = tokens.shape[1]
    words = random_words(seed, STREAMS[split], samples, 2 + 2 * length)
    n_mask = torch.full_like(samples, max(1, int(share * length)))
    return _apply(tokens, words[:, 2:], n_mask, torch.zeros_like(n_mask), vocab_size)


def _apply(
    tokens: Tensor, words: Tensor, n_mask: Tensor, n_replace: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    mask_id, length = vocab_size - 1, tokens.shape[1]
    order = words[:, :length].argsort(dim=1, stable=True)
    place = torch.arange(length, dtype=torch.int64, device=tokens.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)  # the inverse permutation
    is_masked = rank < n_mask[:, None]
    is_replaced = (rank < (n_mask + n_replace)[:, None]) & ~is_masked
    # One of the vocab_size - 2 other words: skipping the original keeps them equally likely.
    other = below(words[:, length:], vocab_size - 2)
    other = other + (other >= tokens).long()
    x = torch.where(is_masked, mask_id, torch.where(is_replaced, other, tokens))
    y = torch.where(is_replaced, mask_id, tokens)
    return x, y
