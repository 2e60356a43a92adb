"""From a causal mask to none: who may see whom in the first steps of a run that began as a causal model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from difftrain.config import Config


def visible(step: int, length: int, config: Config, device: torch.device) -> Tensor | None:
    """Which positions each one sees in this step, (length, length) bool; None where all see all.

    Each sees itself and those before it, and each later one with a probability that grows from 0 to 1 over
    ``causal_anneal_iters`` steps. It is a function of the seed and the step, so a resumed run sees the same.

    Source: Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (2024),
    attention mask annealing.
    """
    if step >= config.causal_anneal_iters:
        return None
    digest = hashlib.sha256(f"annealing {config.seed} {step}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    u = torch.rand(length, length, generator=generator, dtype=torch.float32, device="cpu")
    is_later = torch.ones(length, length, dtype=torch.bool, device="cpu").triu(1)
    return ((u < step / config.causal_anneal_iters) | ~is_later).to(device)
