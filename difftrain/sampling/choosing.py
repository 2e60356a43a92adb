"""From logits to words: temperature, top_k, top_p, min_p, repetition; and randomness of each sample's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.data.philox import random_words, uniform
from difftrain.errors import UserError, real_number, whole_number

STREAM = 9  # Philox stream; those of data and evaluation are below it
REPETITION_WINDOW = 32  # places before a word in which the same one counts as repeated


@dataclass(frozen=True)
class Choice:
    """How a word is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely word.
        top_k: only this many most likely words; 0: all.
        top_p: only the most likely words that together hold this much; 1: all.
        min_p: only words at least this share as likely as the most likely one; 0: all.
        repetition: divides the odds of each word that stands within REPETITION_WINDOW places before; 1: nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 0))
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be finite and at least 0, got {self.temperature}")
        for name, low_is_open in (("top_p", True), ("min_p", False)):
            value = getattr(self, name)
            if not (0 < value <= 1 if low_is_open else 0 <= value <= 1):
                raise UserError(f"{name} must be in {'(' if low_is_open else '['}0, 1], got {value}")
        if not 1 <= self.repetition < float("inf"):
            raise UserError(f"repetition must be finite and at least 1, got {self.repetition}")


def choose(
    logits: Tensor, choice: Choice, u: Tensor, recent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A word for each row of logits (n, V) fp32, and the probability it was drawn with: (n,) int64, (n,) fp32.

    Args:
        u: (n,), a random number in [0, 1) for each row; not read at temperature 0.
        recent: as for :func:`probabilities`.
    """
    if choice.temperature == 0:
        p, word = _without_repetition(logits, choice, recent).softmax(-1).max(-1)
        return word, p
    q = probabilities(logits, choice, recent)
    word = draw(q, u)
    return word, q.gather(-1, word[:, None]).squeeze(-1)


def probabilities(logits: Tensor, choice: Choice, recent: Tensor | None = None) -> Tensor:
    """What a word is drawn from, (n, V) fp32, at a temperature above 0.

    Args:
        logits: (n, V); not modified.
        recent: (n, V) bool, the words that ``repetition`` counts against.
    """
    # From the largest on, so that a temperature near 0 gives -inf and never inf.
    logits = _without_repetition(logits.float(), choice, recent)
    logits = logits - logits.amax(-1, keepdim=True)
    if choice.temperature not in (0, 1):
        logits = logits / choice.temperature
    if 0 < choice.top_k < logits.shape[-1]:
        smallest = logits.topk(choice.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    p = logits.softmax(-1)
    if choice.min_p > 0:
        p = p.masked_fill(p < choice.min_p * p.amax(-1, keepdim=True), 0.0)
    if choice.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        # A word stays while those before it hold less than top_p of what is left.
        before = ordered.cumsum(-1) - ordered
        is_out = before >= choice.top_p * ordered.sum(-1, keepdim=True)
        p = p.masked_fill(torch.zeros_like(is_out).scatter_(-1, order, is_out), 0.0)
    return p / p.sum(-1, keepdim=True)


def _without_repetition(logits: Tensor, choice: Choice, recent: Tensor | None) -> Tensor:
    if recent is None or choice.repetition == 1:
        return logits
    return torch.where(recent, logits - math.log(choice.repetition), logits)


def recent_words(x: Tensor, where: Tensor, mask_id: int) -> Tensor:
    """Which words stand within REPETITION_WINDOW places before each position ``where`` (B, T) of x: (n, V) bool."""
    before = torch.nn.functional.pad(x, (REPETITION_WINDOW, 0), value=mask_id)
    before = before.unfold(1, REPETITION_WINDOW, 1)[:, : x.shape[1]][where]
    recent = torch.zeros(len(before), mask_id + 1, dtype=torch.bool, device=x.device)
    recent.scatter_(1, before, True)
    recent[:, mask_id] = False
    return recent


def draw(p: Tensor, u: Tensor) -> Tensor:
    """A word for each row of p (n, V) by its own random number u (n,) in [0, 1): (n,) int64."""
    ends = p.double().cumsum(-1)
    place = u.double() * ends[:, -1]
    # Words of probability 0 are never taken: the first end above the place.
    return (ends <= place[:, None]).sum(-1).clamp(max=p.shape[-1] - 1)


def random_numbers(seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    """Numbers in [0, 1) for each position of each sample in one pass: (B, length) fp32.

    They depend on the seed, the sample's index, the pass and the position alone, not on the batch.

    Args:
        samples: (B,) int64, below 2^31.
    """
    return uniform(random_words(seed, STREAM, samples + (step << 31), length))
