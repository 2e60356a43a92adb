"""How good written texts are: words that exist, no dull repetition, and what another model thinks of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from difftrain.evaluation.likelihood import score_causal
from difftrain.evaluation.windows import Windows, ratio
from difftrain.loss import bent_logits
from difftrain.runtime import Runtime
from difftrain.sampling.loaded import Loaded

WORD = re.compile("[A-Za-z]{3,}")
GRAM = 6  # characters
BATCH = 64  # texts a pass


def words_of(text: str) -> list[str]:
    """The runs of three or more letters, without one that the text's beginning or end may have cut."""
    found = WORD.finditer(text)
    return [m.group() for m in found if m.start() > 0 and m.end() < len(text)]


def known_words(texts: Sequence[str], known: set[str]) -> float:
    """The share of the texts' words that are among ``known``; NaN where there are none."""
    words = [word for text in texts for word in words_of(text)]
    return sum(word in known for word in words) / len(words) if words else float("nan")


def distinct_grams(texts: Sequence[str], n: int = GRAM) -> float:
    """Different runs of n characters by all of them: 1 where nothing is said twice. Falls with the texts' number."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def nll_under(judge: Loaded, tokens: Tensor) -> float:
    """Nats a token of texts (B, T) int64 under a model of gpt2 mode, without each one's first; T - 1 <= block_size."""
    mask_id = judge.tokenizer.mask_id
    numbers = torch.arange(len(tokens), dtype=torch.int64, device="cpu")
    device = judge.module.head.weight.device
    nats = score_causal(
        bent_logits(judge.module, mask_id, judge.config),
        Windows(list(tokens), numbers, len(tokens)),
        mask_id,
        runtime=Runtime(device, torch.float32, 0, 1),
        batch_size=BATCH,
    )
    return ratio(nats, torch.full_like(nats, tokens.shape[1] - 1)).value


def quality(
    tokens: Tensor, decode: Callable[[list[int]], str], judge: Loaded, known: set[str]
) -> dict[str, float | None]:
    """All of it for texts (B, T) int64 in the judge's vocabulary; None where there is nothing to count."""
    texts = [decode(row) for row in tokens.tolist()]
    figures = {
        "known_words": known_words(texts, known),
        "distinct": distinct_grams(texts),
        "judge_nll": nll_under(judge, tokens),
    }
    return finite(figures)


def finite(figures: dict[str, float | None]) -> dict[str, float | None]:
    """Figures for JSON: None for those that are not finite."""
    return {name: v if v is not None and math.isfinite(v) else None for name, v in figures.items()}
