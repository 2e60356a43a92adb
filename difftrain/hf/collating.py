"""Batches for the Trainer: examples corrupted as their keys say, padded, with labels."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difftrain.config import Config
from difftrain.config.schedules import PENALTIES
from difftrain.data.corruption import corrupt_by_recipe
from difftrain.errors import UserError, whole_number
from difftrain.loss import token_weights


def checked_config(config: Config) -> Config:
    """A configuration whose every choice on corruption and weights holds in the Trainer too; else UserError."""
    wrong = {
        "mode": ("diffusion", config.mode == "diffusion"),
        "replacement": ("uniform", config.replacement == "uniform"),
        "self_errors": ("0", config.self_errors == 0),
        "schedules": (
            f"of {' and '.join(PENALTIES)}, by steps",
            all(n in PENALTIES and t["shape"] != "metric" for n, t in config.scheduled.items()),
        ),
    }
    for name, (wanted, is_right) in wrong.items():
        if not is_right:
            raise UserError(
                f"{name} must be {wanted} in Hugging Face's Trainer, got {getattr(config, name)}"
            )
    return config


class DataCollatorForDiffusion:
    """Examples with clean ``input_ids`` -> what the model sees, what it should answer, and where there is text.

    An example is corrupted as :func:`difftrain.train` does it, as a pure function of its key, whatever
    process or batch it comes in. The key is the configuration's seed, the split, the epoch, the example's
    ids, and with ``index`` that number in place of the ids' digest: equal examples without it are
    corrupted alike in an epoch. The epoch is :meth:`set_epoch`'s, 0 until then.

    An example may have ``labels``: where they are ``ignore_index``, such as in a prompt, its tokens stay and do
    not count; elsewhere they are ignored. Where its ``attention_mask`` is 0 is padding.

    Args:
        mask_id: id of [MASK]; no example may hold it.
        vocab_size: ids below it are words, from which wrong words are drawn; at least 3, above mask_id.
        config: its seed and its options of corruption and recipe.
        pad_id: what stands behind a short example, whatever it means elsewhere.
        index: the name of a field that numbers the examples, from 0 to 2^32 - 1.
        split: "train" or "val", whose random numbers have nothing in common.
        ignore_index: the label of padding.

    Returns:
        Called: ``input_ids``, ``labels`` and ``attention_mask``, (B, T) int64 with T the longest example; where
        the recipe masks alone ``token_weights`` too, (B, T) fp32.

    Raises:
        UserError: an option that does not hold in the Trainer; ids out of range, or of [MASK].
    """

    def __init__(
        self,
        mask_id: int,
        vocab_size: int,
        *,
        config: Config | None = None,
        pad_id: int = 0,
        index: str | None = None,
        split: str = "train",
        ignore_index: int = -100,
    ) -> None:
        self.vocab_size = whole_number("vocab_size", vocab_size, 3)
        self.mask_id = whole_number("mask_id", mask_id, 0)
        if mask_id >= vocab_size:
            raise UserError(f"mask_id must be in [0, {vocab_size}), got {mask_id}")
        if split not in ("train", "val"):
            raise UserError(f"split must be train or val, got {split!r}")
        self.config = checked_config(config or Config())
        self.pad_id, self.index, self.split, self.ignore_index = pad_id, index, split, ignore_index
        # Shared, so that the workers of a DataLoader see it change.
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Corrupt otherwise from now on, in workers too."""
        self.epoch.fill_(whole_number("epoch", epoch, 0))

    def for_evaluation(self) -> DataCollatorForDiffusion:
        """The same on the split "val" and at epoch 0 for ever: each evaluation sees the same corruption."""
        other = copy.copy(self)
        other.split, other.epoch = "val", torch.zeros((), dtype=torch.int64, device="cpu")
        return other

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._row(example) for example in examples]
        shape = len(rows), max((len(ids) for ids, *_ in rows), default=0)
        x = torch.full(shape, self.pad_id, dtype=torch.int64, device="cpu")
        y = torch.full(shape, self.ignore_index, dtype=torch.int64, device="cpu")
        is_text = torch.zeros(shape, dtype=torch.int64, device="cpu")
        weights = None
        if self.config.recipe != "specification":
            weights = torch.zeros(shape, dtype=torch.float32, device="cpu")
        by_count: dict[
            int, list[int]
        ] = {}  # of tokens that count: those of one number are corrupted together
        for b, (ids, is_there, counts, _) in enumerate(rows):
            x[b, : len(ids)], is_text[b, : len(ids)] = ids, is_there.long()
            by_count.setdefault(int(counts.sum()), []).append(b)
        for n, chosen in by_count.items():
            if n == 0:
                continue
            places = torch.stack([rows[b][2].nonzero()[:, 0] for b in chosen])
            at = torch.tensor(chosen, dtype=torch.int64, device="cpu")[:, None], places
            samples = torch.tensor([rows[b][3] for b in chosen], dtype=torch.int64, device="cpu")
            x[at], y[at], weight = self._corrupted(x[at], samples)
            if weights is not None:
                weights[at] = weight
        batch = {"input_ids": x, "labels": y, "attention_mask": is_text}
        return batch if weights is None else batch | {"token_weights": weights}

    def _row(self, example: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, int]:
        """An example's ids, where there is text, which tokens count, and its sample index."""
        wanted = ["input_ids", *([self.index] if self.index else [])]
        if any(name not in example for name in wanted):
            raise UserError(f"an example must have {' and '.join(wanted)}, got {', '.join(example)}")
        ids = _whole_numbers("input_ids", example["input_ids"])
        is_there = torch.ones_like(ids, dtype=torch.bool)
        counts = is_there
        for name, no in (("attention_mask", 0), ("labels", self.ignore_index)):
            if name in example:
                other = _whole_numbers(name, example[name])
                if other.shape != ids.shape:
                    raise UserError(
                        f"{name} must have one number for each of {len(ids)} ids, got {len(other)}"
                    )
                counts = counts & (other != no)
                is_there = other != no if name == "attention_mask" else is_there
        text = ids[is_there]
        if ((text < 0) | (text >= self.vocab_size) | (text == self.mask_id)).any():
            raise UserError(
                f"input_ids must be in [0, {self.vocab_size}) and not mask_id {self.mask_id}, "
                f"got {int(text.min())} to {int(text.max())}"
            )
        if self.index is None:
            key = int.from_bytes(hashlib.blake2b(text.numpy().tobytes(), digest_size=4).digest(), "little")
        else:
            key = example[self.index]
            key = key if isinstance(key, int) else getattr(key, "item", lambda: -1)()
            if not isinstance(key, int) or not 0 <= key < 2**32:
                raise UserError(f"{self.index} must be in [0, 2^32), got {example[self.index]}")
        return ids, is_there, counts, int(self.epoch) << 32 | key

    def _corrupted(self, tokens: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, y and weights of (B, n) tokens; [MASK] changes places with the last id, where corruption has it."""
        last = self.vocab_size - 1
        x, y, p_mask = corrupt_by_recipe(
            self._exchanged(tokens), samples, self.config, split=self.split, vocab_size=self.vocab_size
        )
        return self._exchanged(x), self._exchanged(y), token_weights(x, p_mask, last, self.config)

    def _exchanged(self, ids: Tensor) -> Tensor:
        last = self.vocab_size - 1
        return torch.where(ids == last, self.mask_id, torch.where(ids == self.mask_id, last, ids))


def _whole_numbers(name: str, values: Any) -> Tensor:
    """(T,) int64; UserError for anything but a row of whole numbers."""
    try:
        found = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a row of whole numbers, got rows of several lengths") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iub"):
        raise UserError(f"{name} must be a row of whole numbers, got {found.dtype} of shape {found.shape}")
    return torch.as_tensor(found, dtype=torch.int64, device="cpu")
