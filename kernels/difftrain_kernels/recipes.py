"""Losses of other masked-diffusion trainings, as options of ours: weights of tokens and a divisor.

Each function gives keyword arguments for any of the losses::

    loss = fused_diffusion_loss(logits, tokens, x, mask_id, **recipes.llada(is_masked, p_mask))

y is the clean text (or ``ignore_index`` outside it), x the masked one. Nothing waits for the device:
divisors that depend on the batch are 0-d tensors on it, and a batch in which no position counts gives
loss 0. Whoever accumulates over micro-batches or processes passes the divisor of all of them as
``normalizer`` instead: ``fused_diffusion_loss(..., **recipe | {"normalizer": n})``.

| recipe | positions that count | weight of one | divided by |
|---|---|---|---|
| :func:`specification` | all | by case: pk, pm | all positions |
| :func:`llada` | masked | 1 / p_mask | all positions |
| :func:`llada_sft` | masked outside the prompt | 1 / p_mask | the answer's length, and sequences |
| :func:`mdlm` | masked and supervised | -alpha'(t) / (1 - alpha(t)) | supervised tokens, or sequences |
| :func:`nemo` | masked and supervised | 1 / p_mask, p_mask at least 1e-8 | supervised tokens of the step |
| :func:`bd3lm` | masked and supervised | as MDLM, t drawn per block | as MDLM |
| :func:`i_dlm` | masked, and clean | 1, and alpha | each kind by its own number |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .validation import check_choice

SCHEDULES = ("linear", "log-linear", "cosine")
NORMALIZATIONS = ("token", "sequence", "batch")


def specification(pk: float | Tensor = 0.25, pm: float | Tensor = 0.5) -> dict:
    """Every position counts, at the penalties of the curriculum's step.

    Source: the specification's ``diffusion_loss_function``.
    """
    return {"pk": pk, "pm": pm}


def llada(is_masked: Tensor, p_mask: Tensor) -> dict:
    """LLaDA's pre-training: cross-entropy of masked positions over the probability of masking them.

    Args:
        is_masked: (B, T) bool, which positions of x are [MASK].
        p_mask: (B, 1) or (B, T), the probability with which they became so.

    Source: arXiv:2502.09992, equation 3; its divisor is all B * T positions.
    """
    return {"token_weights": is_masked / p_mask}


def llada_sft(is_masked: Tensor, p_mask: Tensor, is_prompt: Tensor) -> dict:
    """LLaDA's fine-tuning: the prompt does not count, and each answer weighs alike whatever its length.

    Args:
        is_prompt: (B, T) bool.

    Source: arXiv:2502.09992, equation 5, with the answer's length and the batch as divisors.
    """
    length = (~is_prompt).sum(-1, keepdim=True).clamp(min=1)
    weights = (is_masked & ~is_prompt) / (p_mask * length)
    return {"token_weights": weights, "normalizer": float(len(is_masked))}


def schedule_weight(t: Tensor, schedule: str = "linear") -> Tensor:
    """-alpha'(t) / (1 - alpha(t)), the weight of a masked position at time t in (0, 1].

    "linear" is alpha = 1 - t, so 1 / t; MDLM calls it "log-linear", after its noise -log(alpha).
    "cosine" is alpha = 1 - cos(pi / 2 * (1 - t)).

    Source: MDLM (arXiv:2406.07524), equation 10; the schedules as dllm has them.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))
    return 1 / t


def mdlm(
    is_masked: Tensor,
    t: Tensor,
    *,
    schedule: str = "linear",
    is_supervised: Tensor | None = None,
    normalization: str = "token",
    is_weighted: bool = True,
) -> dict:
    """MDLM's bound, and dllm's trainer of that name with its three normalisations.

    [MASK] has probability zero (``forbid_mask``), as MDLM's parameterisation wants it; dllm leaves it
    in: ``mdlm(...) | {"forbid_mask": False}``.

    Args:
        t: (B, 1) or (B, T), the time at which each position was masked.
        schedule: of :func:`schedule_weight`.
        is_supervised: (B, T) bool, positions that may count; all by default.
        normalization: "token", over the batch's supervised tokens; "sequence", over each sequence's, and
            then over sequences; "batch", over sequences alone.
        is_weighted: False for weights of 1, dllm's ``loss_weight_type="uniform"``.

    Source: arXiv:2406.07524, equation 10 (in continuous time); dllm's ``MDLMTrainer``.
    """
    check_choice("normalization", normalization, NORMALIZATIONS)
    is_supervised = torch.ones_like(is_masked) if is_supervised is None else is_supervised
    weights = schedule_weight(t, schedule) if is_weighted else torch.ones_like(t)
    weights = torch.where(is_masked & is_supervised, weights, 0)
    if normalization == "sequence":
        weights = weights / is_supervised.sum(-1, keepdim=True).clamp(min=1)
    normalizer = is_supervised.sum() if normalization == "token" else float(len(is_masked))
    return {"token_weights": weights, "normalizer": normalizer, "forbid_mask": True}


def nemo(
    is_masked: Tensor,
    p_mask: Tensor,
    n_supervised: float | Tensor,
    is_supervised: Tensor | None = None,
) -> dict:
    """NeMo Automodel's MDLM loss: 1 / p_mask over the supervised tokens of the whole step.

    Args:
        n_supervised: supervised tokens over all micro-batches and processes.

    Source: NeMo Automodel's dLLM losses, p_mask clamped at 1e-8.
    """
    counts = is_masked if is_supervised is None else is_masked & is_supervised
    return {"token_weights": counts / p_mask.clamp(min=1e-8), "normalizer": n_supervised}


def bd3lm(is_masked: Tensor, t: Tensor, **options) -> dict:
    """BD3-LM: MDLM's loss with a time for each block of a sequence.

    Args:
        t: (B, n_blocks); T must be a multiple of n_blocks.
        options: of :func:`mdlm`.

    Source: Block diffusion (arXiv:2503.09573), equation 8.
    """
    return mdlm(is_masked, t.repeat_interleave(is_masked.shape[-1] // t.shape[-1], dim=-1), **options)


def i_dlm(is_masked: Tensor, alpha: float | Tensor = 0.2) -> dict:
    """I-DLM: the mean over masked positions plus alpha times the mean over clean ones.

    Args:
        alpha: weight of the clean positions' mean; balanced by hand from the two losses, if wanted, with
            ``return_cases``.

    Source: I-DLM's training loss: masked and clean positions, each divided by its own number.
    """
    n_masked = is_masked.sum().clamp(min=1)
    n_clean = (~is_masked).sum().clamp(min=1)
    return {"token_weights": torch.where(is_masked, 1 / n_masked, alpha / n_clean), "normalizer": 1.0}
