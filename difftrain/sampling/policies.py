"""Policies: which words are written in a pass, and which go back to [MASK].

| name | a pass writes | sends back |
|---|---|---|
| ``fill`` | a draw at every [MASK], which may be [MASK] again: the specification's | - |
| ``confidence`` | the words drawn with the highest probability | - |
| ``margin`` | where the best word is furthest from the second | - |
| ``entropy`` | where the model is least undecided | - |
| ``ancestral`` | each [MASK] with the probability of the reverse process | - |
| ``remask`` | as ``confidence`` | words that the model answers with [MASK], as it was trained to |
| ``remask_untrained`` | as ``confidence`` | the words that the model now finds least likely |
| ``edit`` | as ``confidence``, and over words that another one beats | - |

docs/sampling.md says which is for what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difftrain.errors import UserError
from difftrain.sampling.settling import Pass, Policy, State

SCHEDULES = ("linear", "cosine")


class Fill(Policy):
    """Source: the specification, "Generation"."""

    may_write_mask = True

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        return is_masked, torch.zeros_like(is_masked)


@dataclass(frozen=True)
class Ordered(Policy):
    """The positions with the best scores first, as many a pass as a schedule leaves.

    Attributes:
        by: "confidence", "margin" or "entropy".
        schedule: "linear": each pass the same share; "cosine": few at first (MaskGIT).

    Source: MaskGIT (arXiv:2202.04200), section 3.2; margin and entropy: Kim et al. (arXiv:2502.06768), Dream.
    """

    by: str = "confidence"
    schedule: str = "linear"

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        return self._best(seen, is_masked), torch.zeros_like(is_masked)

    def _best(self, seen: Pass, is_masked: Tensor) -> Tensor:
        left = is_masked.sum(1, keepdim=True)
        score = seen.spread(self._score(seen), -torch.inf).masked_fill(~is_masked, -torch.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        return is_masked & (rank < self._quota(left, seen.step, seen.steps))

    def _quota(self, left: Tensor, step: int, steps: int) -> Tensor:
        """How many of ``left`` (B, 1) this pass writes, at least one."""
        if self.schedule == "linear":
            return -(-left // (steps - step))
        now, then = (math.cos(math.pi / 2 * s / steps) for s in (step, step + 1))
        return (left * (1 - then / now)).ceil().long().clamp(min=1)

    def _score(self, seen: Pass) -> Tensor:
        if self.by == "confidence":
            return seen.p
        p = seen.p_words
        if self.by == "entropy":
            return torch.special.xlogy(p, p).sum(-1)
        best = p.topk(min(2, p.shape[-1]), dim=-1).values
        return best[:, 0] - best[:, -1]


class Ancestral(Policy):
    """Each [MASK] is revealed with probability 1 / (passes left): the posterior of linear masking at equal times.

    Source: MDLM (arXiv:2406.07524), equation 7 with alpha = 1 - t.
    """

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        fills = seen.spread(seen.chance, 1.0) < 1.0 / (seen.steps - seen.step)
        return is_masked & fills, torch.zeros_like(is_masked)


@dataclass(frozen=True)
class Remask(Ordered):
    """As confidence, and words that were written before go back to [MASK] where the model suspects them.

    A position goes back ``most_returns`` times at most, and none in the last two passes, so that every word is
    written by a pass that sees the others. What was given never goes back.

    Attributes:
        suspect: the probability of [MASK] above which a word goes back; trained: the model was taught to answer
            a wrong word with [MASK].
        is_trained: False for going by the word's own probability instead, below ``doubt``: what is done with models
            that were never taught (ReMDM; Yao 2026).
    """

    suspect: float = 0.5
    is_trained: bool = True
    doubt: float = 0.1
    most_returns: int = 2

    def asks_for(self, state: State, is_masked: Tensor) -> Tensor:
        return is_masked | self._may_return(state)

    def _may_return(self, state: State) -> Tensor:
        return state.is_active & (state.since >= 0) & (state.returns < self.most_returns)

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        goes_back = torch.zeros_like(is_masked)
        if seen.step < seen.steps - 2:
            may = self._may_return(state) & ~is_masked
            if self.is_trained:
                goes_back = may & (seen.spread(seen.p_mask, 0.0) > self.suspect)
            else:
                p_own = _probability_of(seen, state.x)
                goes_back = may & (p_own < self.doubt)
        return self._best(seen, is_masked), goes_back


@dataclass(frozen=True)
class Overwrite(Ordered):
    """As confidence, and a word that was written before gives way to one that the model finds more likely.

    Attributes:
        threshold: the probability that the other word must have.
        most_returns: how often one position is overwritten.

    Source: LLaDA2.1 (Bie et al., 2026), token-to-token editing.
    """

    threshold: float = 0.9
    most_returns: int = 2

    def asks_for(self, state: State, is_masked: Tensor) -> Tensor:
        return is_masked | (state.is_active & (state.since >= 0) & (state.returns < self.most_returns))

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        p, best = seen.p_words.max(-1)
        beats = seen.where & ~is_masked & (seen.spread(p, 0.0) > self.threshold)
        best = seen.spread(best, seen.mask_id)
        beats &= (best != state.x) & (best == seen.spread(seen.word, seen.mask_id))
        return self._best(seen, is_masked) | beats, torch.zeros_like(is_masked)


def _probability_of(seen: Pass, x: Tensor) -> Tensor:
    """The probability of the word that stands at each position, (B, T); 1 where none was asked for."""
    own = x[seen.where].clamp(max=seen.logits.shape[-1] - 1)
    return seen.spread(seen.p_words.gather(-1, own[:, None]).squeeze(-1), 1.0)


POLICIES = {
    "fill": Fill,
    "confidence": Ordered,
    "margin": partial(Ordered, by="margin"),
    "entropy": partial(Ordered, by="entropy"),
    "ancestral": Ancestral,
    "remask": Remask,
    "remask_untrained": partial(Remask, is_trained=False),
    "edit": Overwrite,
}


def make_policy(name: str, **options: Any) -> Policy:
    """A policy by its name in the table above; options are those of its class.

    Raises:
        UserError: no such name, schedule, or a threshold out of range.
    """
    if name not in POLICIES:
        raise UserError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    if options.get("schedule", "linear") not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {options['schedule']!r}")
    if not 0 <= options.get("suspect", 0.5) <= 1:
        raise UserError(f"suspect must be in [0, 1], got {options['suspect']}")
    try:
        return POLICIES[name](**options)
    except TypeError:
        raise UserError(f"policy {name} does not take {', '.join(options)}") from None
