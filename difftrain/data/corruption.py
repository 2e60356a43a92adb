"""Corruption: clean tokens -> (x, y), a pure function of the tokens and each sample's index."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from difftrain.config import Config
from difftrain.config.schedules import CORRUPTION
from difftrain.data.levels import draw_levels
from difftrain.data.philox import random_words, uniform
from difftrain.data.replacement import other_words

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
    counts: Tensor | None = None,
    changes: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x and y as the run's options have them, and p_mask (B, 1) where words are masked alone, else None.

    Args:
        tokens, samples, split, vocab_size: those of :func:`corrupt`.
        level: how much instead of as in training: the largest corruption, or p_mask where it masks alone.
        counts: of each word in the training text, where ``replacement`` is "unigram".
        changes: values of ``guaranteed_correct_factor``, ``mask_factor`` and ``replace_factor`` in place of the
            configuration's.
    """
    how = {name: changes.get(name, getattr(config, name)) for name in CORRUPTION}
    keys = {"seed": config.seed, "split": split, "vocab_size": vocab_size}
    keys |= _mask_options(config)
    if config.recipe != "specification":
        return mask_alone(tokens, samples, p_mask=level, **keys)
    x, y = corrupt(
        tokens,
        samples,
        max_corruption=1.0 - how["guaranteed_correct_factor"] if level is None else level,
        mask_factor=how["mask_factor"],
        replace_factor=how["replace_factor"],
        counts=counts if config.replacement == "unigram" else None,
        wrong_target=config.wrong_target,
        **keys,
    )
    return x, y, None


def corrupt(
    tokens: Tensor,
    samples: Tensor,
    *,
    seed: int,
    split: str,
    vocab_size: int,
    max_corruption: float | Tensor,
    mask_level: str = "uniform",
    n_strata: int = 1,
    mask_factor: float = 1.0,
    replace_factor: float = 1.0,
    span_length: int = 1,
    counts: Tensor | None = None,
    wrong_target: str = "mask",
) -> tuple[Tensor, Tensor]:
    """Mask some tokens and replace others by wrong words, as training does.

    With M = max_corruption and U, U' uniform in [0, 1): the mask rate is U*M, the replacement
    rate U'*(M - mask rate); counts are truncated to integers. The first positions of a random
    permutation become [MASK] (target: the original), the next ones a different word (target:
    [MASK]); the rest stay (target: the token itself). The other arguments change this.

    Args:
        tokens: (B, T) int64 data words in [0, vocab_size - 1); not modified.
        samples: (B,) int64 index of each sequence in its split, on the tokens' device.
        seed: run seed.
        split: "train" or "val".
        vocab_size: data words and [MASK], which is the last id; at least 3.
        max_corruption: M, one for all or (B,) fp32.
        mask_level, n_strata: how U is drawn: the ``rule`` of :func:`difftrain.data.levels.draw_levels`.
        mask_factor, replace_factor: of the mask rate, and of the replacement rate.
        span_length: so many tokens that follow one another stand together in the permutation.
        counts: (vocab_size - 1,) int64: how likely each wrong word is; by default all are alike.
        wrong_target: "mask", or "token": the target of a wrong word is the original.

    Returns:
        x, y: (B, T) int64, what the model sees and what it should answer. A sample's result
        depends on (seed, split, its index) and its tokens, not on the batch it came in.

    Source: the specification, "Corruption"; what changes it is an addition.
    """
    length = tokens.shape[1]
    stream = STREAMS[split]
    words = random_words(seed, stream, samples, 2 + 2 * length)
    u_mask = draw_levels(words[:, 0], samples, mask_level, seed=seed, stream=stream, n_strata=n_strata)
    u_replace = uniform(words[:, 1])
    mask_rate = u_mask * max_corruption * mask_factor
    replace_rate = u_replace * (max_corruption - mask_rate) * replace_factor
    n_mask = (length * mask_rate).long()
    n_replace = (length * replace_rate).long()
    return _apply(tokens, words[:, 2:], n_mask, n_replace, vocab_size, span_length, counts, wrong_target)


