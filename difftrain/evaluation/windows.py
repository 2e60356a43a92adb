"""Windows of a text, and figures over them: a ratio of sums with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from difftrain.progress import progress
from difftrain.runtime import Runtime


@dataclass(frozen=True)
class Windows:
    """Consecutive pieces of a text; only its last one may be shorter.

    Attributes:
        tokens: (T,) int64 each, on the CPU.
        numbers: (W,) int64, which piece of the text each is: the sample index of its random numbers.
        n_pieces: of the whole text.
    """

    tokens: list[Tensor]
    numbers: Tensor
    n_pieces: int

    def batches(self, batch_size: int, draws: int = 1) -> list[list[tuple[int, int]]]:
        """(window, draw) pairs of all draws of all windows, in batches of windows of one length."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for w, tokens in enumerate(self.tokens):
            groups.setdefault(len(tokens), []).extend((w, d) for d in range(draws))
        return [g[i : i + batch_size] for g in groups.values() for i in range(0, len(g), batch_size)]

    def stack(self, windows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Windows of one length as (B, T), and their numbers (B,)."""
        windows = list(windows)
        return torch.stack([self.tokens[w] for w in windows]), self.numbers[windows]


def cut(ids: np.ndarray, length: int, *, at_most: int, overlap: int = 0) -> Windows:
    """Pieces of ``length`` tokens, each beginning with the last ``overlap`` tokens of the one before.

    Args:
        ids: (n,) integers, more than ``overlap``.
        at_most: so many of the pieces, evenly spaced over the text; 0 for all.
    """
    starts = range(0, len(ids) - overlap, length - overlap)
    n = len(starts)
    chosen = range(n) if not 0 < at_most < n else [i * n // at_most for i in range(at_most)]
    tokens = [torch.from_numpy(ids[starts[i] : starts[i] + length].astype(np.int64)) for i in chosen]
    return Windows(tokens, torch.tensor(list(chosen), dtype=torch.int64, device="cpu"), n)


def score_all(
    windows: Windows,
    draws: int,
    score: Callable[[list[int], list[int]], Tensor],
    *,
    runtime: Runtime,
    batch_size: int,
    title: str,
) -> Tensor:
    """Figures of every window in every draw, (W, draws, n) fp64; the same for any number of processes.

    Args:
        score: from the windows and the draws of a batch, windows of one length, to its figures (B, n).
    """
    batches = windows.batches(batch_size, draws)
    figures: Tensor | None = None
    mine = (
        batches[runtime.rank :: runtime.world_size] or batches[:1]
    )  # an idle process learns n from a batch
    for batch in progress(mine, what=title, unit="batch"):
        made = score(*map(list, zip(*batch, strict=True))).double().cpu()
        if figures is None:
            shape = (len(windows.tokens), draws, made.shape[1])
            figures = torch.zeros(shape, dtype=torch.float64, device="cpu")
        if runtime.rank < len(batches):
            for row, (w, d) in zip(made, batch, strict=True):
                figures[w, d] = row
    assert figures is not None
    return runtime.sum_over_processes(figures)


@dataclass(frozen=True)
class Estimate:
    """A figure, and how far it would move with other windows and other random numbers.

    Attributes:
        value: sum over windows of a quantity, by that of another; NaN where the latter is 0.
        standard_error: of ``value``, from the spread between windows; NaN where there is one alone.
    """

    value: float
    standard_error: float

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.standard_error * factor)


def ratio(sums: Tensor, sizes: Tensor) -> Estimate:
    """The ratio of two sums over windows, (W,) fp64 each.

    Source: Cochran, Sampling Techniques (1977), section 6.3: the variance of a ratio of two totals.
    """
    n, total = len(sums), sizes.sum().item()
    value = sums.sum().item() / total if total else math.nan
    spread = (sums - value * sizes).square().sum().item()
    return Estimate(value, math.sqrt(spread * n / (n - 1)) / total if n > 1 and total else math.nan)
