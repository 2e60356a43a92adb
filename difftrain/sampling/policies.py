"""Policies: which words are written in a pass, and which go back to [MASK].

| name | a pass writes | sends back |
|---|---|---|
| ``fill`` | a draw at every [MASK], which may be [MASK] again: the specification's | - |
| ``confidence`` | the words drawn with the highest probability | - |
| ``margin`` | where the best word is furthest from the second | - |
| ``entropy`` | where the model is least undecided | - |
| ``ancestral`` | each [MASK] with the probability of the reverse process | - |
| ``remask`` | as ``ancestral`` | words that the model answers with [MASK], as it was trained to |
| ``remask_untrained`` | as ``ancestral`` | some by chance, sooner those that were unlikely when written |
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
        fills = seen.chance < 1.0 / (seen.steps - seen.step)
        return is_masked & fills, torch.zeros_like(is_masked)


@dataclass(frozen=True)
class Remask(Ancestral):
    """As ancestral, and words that were written before go back to [MASK] where the model suspects them.

    A position goes back ``most_returns`` times at most, and none in the last two passes, so that every word is
    written by a pass that sees the others. What was given never goes back. Words that come in order of confidence
    would leave nothing to suspect: see docs/sampling.md.

    Attributes:
        suspect: the probability of [MASK] above which a word goes back; the model was taught to answer a wrong word
            with [MASK].
    """

    suspect: float = 0.1
    most_returns: int = 2

    def asks_for(self, state: State, is_masked: Tensor) -> Tensor:
        return is_masked | _may_return(state, self.most_returns)

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        fills, goes_back = super().decide(state, seen, is_masked)
        if seen.step < seen.steps - 2:
            may = _may_return(state, self.most_returns) & ~is_masked
            goes_back = may & (seen.spread(seen.p_mask, 0.0) > self.suspect)
        return fills, goes_back


@dataclass(frozen=True)
class RemaskUntrained(Ancestral):
    """As ancestral, and words go back by chance, the less probable ones when written more often: for any model.

    On average a written word goes back with probability ``share`` times the most that the schedule allows; a word's own is
    proportional to exp(-p), with p its probability when it was written.

    Attributes:
        share: ReMDM's eta, in [0, 1].

    Source: ReMDM (arXiv:2503.00307), rescaled schedule with confidences, its weights here with mean 1.
    """

    share: float = 0.1
    most_returns: int = 2

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        fills, goes_back = super().decide(state, seen, is_masked)
        if 0 < seen.step < seen.steps - 2:
            may = _may_return(state, self.most_returns) & ~is_masked
            weight = torch.where(may, torch.exp(-state.p), 0.0)
            mean = weight.sum(1, keepdim=True) / may.sum(1, keepdim=True).clamp(min=1)
            most = min(1.0, (seen.steps - seen.step - 1) / seen.step)
            goes_back = may & (seen.chance * mean < self.share * most * weight)
        return fills, goes_back


def _may_return(state: State, most_returns: int) -> Tensor:
    return state.is_active & (state.since >= 0) & (state.returns < most_returns)


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
        return is_masked | _may_return(state, self.most_returns)

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        p, best = seen.p_words.max(-1)
        beats = seen.where & ~is_masked & (seen.spread(p, 0.0) > self.threshold)
        best = seen.spread(best, seen.mask_id)
        beats &= (best != state.x) & (best == seen.spread(seen.word, seen.mask_id))
        return self._best(seen, is_masked) | beats, torch.zeros_like(is_masked)


POLICIES = {
    "fill": Fill,
    "confidence": Ordered,
    "margin": partial(Ordered, by="margin"),
    "entropy": partial(Ordered, by="entropy"),
    "ancestral": Ancestral,
    "remask": Remask,
    "remask_untrained": RemaskUntrained,
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
