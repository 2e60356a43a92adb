"""Schedules: pure functions of the optimiser step."""

from __future__ import annotations

import math

from difftrain.config import Config


def masking_penalties(step: int, config: Config) -> tuple[float, float]:
    """The penalties of a step: (pk for a kept [MASK], pm for a masked correct word).

    With r = step / masking_warmup_iters they move linearly, pk = 1 + r * (penalty_keep_mask - 1)
    and pm = r * penalty_mask_correct, and stay at their configured values from the end of the
    warmup on; a warmup of 0 means from the first step. In gpt2 mode nothing is masked, and both
    are 1.

    Args:
        step: optimiser step, counted from 0.
        config: the run's configuration.

    Source: the specification's ``get_masking_penalties``.
    """
    if config.mode == "gpt2":
        return 1.0, 1.0
    if step >= config.masking_warmup_iters:
        return config.penalty_keep_mask, config.penalty_mask_correct
    ratio = step / config.masking_warmup_iters
    return 1.0 + ratio * (config.penalty_keep_mask - 1.0), ratio * config.penalty_mask_correct


get_masking_penalties = masking_penalties


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of a step: linear warmup, cosine decay to ``min_lr``, then constant.

    Source: nanoGPT's ``get_lr``.
    """
    if not config.decay_lr:
        return config.learning_rate
    last = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= last:
        return config.min_lr
    done = (step - config.warmup_iters) / (last - config.warmup_iters)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)
