"""Samplers on token ids: fill [MASK]s step by step, or go on from left to right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difftrain.progress import progress

Logits = Callable[[Tensor], Tensor]


@torch.no_grad()
def fill(
    logits_of: Logits,
    x: Tensor,
    mask_id: int,
    *,
    max_steps: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    by_confidence: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace every [MASK] of ``x``; other positions stay as they are.

    As specified: repeat up to ``max_steps`` times, predict all positions, sample each, and fill
    those that are [MASK]; a sampled [MASK] stays one. What is left at the end is filled with
    [MASK] forbidden. With ``by_confidence`` each step may fill only its share of what is masked,
    the most probable samples first, and [MASK] is forbidden: a fixed budget of ``max_steps``.

    Args:
        logits_of: the model, ids (B, T) to logits (B, T, V), in evaluation mode.
        x: (B, T) int64; not modified.
        mask_id: id of [MASK].
        max_steps: passes of the model, at least 1 (the fill at the end is one more).
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: sample among this many most probable tokens; 0 among all.
        by_confidence: fill the most certain positions first.
        generator: source of randomness, on x's device.

    Returns:
        (B, T) int64 without any [MASK].

    Source: the specification, "Generation"; confidence order after MaskGIT (Chang et al., 2022).
    """
    x = x.clone()
    forbid = mask_id if by_confidence else None
    for step in progress(range(max_steps), what="sampling", unit="pass"):
        is_masked = x == mask_id
        if not is_masked.any():
            return x
        sampled, confidence = _sample(logits_of(x), temperature, top_k, forbid, generator)
        if by_confidence:
            left = is_masked.sum(1, keepdim=True)
            budget = -(-left // (max_steps - step))  # (B, 1), rounded up
            confidence = confidence.masked_fill(~is_masked, -1.0)
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            is_masked &= rank < budget
        x = torch.where(is_masked, sampled, x)
    is_masked = x == mask_id
    if is_masked.any():
        sampled, _ = _sample(logits_of(x), temperature, top_k, mask_id, generator)
        x = torch.where(is_masked, sampled, x)
    return x


@torch.no_grad()
def continue_causal(
    logits_of: Logits,
    x: Tensor,
    length: int,
    mask_id: int,
    *,
    block_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append tokens from left to right until ``x`` (B, T) has ``length`` columns: the gpt2 mode's sampler.

    The model sees the last ``block_size`` columns, at positions from 0 on: rotary positions count
    distances alone, and learned ones were trained on exactly these.

    Source: nanoGPT's ``generate``.
    """
    for _ in progress(range(length - x.shape[1]), what="sampling", unit="token"):
        sampled, _ = _sample(logits_of(x[:, -block_size:])[:, -1:], temperature, top_k, mask_id, generator)
        x = torch.cat((x, sampled), dim=1)
    return x


def _sample(
    logits: Tensor, temperature: float, top_k: int, forbid: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token for each position of (B, T, V) logits, and its probability: (B, T) each."""
    logits = logits.float()
    if forbid is not None:
        logits[..., forbid] = -torch.inf
    if temperature == 0:
        confidence, token = logits.softmax(-1).max(-1)
        return token, confidence
    # From the largest on, so that a temperature near 0 gives -inf and never inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    p = logits.softmax(-1)
    token = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
    return token, p.gather(-1, token[..., None]).squeeze(-1)
