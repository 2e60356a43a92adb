"""What a model does to a text with errors: which it finds, what it makes of them, what it harms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difftrain.errors import UserError
from difftrain.sampling.loaded import Loaded

BATCH = 64  # windows a pass
HARMED = 0.01  # of the right words: the price at which "found at 1 % harmed" is taken


def found_at(model: Loaded, clean: Tensor, wrong: Tensor, harmed: float = HARMED) -> float:
    """The share of wrong words under more suspicion than all but a share ``harmed`` of the right ones.

    The suspicion of a word is that of ``difftrain repair``: what the model gives to anything else at its place. No
    threshold of the model's own enters, so models that answer [MASK] more or less readily can be compared.

    Args:
        clean, wrong: (W, T) int64, the windows before and after errors were planted.
    """
    suspicion = []
    for x in wrong.split(BATCH):
        p = model.logits(x).softmax(-1)
        suspicion.append(1.0 - p.gather(-1, x[..., None])[..., 0])
    values, is_wrong = torch.cat(suspicion).double(), clean != wrong
    limit = values[~is_wrong].quantile(1.0 - harmed)
    return (values[is_wrong] > limit).double().mean().item()


def repaired(model: Loaded, clean: Tensor, wrong: Tensor, **options: Any) -> dict[str, float]:
    """The :func:`outcome` of what ``model.repair`` makes of windows with errors; arguments as there and for it."""
    return outcome(clean, wrong, rewritten(model, wrong, **options))


def rewritten(model: Loaded, wrong: Tensor, **options: Any) -> Tensor:
    """Consecutive windows of a text (W, T) int64 after ``model.repair``, which takes the options.

    Raises:
        UserError: the repaired text is cut into words otherwise than before, so places do not correspond.
    """
    words = model.tokenizer
    text = model.repair(words.decode_words(wrong.flatten().tolist()), **options).text
    after = torch.tensor(words.encode(text), dtype=torch.int64, device="cpu")
    if len(after) != wrong.numel():
        raise UserError(
            "the vocabulary cuts the repaired text into other words; this measure needs characters"
        )
    return after.view_as(wrong)


def outcome(clean: Tensor, wrong: Tensor, after: Tensor) -> dict[str, float]:
    """How a repair went, as shares.

    Args:
        clean, wrong, after: (W, T) int64, a text before and after errors were planted, and repaired.

    Returns:
        ``wrong_before`` and ``wrong_after``, shares of all words; ``put_right`` and ``touched``, the shares of the wrong
        words that are right afterwards, and that are changed; ``harmed``, the share of right words that are wrong now.
    """
    is_wrong = clean != wrong
    return {
        "wrong_before": _mean(is_wrong),
        "wrong_after": _mean(after != clean),
        "put_right": _mean((after == clean)[is_wrong]),
        "touched": _mean((after != wrong)[is_wrong]),
        "harmed": _mean((after != clean)[~is_wrong]),
    }


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