def mask_alone(
    tokens: Tensor,
    samples: Tensor,
    *,
    seed: int,
    split: str,
    vocab_size: int,
    p_mask: float | None = None,
    mask_level: str = "uniform",
    n_strata: int = 1,
    span_length: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask each token independently, with one probability for its sequence, and replace none.

    With a level in (0, 1] the probability is 0.001 + 0.999 * level. It need not mask any token.

    Args:
        tokens, samples, seed, split, vocab_size: those of :func:`corrupt`, which draws other numbers.
        p_mask: the probability instead, for all sequences.
        mask_level, n_strata: how the level is drawn, as for :func:`corrupt`.
        span_length: so many tokens that follow one another are masked together, or not at all.

    Returns:
        x, y: (B, T) int64; the target of every position is its token.
        p_mask: (B, 1) fp32. A sample's result depends on what that of :func:`corrupt` depends on.

    Source: LLaDA (arXiv:2502.09992), algorithm 1, with the smallest probability of its guidelines.
    """
    options = {"p_mask": p_mask, "mask_level": mask_level, "n_strata": n_strata, "span_length": span_length}
    is_masked, p = _masks(samples, tokens.shape[1], seed=seed, split=split, **options)
    return torch.where(is_masked, vocab_size - 1, tokens), tokens, p


def count_masked(samples: Tensor, config: Config, *, split: str) -> int:
    """How many tokens :func:`corrupt_by_recipe` masks in all where it masks alone, told without their device.

    Args:
        samples: (B,) int64 index of each sequence in its split, on the CPU, which draws the same numbers.
    """
    is_masked, _ = _masks(
        samples, config.block_size, seed=config.seed, split=split, **_mask_options(config)
    )
    return int(is_masked.sum())


def _mask_options(config: Config) -> dict[str, Any]:
    return {
        "mask_level": config.mask_level,
        "n_strata": config.global_batch_size,
        "span_length": config.span_length,
    }


def _masks(
    samples: Tensor,
    length: int,
    *,
    seed: int,
    split: str,
    mask_level: str,
    n_strata: int,
    span_length: int,
    p_mask: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens of each sequence become [MASK] (B, T), and with what probability (B, 1)."""
    stream = MASKING_STREAMS[split]
    words = random_words(seed, stream, samples, 2 + length)
    if p_mask is None:
        level = draw_levels(words[:, 0], samples, mask_level, seed=seed, stream=stream, n_strata=n_strata)
        if mask_level != "cosine":
            level = 1.0 - level  # in (0, 1]
        p = LEAST_P_MASK + (1.0 - LEAST_P_MASK) * level[:, None]
    else:
        p = torch.full((len(samples), 1), p_mask, dtype=torch.float32, device=samples.device)
    u = uniform(_shared_in_spans(words[:, 1:-1], words[:, -1], span_length))
    return u < p, p


def mask_share(
    tokens: Tensor, samples: Tensor, *, seed: int, split: str, vocab_size: int, share: float
) -> tuple[Tensor, Tensor]:
    """Mask exactly int(share * T) tokens of each sequence, but at least one, and replace none.

    The other arguments and the result are those of :func:`corrupt`.
    """
    n_mask = torch.full_like(samples, max(1, int(share * tokens.shape[1])))
    words = random_words(seed, STREAMS[split], samples, 2 + 2 * tokens.shape[1])
    return _apply(tokens, words[:, 2:], n_mask, torch.zeros_like(n_mask), vocab_size)


def replace_share(
    tokens: Tensor,
    samples: Tensor,
    *,
    seed: int,
    split: str,
    vocab_size: int,
    share: float,
    wrong_target: str = "mask",
) -> tuple[Tensor, Tensor]:
    """Replace exactly int(share * T) tokens of each sequence by other words, but at least one, and mask none.

    The other arguments and the result are those of :func:`corrupt`.
    """
    n_replace = torch.full_like(samples, max(1, int(share * tokens.shape[1])))
    words = random_words(seed, STREAMS[split], samples, 2 + 2 * tokens.shape[1])
    return _apply(
        tokens, words[:, 2:], torch.zeros_like(n_replace), n_replace, vocab_size, wrong_target=wrong_target
    )


def _apply(
    tokens: Tensor,
    words: Tensor,
    n_mask: Tensor,
    n_replace: Tensor,
    vocab_size: int,
    span_length: int = 1,
    counts: Tensor | None = None,
    wrong_target: str = "mask",
) -> tuple[Tensor, Tensor]:
    mask_id, length = vocab_size - 1, tokens.shape[1]
    rank = ranks_of(_shared_in_spans(words[:, :length], words[:, length], span_length))
    is_masked = rank < n_mask[:, None]
    is_replaced = (rank < (n_mask + n_replace)[:, None]) & ~is_masked
    other = other_words(tokens, words[:, length:], mask_id, counts)
    x = torch.where(is_masked, mask_id, torch.where(is_replaced, other, tokens))
    y = torch.where(is_replaced, mask_id, tokens) if wrong_target == "mask" else tokens
    return x, y


def ranks_of(words: Tensor) -> Tensor:
    """The place of each position of (B, T) in the permutation that its random words give."""
    order = words.argsort(dim=1, stable=True)
    place = torch.arange(words.shape[1], dtype=torch.int64, device=words.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)  # the inverse permutation


def _shared_in_spans(words: Tensor, offset: Tensor, span_length: int) -> Tensor:
    """Random words (B, T) such that those of each ``span_length`` positions, beginning anywhere, are equal."""
    if span_length == 1:
        return words
    place = torch.arange(words.shape[1], dtype=torch.int64, device=words.device)
    span = (place + (offset % span_length)[:, None]) // span_length
    return words.gather(1, span.clamp(max=words.shape[1] - 1))
