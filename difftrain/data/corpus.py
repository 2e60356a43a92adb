"""A corpus: clean tokens (B, T), each window fixed by its sample index."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difftrain.config import Config
from difftrain.data.philox import random_words
from difftrain.data.shards import Shards
from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError

STREAMS = {"train": 3, "val": 4}  # Philox streams; those of the corruption are in corruption.py
COUNTED_AT_ONCE = 1 << 24  # tokens; bincount makes int64 of them


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two token files and their vocabulary.

    Attributes:
        train, val: token ids (uint16 or uint32), mapped from their files: 1-d arrays, or shards read as one.
        vocabulary: words of the ids.
        folder: where the files lie.
        record: what a run keeps of them, to know them again: the digest of each file, and the
            type of their ids.
        counts: how often each word stands in "train" and "val", (n_words,) int64, where that is known.
    """

    train: np.ndarray | Shards
    val: np.ndarray | Shards
    vocabulary: Vocabulary
    folder: Path
    record: dict[str, str] = dataclasses.field(default_factory=dict)
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def windows(self, split: str, samples: Tensor, *, seed: int, length: int) -> Tensor:
        """Clean tokens of the given samples: (B, length) int64 on the CPU.

        Window b starts at a place drawn uniformly, a pure function of (seed, split, samples[b]).

        Args:
            split: "train" or "val".
            samples: (B,) int64 sample indices, on the CPU.
            seed: run seed.
            length: tokens a window.
        """
        tokens = getattr(self, split)
        words = random_words(seed, STREAMS[split], samples, 2)
        # 62 random bits, so that the remainder favours no start, however long the file.
        draw = (words[:, 0] & 0x3FFFFFFF) << 32 | words[:, 1]
        starts = (draw % (len(tokens) - length + 1)).numpy()
        return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))

    @functools.cached_property
    def unigram_counts(self) -> Tensor:
        """How often each word stands in the training text: (n_words,) int64 on the CPU."""
        return torch.from_numpy(self._count("train"))

    def unigram_entropy(self) -> float:
        """Entropy of the validation file's words in nats: what guessing by frequency costs."""
        counts = self._count("val")
        share = counts[counts > 0] / len(self.val)
        return max(0.0, float(-(share * np.log(share)).sum()))

    def _count(self, split: str) -> np.ndarray:
        if split in self.counts:
            return self.counts[split]
        tokens, counts = getattr(self, split), np.zeros(self.vocabulary.n_words, dtype=np.int64)
        for first in range(0, len(tokens), COUNTED_AT_ONCE):
            counts += np.bincount(tokens[first : first + COUNTED_AT_ONCE], minlength=len(counts))
        return counts

    def check_length(self, length: int) -> None:
        """Raise UserError unless both splits hold a window of ``length`` tokens."""
        for split in ("train", "val"):
            n = len(getattr(self, split))
            if n < length:
                raise UserError(
                    f"the {split} split of {self.folder} has {n} tokens, and block_size asks for {length} at a time"
                )


def sample_indices(step: int, micro_step: int, rank: int, world_size: int, config: Config) -> Tensor:
    """Which training samples one process takes in one micro-batch: (sequences,) int64.

    Step s takes the samples from s * global_batch_size on, so the samples of a step are the same
    for every number of processes and every split into micro-batches.
    """
    micro_steps, sequences = config.micro_batches(world_size)
    first = step * config.global_batch_size + (rank * micro_steps + micro_step) * sequences
    return torch.arange(first, first + sequences, dtype=torch.int64, device="cpu")
