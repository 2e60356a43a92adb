"""Texts with gaps: of as many words as there are underscores, or of any length, which the model chooses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError, whole_number
from difftrain.sampling.scoring import ModelScores
from difftrain.sampling.settling import State
from difftrain.sampling.writing import How, Writer

KNOWN = re.compile("_{4,}")  # this many underscores are as many [MASK]s
UNKNOWN = "[[gap]]"
LENGTHS = (1, 16)
NEIGHBOURS = 8  # given words on each side of a gap that a length is judged by
MOST = 256  # candidates of one text


@dataclass(frozen=True)
class Candidate:
    """A text with gaps, each of some length.

    Attributes:
        ids: with [MASK] where the model is to write.
        near: places of the given words that stand within NEIGHBOURS of a gap of unknown length.
    """

    ids: list[int]
    near: set[int]


def gap_lengths(value: Any) -> tuple[int, int]:
    """The shortest and the longest length of a gap; raises UserError where they are none."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UserError(f"gap_lengths must be a pair of whole numbers, shortest and longest, got {value!r}")
    low, high = (whole_number("gap_lengths", length, 1) for length in value)
    if low > high:
        raise UserError(f"gap_lengths must not begin above their end, got {low} and {high}")
    return low, high


def candidates_of(
    text: str, vocabulary: Vocabulary, lengths: tuple[int, int], block_size: int
) -> list[Candidate]:
    """Every way to give the gaps of a text a length; one where all have their own.

    Args:
        lengths: the shortest and the longest that a gap of unknown length may have, in tokens.
        block_size: tokens that a text with a gap of unknown length may have.

    Raises:
        UserError: the text has no gap, too many or too long ones, or characters outside the vocabulary.
    """
    pieces = [_encode(piece, vocabulary) for piece in text.split(UNKNOWN)]
    if len(pieces) == 1:
        if vocabulary.mask_id not in pieces[0]:
            raise UserError(
                f"an infill text must have a gap: ____, at least four underscores for as many tokens, or {UNKNOWN}"
            )
        return [Candidate(pieces[0], set())]
    low, high = lengths
    n_gaps = len(pieces) - 1
    if (high - low + 1) ** n_gaps > MOST:
        raise UserError(
            f"{n_gaps} gaps of {low} to {high} tokens each are more than the {MOST} texts that are tried; "
            "give narrower gap_lengths"
        )
    if (longest := sum(map(len, pieces)) + n_gaps * high) > block_size:
        raise UserError(
            f"a text with {UNKNOWN} must have at most block_size {block_size} tokens where its gaps are longest, "
            f"got {longest}; give less text, or shorter gap_lengths"
        )
    ways = itertools.product(range(low, high + 1), repeat=n_gaps)
    return [_joined(pieces, way, vocabulary.mask_id) for way in ways]


def _encode(text: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of a text whose gaps have known lengths."""
    ids: list[int] = []
    end = 0
    for gap in KNOWN.finditer(text):
        ids += vocabulary.encode(text[end : gap.start()])
        ids += [vocabulary.mask_id] * len(gap.group())
        end = gap.end()
    return ids + vocabulary.encode(text[end:])


def _joined(pieces: list[list[int]], lengths: tuple[int, ...], mask_id: int) -> Candidate:
    ids, near = list(pieces[0]), set()
    for piece, length in zip(pieces[1:], lengths, strict=True):
        near |= {*range(len(ids) - NEIGHBOURS, len(ids))}
        ids += [mask_id] * length
        near |= {*range(len(ids), len(ids) + NEIGHBOURS)}
        ids += piece
    return Candidate(ids, {i for i in near if 0 <= i < len(ids) and ids[i] != mask_id})


@dataclass(frozen=True)
class Filled:
    """All candidates of n texts, filled.

    Attributes:
        ids: (n, candidates, T) int64, each with what makes it as long as the longest.
        sizes: of each candidate, the tokens that are its own.
        written: (n, candidates) fp32, the sum of log p of the written words, each when it was written.
        given: (n, candidates) fp32, the sum of log p of the given words near a gap of unknown length, in sight of the
            filled text; 0 of a model that was not taught to judge given words.
    """

    ids: Tensor
    sizes: list[int]
    written: Tensor
    given: Tensor

    def best(self) -> list[int]:
        """Which candidate of each text the model believes most: that with the greatest ``written + given``.

        The mean over the written words would prefer long gaps, of which one word tells the next: docs/sampling.md.

        Source: for the bias of a score by length, CAL (arXiv:2602.00476) and LR-DLLM (arXiv:2602.07546).
        """
        return (self.written + self.given).argmax(1).tolist()

    def text(self, i: int, candidate: int) -> list[int]:
        """The ids of text i with this candidate's lengths."""
        return self.ids[i, candidate, : self.sizes[candidate]].tolist()


def fill_candidates(
    writer: Writer,
    candidates: list[Candidate],
    n: int,
    how: How,
    on_pass: Callable[[Tensor], None] | None = None,
) -> Filled:
    """``n`` texts with all their candidates filled.

    They go through the model together, none in sight of another or of what makes them equally long, so that ``steps``
    calls of the model do for any number of them. The last call is for the given words.

    Args:
        on_pass: is given the first text (1, T) before the first pass and after each, once its length is chosen.

    Raises:
        UserError: blocks are asked for, or too few steps; those of :meth:`Writer.fill`.
    """
    for name in ("block_length", "approximate"):
        if getattr(how, name):
            raise UserError(f"{name} does not go with {UNKNOWN}: all lengths are written at once")
    device, n_candidates = writer.device, len(candidates)
    sizes = [len(candidate.ids) for candidate in candidates]
    width, filler = max(sizes), 0
    rows = [c.ids + [filler] * (width - len(c.ids)) for c in candidates]
    near = [[i in c.near for i in range(width)] for c in candidates]
    x = torch.tensor(rows, dtype=torch.int64, device=device).repeat(n, 1)
    is_near = torch.tensor(near, dtype=torch.bool, device=device).repeat(n, 1)
    size = torch.tensor(sizes, dtype=torch.int64, device=device).repeat(n)
    places = torch.arange(width, dtype=torch.int64, device=device)
    scores = writer.scores
    scores.visible = (places < size[:, None])[:, None, None]
    samples = torch.arange(n, dtype=torch.int64, device=device).repeat_interleave(n_candidates)
    looks = int(writer.config.has_penalties)
    passes: list[Tensor] = []
    keep = (lambda x: passes.append(x[:n_candidates].clone())) if on_pass else None
    state = writer.settle(x, how, keep, scores=scores, samples=samples, spared=looks)
    written = torch.where(state.is_open, state.p.log(), 0.0).sum(1).view(n, -1)
    given = _log_p_of_words(scores, state, is_near).view(n, -1) if looks else torch.zeros_like(written)
    filled = Filled(state.x.view(n, n_candidates, width), sizes, written, given)
    if on_pass:
        best = filled.best()[0]
        for x in passes:
            on_pass(x[best : best + 1, : sizes[best]])
    return filled


def _log_p_of_words(scores: ModelScores, state: State, where: Tensor) -> Tensor:
    """The sum over the places ``where`` (B, T) of a text of what the model gives to the words there: (B,) fp32."""
    log_p = scores(state.x, where).log_softmax(-1).gather(-1, state.x[where][:, None])
    whole = torch.zeros(where.shape, dtype=torch.float32, device=where.device)
    return whole.masked_scatter_(where, log_p).sum(1)
