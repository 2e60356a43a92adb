"""Held-out text of a run: the same pieces for every model that is measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.checkpoints.reading import find_checkpoint, open_held_out
from difftrain.evaluation.windows import cut
from text_quality.written import words_of

STRETCHES = 4  # of consecutive text, evenly spaced


@dataclass(frozen=True)
class HeldOut:
    """Windows of a held-out text, and what all of it holds.

    Attributes:
        tokens: (W, T) int64, consecutive in each stretch.
        known: its words.
        n_windows: how many it would come to.
    """

    tokens: Tensor
    known: set[str]
    n_windows: int

    @classmethod
    def of(cls, run: Path, n: int) -> HeldOut:
        """``n`` windows, fewer where there are not as many, of a run's data, in its vocabulary and block size."""
        checkpoint = find_checkpoint(run, "latest")
        ids = open_held_out(checkpoint, is_change_allowed=False).val
        length = checkpoint.config.block_size
        stretch = -(-n // STRETCHES) * length
        whole = [
            s.view(-1, length) for s in cut(ids, stretch, at_most=STRETCHES).tokens if len(s) == stretch
        ]
        tokens = torch.cat(whole)[:n] if whole else torch.empty(0, length, dtype=torch.int64, device="cpu")
        return cls(tokens, set(words_of(checkpoint.vocabulary.decode(ids.tolist()))), len(ids) // length)
