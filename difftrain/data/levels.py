"""Levels: how much of each sequence is corrupted, a pure function of (seed, stream, sample index)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difftrain.data.philox import random_words, uniform


def draw_levels(
    words: Tensor, samples: Tensor, rule: str, *, seed: int, stream: int, n_strata: int
) -> Tensor:
    """One level in [0, 1) for each sample, (B,) fp32; under "cosine" in (0, 1].

    Args:
        words: (B,) 32-bit random words, the first of each sample in its stream.
        samples: (B,) int64 sample indices, on the words' device.
        rule: "uniform"; "cosine", which is cos(pi / 2 * u); "antithetic", where two samples that follow one another
            have u and 1 - u; or "stratified", where each ``n_strata`` samples have one level in each of as many
            equal parts.

    Source: cosine: MaskGIT (arXiv:2202.04200), section 3.3. Antithetic and stratified: variance reduction as in
    Kingma et al. (arXiv:2107.00630), appendix I.1, and MDLM.
    """
    if rule == "antithetic":
        first = uniform(random_words(seed, stream, samples - samples % 2, 1)[:, 0])
        # 1 - u would be 1 where u is 0.
        return torch.where(samples % 2 == 0, first, 1.0 - 2.0**-24 - first)
    u = uniform(words)
    if rule == "cosine":
        return torch.cos(math.pi / 2 * u)
    if rule == "stratified":
        # Each part has its place in the step drawn by the index alone: a step's samples follow one another.
        return ((samples % n_strata).float() + u) / n_strata
    return u


def weight_of_level(level: Tensor, rule: str) -> Tensor | float:
    """What a level drawn by ``rule`` weighs, so that the mean is that over uniform levels."""
    if rule != "cosine":
        return 1.0
    # The density of cos(pi / 2 * u) is 2 / (pi * sqrt(1 - level^2)).
    return math.pi / 2 * (1.0 - level.square()).clamp(min=0.0).sqrt()
