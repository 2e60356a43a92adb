"""How likely a model finds a text: a bound by masking it in diffusion mode, the value itself in gpt2 mode.

Formulas, and what may be compared with what: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from difftrain.data.corruption import ranks_of
from difftrain.data.philox import random_words, uniform
from difftrain.evaluation.windows import Windows, score_all
from difftrain.runtime import Runtime
from difftrain_kernels import fused_diffusion_loss

ESTIMATORS = ("mdlm", "llada")
STREAMS = {"mdlm": 7, "llada": 8}  # Philox streams; those of windows and corruption are in data/


def bound_masked(
    logits_of: Callable[[Tensor], Tensor],
    windows: Windows,
    mask_id: int,
    *,
    estimator: str,
    draws: int,
    seed: int,
    runtime: Runtime,
    batch_size: int,
) -> Tensor:
    """An upper bound of each window's negative log-likelihood in nats: (W, draws) fp64, its unbiased estimates.

    Each draw masks a window anew and takes the mean over them; [MASK] takes no part in the softmax. Draw d
    of D has its level in the d-th of D equal strata.

    Args:
        logits_of: from ids (B, T) to logits (B, T, V).
        windows: with tokens that are data words alone.
        estimator: "mdlm" masks each token with probability t, t uniform in (0, 1], and weighs the sum of
            the masked tokens' cross-entropies by 1 / t; "llada" masks exactly l of L tokens, l uniform in
            1 .. L, and weighs it by L / l. Both have the same mean.
        seed: of the draws; a window's numbers depend on it, on the window's place in the text and on the draw.

    Source: MDLM (arXiv:2406.07524), equation 11 with the linear schedule; LLaDA (arXiv:2502.09992), equation 6.
    """

    def score(chosen: list[int], draw: list[int]) -> Tensor:
        tokens, numbers = windows.stack(chosen)
        which = torch.tensor(draw, dtype=torch.int64, device="cpu")
        x, weight = _masked(tokens, numbers * draws + which, which, mask_id, estimator, draws, seed)
        nll = _nll_sums(logits_of, x, tokens, x == mask_id, mask_id, runtime)
        return (nll * weight)[:, None]

    title = f"likelihood, {estimator}"
    return score_all(windows, draws, score, runtime=runtime, batch_size=batch_size, title=title)[..., 0]


def _masked(
    tokens: Tensor, samples: Tensor, draw: Tensor, mask_id: int, estimator: str, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """x (B, T), and the weight (B,) fp64 of the sum of its masked tokens' cross-entropies."""
    length = tokens.shape[1]
    words = random_words(seed, STREAMS[estimator], samples, 1 + length)
    # In (0, 1]: 1 - u of 24 bits is never 0.
    level = (draw + 1.0 - uniform(words[:, 0]).double()) / draws
    if estimator == "mdlm":
        return torch.where(uniform(words[:, 1:]).double() < level[:, None], mask_id, tokens), 1.0 / level
    n_masked = (level * length).ceil().clamp(min=1)
    return torch.where(ranks_of(words[:, 1:]) < n_masked[:, None], mask_id, tokens), length / n_masked


def score_causal(
    logits_of: Callable[[Tensor], Tensor],
    windows: Windows,
    mask_id: int,
    *,
    runtime: Runtime,
    batch_size: int,
) -> Tensor:
    """Each window's negative log-likelihood in nats, without its first token, which nothing predicts: (W,) fp64."""

    def score(chosen: list[int], _: list[int]) -> Tensor:
        tokens, _ = windows.stack(chosen)
        x, y = tokens[:, :-1], tokens[:, 1:]
        return _nll_sums(logits_of, x, y, torch.ones_like(x, dtype=torch.bool), mask_id, runtime)[:, None]

    return score_all(windows, 1, score, runtime=runtime, batch_size=batch_size, title="likelihood")[:, 0, 0]


def _nll_sums(
    logits_of: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    counts: Tensor,
    mask_id: int,
    runtime: Runtime,
) -> Tensor:
    """The cross-entropies of each sequence's positions that count, added up: (B,) fp64."""
    x, y, counts = (t.to(runtime.device) for t in (x, y, counts))
    with torch.no_grad(), runtime.autocast():
        logits = logits_of(x)
        nll = fused_diffusion_loss(
            logits, y, x, mask_id, reduction="none", token_weights=counts, forbid_mask=True
        )
    return nll.cpu().double().sum(1)
