"""The weight's gradient (V, D), summed over chunks of tokens in fp32: where the sums lie meanwhile.

| the gradient's dtype | where its fp32 sums lie | rounded |
|---|---|---|
| fp32 (fp64) | in the gradient | never |
| narrower, and 4VD bytes are within the budget; fp16; the reference | beside it, until backward | once, in backward |
| bf16, and they are not | in rounds: see below | in forward, and again in backward for an upstream gradient other than stated |
| that of ``accumulate_into_grad`` | in ``.grad``; where that is narrow, beside it in rounds | once, when added |

Rounds. The gradient's own memory, 2VD bytes, holds the fp32 sums of the first half of the vocabulary, and the budget
those of as many words more as fit. What remains waits for a further round, which makes the logits of its words
alone again, and from the saved statistics of the rows their gradient. A round costs 2 * N * D FLOP for each of its
words. Sums in bf16 with
a compensation in bf16 take 2VD bytes beside the gradient (1002 MiB there) and a pass over the fp32 product of each
chunk; sums kept whole take 4VD (2004 MiB).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED_WORDS = (
    128  # parts of the vocabulary begin at multiples of it: 16 bytes, and whole tiles of a product
)
ROUNDING_BYTES = 16 * 2**20  # of the piece that is rounded at a time


@dataclass(frozen=True)
class SumPlan:
    """How a weight's gradient is summed.

    Attributes:
        dtype: of the gradient that a pass over the chunks gives.
        own: words whose sums lie in the memory of a narrower gradient in the first round.
        beside: words whose sums lie beside the gradient at a time. The rest are the gradient.
        rounds: the words of each round.
    """

    dtype: torch.dtype
    own: int
    beside: int
    rounds: tuple[slice, ...]


def plan_sums(
    vocab_size: int, width: int, dtype: torch.dtype, sum_dtype: torch.dtype, budget_bytes: int,
    *, splits: bool, is_there: bool = False,
) -> SumPlan:  # fmt: skip
    """How to sum the gradient of a weight (V, D).

    Args:
        dtype: of the weight, and of its gradient in the end.
        sum_dtype: fp32, or fp64.
        budget_bytes: for sums beside the gradient; those of 128 words are held whatever it says.
        splits: whether rounds may be made; if not, the sums are whole.
        is_there: whether they are added to a gradient that is there.
    """
    row_bytes, whole = width * sum_dtype.itemsize, (slice(0, vocab_size),)
    if dtype == sum_dtype:
        return SumPlan(dtype, 0, 0, whole)
    if not splits or vocab_size * row_bytes <= budget_bytes:
        return SumPlan(dtype if is_there else sum_dtype, 0, vocab_size, whole)
    own = 0 if is_there else _aligned(vocab_size * dtype.itemsize // sum_dtype.itemsize)
    beside = min(max(ALIGNED_WORDS, _aligned(budget_bytes // row_bytes)), vocab_size - own)
    return SumPlan(dtype, own, beside, _rounds(vocab_size, own + beside, beside))


def _aligned(words: int) -> int:
    return words - words % ALIGNED_WORDS


def _rounds(vocab_size: int, first: int, most: int) -> tuple[slice, ...]:
    """Words of the first round, and of the others about equally many, at most ``most``."""
    rounds, start = [slice(0, min(first, vocab_size))], first
    while start < vocab_size:
        n_left = -(-(vocab_size - start) // most)
        size = -(-(vocab_size - start) // n_left)
        stop = min(vocab_size, start + min(most, size + -size % ALIGNED_WORDS))
        rounds.append(slice(start, stop))
        start = stop
    return tuple(rounds)


class WeightSum:
    """The sums of one call, filled chunk by chunk and round by round.

    Args:
        weight: (V, D), on the gradient's device.
        into: the gradient to add to, instead of a new one.
        sum_dtype: of sums that are not the gradient.
    """

    def __init__(self, weight: Tensor, plan: SumPlan, sum_dtype: torch.dtype, into: Tensor | None = None):
        self.plan, self.into = plan, into
        self.gradient = into
        if into is None:
            self.gradient = torch.empty(weight.shape, dtype=plan.dtype, device=weight.device)
        width = weight.shape[1]
        self.own = self.beside = None
        if plan.dtype != sum_dtype:
            self.beside = torch.empty(plan.beside, width, dtype=sum_dtype, device=weight.device)
        if plan.own:
            n_narrow = plan.own * width * sum_dtype.itemsize // plan.dtype.itemsize
            self.own = self.gradient.view(-1)[:n_narrow].view(sum_dtype).view(plan.own, width)
        self.begin(plan.rounds[0])

    def begin(self, words: slice) -> None:
        """A round over all chunks, for these words."""
        self.words, self.is_first = words, self.into is None or self.beside is not None
        if self.beside is None:
            self.parts = [(0, self.gradient)]
            return
        own = self.plan.own if words.start == 0 else 0
        self.parts = [(0, self.own)] if own else []
        if words.stop - words.start > own:
            self.parts.append((own, self.beside[: words.stop - words.start - own]))

    def add(self, gradient: Tensor, states: Tensor, scale: float) -> None:
        """One chunk: the gradient of its logits of the round's words, (rows, words), and its states (rows, D)."""
        for start, out in self.parts:
            is_all = out.shape[0] == gradient.shape[1]
            columns = gradient if is_all else gradient[:, start : start + out.shape[0]]
            add_product(out, columns.t(), states, scale, 0 if self.is_first else 1)
        self.is_first = False

    def end(self) -> None:
        """All chunks of the round were added."""
        if self.beside is None:
            return
        start = self.words.start
        if start == 0 and self.own is not None:
            self._round_in_place()
            start = self.plan.own
        beside = self.beside[: self.words.stop - start]
        if self.into is None:
            self.gradient[start : self.words.stop].copy_(beside)
        else:
            self.gradient[start : self.words.stop].add_(beside)

    def _round_in_place(self) -> None:
        # A word's rounded sum lies below its exact one: from the first word on, none is written over unread.
        step = max(1, ROUNDING_BYTES // (self.own.shape[1] * self.plan.dtype.itemsize))
        for start in range(0, len(self.own), step):
            piece = self.own[start : start + step].to(self.plan.dtype)
            self.gradient[start : start + len(piece)].copy_(piece)


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: int) -> None:
    """out = beta * out + alpha * a @ b, rounded to out's dtype only; with beta 0 out may hold anything."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
