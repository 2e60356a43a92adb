"""Settling a text: passes of the model that write words, and send suspects back, until none is [MASK]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from difftrain.errors import UserError
from difftrain.progress import progress
from difftrain.sampling.choosing import Choice, choose, random_numbers, recent_words

Scores = Callable[[Tensor, Tensor], Tensor]
"""From ids (B, T) and which positions are asked for (B, T) bool to their logits (n, V), in row order."""


@dataclass
class State:
    """A batch of texts between two passes.

    Attributes:
        x: (B, T) int64.
        is_open: (B, T) bool, positions that may be written; the others are given and never change.
        is_active: (B, T) bool, those among them that this part of the work is about.
        returns: (B, T) int64, how often each was sent back to [MASK] or overwritten.
        since: (B, T) int64, the pass in which its word was written; -1 before.
        p: (B, T) fp32, what the model gave to that word among all words, however it was chosen; 1 before.
    """

    x: Tensor
    is_open: Tensor
    is_active: Tensor
    returns: Tensor
    since: Tensor
    p: Tensor

    @classmethod
    def of(cls, x: Tensor, mask_id: int, is_open: Tensor | None = None) -> State:
        is_open = x == mask_id if is_open is None else is_open
        fresh = torch.zeros_like(x)
        p = torch.ones(x.shape, dtype=torch.float32, device=x.device)
        return cls(x.clone(), is_open, is_open.clone(), fresh, fresh - 1, p)


@dataclass(frozen=True)
class Pass:
    """What a policy decides by, at the positions it asked for; n of them in row order.

    Attributes:
        step, steps: which pass of how many this is, counted from 0.
        mask_id: id of [MASK].
        where: (B, T) bool, the positions.
        logits: (n, V), with [MASK] at its place.
        word: (n,) int64, a word drawn for each, never [MASK].
        p: (n,) fp32, the probability with which it was drawn.
        may_mask: (n,) int64, the same draw with [MASK] among the words, for a policy that may write it.
        chance: (B, T) fp32 in [0, 1), another random number of every position.
    """

    step: int
    steps: int
    mask_id: int
    where: Tensor
    logits: Tensor
    word: Tensor
    p: Tensor
    may_mask: Tensor
    chance: Tensor

    @cached_property
    def p_mask(self) -> Tensor:
        """The probability of [MASK] among all words, (n,) fp32."""
        return self.logits.softmax(-1)[:, self.mask_id]

    @cached_property
    def p_words(self) -> Tensor:
        """The probability of each word among those that are not [MASK], (n, V) fp32, at temperature 1."""
        return without_mask(self.logits, self.mask_id).softmax(-1)

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """Values (n,) at their positions (B, T), ``fill`` elsewhere."""
        whole = torch.full(self.where.shape, fill, dtype=values.dtype, device=values.device)
        return whole.masked_scatter_(self.where, values)


def without_mask(logits: Tensor, mask_id: int) -> Tensor:
    """A copy of logits (n, V) that never answers [MASK]."""
    words = logits.clone()
    words[:, mask_id] = -torch.inf
    return words


class Policy:
    """What is written in a pass. A policy is a function of the state and the pass alone.

    Attributes:
        may_write_mask: whether a drawn [MASK] counts, as a word that is not written yet.
    """

    may_write_mask = False

    def asks_for(self, state: State, is_masked: Tensor) -> Tensor:
        """Which positions need logits; by default those that are [MASK]."""
        return is_masked

    def decide(self, state: State, seen: Pass, is_masked: Tensor) -> tuple[Tensor, Tensor]:
        """The positions that get their drawn word, and those that go back to [MASK]: (B, T) bool each."""
        raise NotImplementedError


@torch.no_grad()
def settle(
    scores: Scores,
    state: State,
    mask_id: int,
    policy: Policy,
    *,
    steps: int,
    choice: Choice,
    seed: int,
    samples: Tensor,
    first_pass: int = 0,
    on_pass: Callable[[Tensor], None] | None = None,
) -> int:
    """Write every active [MASK] of the state in at most ``steps`` passes, the last of which fills what is left.

    A text that has no [MASK] left is done, whatever the others of the batch still need.

    Args:
        scores: counts as one pass of the model a call.
        samples: (B,) int64, the index of each text: its random numbers depend on it and the seed alone.
        first_pass: how many passes this text has had before, of which the random numbers are others.
        on_pass: is given x (B, T) after each pass.

    Returns:
        The passes taken.

    Raises:
        UserError: ``steps`` is 0 where something is to be written.
    """
    for step in progress(range(steps), what="sampling", unit="pass"):
        is_masked = (state.x == mask_id) & state.is_active
        is_unsettled = is_masked.any(1, keepdim=True)
        if not is_unsettled.any():
            return step
        is_last = step == steps - 1
        where = is_masked if is_last else policy.asks_for(state, is_masked) & is_unsettled
        seen = _look(scores, state, where, mask_id, policy, step, steps, choice, seed, samples, first_pass)
        if is_last:
            fills, goes_back, words = is_masked, torch.zeros_like(is_masked), seen.word
        else:
            fills, goes_back = policy.decide(state, seen, is_masked)
            words = seen.may_mask if policy.may_write_mask else seen.word
        x = torch.where(fills, seen.spread(words, mask_id), state.x)
        state.x = torch.where(goes_back, mask_id, x)
        state.returns = state.returns + (goes_back | (fills & ~is_masked))
        state.since = torch.where(fills & (state.x != mask_id), first_pass + step, state.since)
        p = seen.p_words.gather(1, words[:, None]).squeeze(1)
        state.p = torch.where(fills, seen.spread(p, 1.0), state.p)
        if on_pass:
            on_pass(state.x)
    if steps < 1 and bool(((state.x == mask_id) & state.is_active).any()):
        raise UserError(f"steps must be at least 1, got {steps}")
    return steps


def _look(
    scores: Scores, state: State, where: Tensor, mask_id: int, policy: Policy, step: int, steps: int, choice: Choice,
    seed: int, samples: Tensor, first_pass: int,
) -> Pass:  # fmt: skip
    x = state.x
    logits = scores(x, where).float()
    u, chance = random_numbers(seed, samples, first_pass + step, 2 * x.shape[1]).chunk(2, dim=1)
    recent = recent_words(x, where, mask_id) if choice.repetition > 1 else None
    u = u[where]
    word, p = choose(without_mask(logits, mask_id), choice, u, recent)
    may_mask = choose(logits, choice, u, recent)[0] if policy.may_write_mask else word
    return Pass(step, steps, mask_id, where, logits, word, p, may_mask, chance)
