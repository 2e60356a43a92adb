"""Schedules: pure functions of the optimiser step, and the tensors in which a compiled step reads them."""

from __future__ import annotations

import math

import torch

from difftrain.config import Config


def masking_penalties(step: int, config: Config) -> tuple[float, float]:
    """The penalties of a step: (pk for a kept [MASK], pm for a masked correct word).

    With r = step / masking_warmup_iters they move linearly, pk = 1 + r * (penalty_keep_mask - 1)
    and pm = r * penalty_mask_correct, and stay at their configured values from the end of the
    warmup on; a warmup of 0 means from the first step. Where no target is [MASK], in gpt2 mode and
    under the recipes that mask alone, both are 1.

    Args:
        step: optimiser step, counted from 0.
        config: the run's configuration.

    Source: the specification's ``get_masking_penalties``.
    """
    if not config.has_penalties:
        return 1.0, 1.0
    if step >= config.masking_warmup_iters:
        return config.penalty_keep_mask, config.penalty_mask_correct
    ratio = step / config.masking_warmup_iters
    return 1.0 + ratio * (config.penalty_keep_mask - 1.0), ratio * config.penalty_mask_correct


get_masking_penalties = masking_penalties


class PenaltyTensors:
    """The penalties in two 0-d fp32 tensors, for steps that are compiled or captured in a CUDA graph.

    Such a step takes a number for a constant: the graph would be compiled again for another one, or
    replay the one it saw. These two tensors stay the same; what they hold changes with the step.

    Args:
        device: where the loss is computed.

    Attributes:
        pk, pm: 0-d fp32 tensors, NaN before the first :meth:`update`.
    """

    def __init__(self, device: torch.device | str) -> None:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
            self.pk, self.pm = (
                torch.full((), math.nan, dtype=torch.float32, device=device) for _ in range(2)
            )

    def update(self, step: int, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
        """Set both to :func:`masking_penalties` of a step, in place, and return (pk, pm).

        Two fills on the device's current stream, which carry the numbers as arguments: nothing is
        copied from the host, and nothing waits.
        """
        pk, pm = masking_penalties(step, config)
        return self.pk.fill_(pk), self.pm.fill_(pm)


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
