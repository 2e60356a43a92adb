"""Shards: a split's token files read as one array, and the index that says what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.data.contents import contents_of
from difftrain.errors import UserError

INDEX, COUNTS = "shards.json", "counts.npy"  # in a prepared folder
FORMAT = 1


class Shards:
    """Arrays of ids one after the other, read as one array: by slices and by arrays of places."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self.dtype = self._arrays[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        """A slice of step 1, (n,), or ids at places from 0 on, of the places' shape."""
        if isinstance(places, slice):
            start, stop, step = places.indices(len(self))
            if step != 1:
                raise IndexError(f"a slice of shards has step 1, got {step}")
            return self._slice(start, max(start, stop))
        flat = np.asarray(places, np.int64).ravel()
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"places must be in [0, {len(self)})")
        owner = np.searchsorted(self._ends, flat, side="right")
        found = np.empty(len(flat), self.dtype)
        for i in np.unique(owner):
            is_here = owner == i
            found[is_here] = self._arrays[i][flat[is_here] - self._first(i)]
        return found.reshape(np.shape(places))

    def _first(self, i: int) -> int:
        return int(self._ends[i]) - len(self._arrays[i])

    def _slice(self, start: int, stop: int) -> np.ndarray:
        i = int(np.searchsorted(self._ends, start, side="right"))
        pieces = []
        while i < len(self._arrays) and self._first(i) < stop:
            first = self._first(i)
            pieces.append(self._arrays[i][max(0, start - first) : stop - first])
            i += 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


@dataclass(frozen=True)
class Index:
    """What an index says and its folder holds.

    Attributes:
        splits: "train" and "val": their ids.
        digests: the same: one digest of all the shards' digests.
        counts: (2, n_words) int64: how often each word stands in either.
        request: what was asked for when the shards were made.
    """

    splits: dict[str, Shards]
    digests: dict[str, str]
    counts: np.ndarray
    request: dict[str, Any]


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds shards, by its index and meta data."""
    return (folder / INDEX).is_file() and (folder / "meta.json").is_file()


def read_index(folder: Path, dtype: str, n_words: int, say: Callable[[str], None] | None = None) -> Index:
    """Map the shards of a folder. They are read whole only where they were copied or touched since they were checked.

    Raises:
        UserError: the index is damaged, or a shard is not as it says.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(f"{path} has format {index['format']}, and this version reads {FORMAT}")
        shards = {name: index["splits"][name]["shards"] for name in ("train", "val")}
        told = {
            s["file"]: (s["sha256"], int(s["largest"]), int(s["tokens"]))
            for both in shards.values()
            for s in both
        }
        counts_digest = index[COUNTS]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise (
            error if isinstance(error, UserError) else UserError(f"{path} is damaged: {error!r}")
        ) from None
    width = np.dtype(dtype).itemsize
    for name, (_, largest, tokens) in told.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size != tokens * width or not size:
            raise UserError(f"{file} must have {tokens * width} bytes as its index says, and has {size}")
        if largest >= n_words:
            raise UserError(f"{file} holds the id {largest}, but its vocabulary has {n_words} words")
    for name, content in zip(told, contents_of(folder, [*told], dtype, say), strict=True):
        if content.sha256 != told[name][0]:
            raise UserError(
                f"{folder / name} is not what its index says: its digest differs; prepare it again"
            )
    return Index(
        {
            name: Shards([np.memmap(folder / s["file"], dtype, "r").view(np.ndarray) for s in both])
            for name, both in shards.items()
        },
        {name: _digest([s["sha256"] for s in both]) for name, both in shards.items()},
        _counts(folder / COUNTS, counts_digest, n_words),
        dict(index.get("request") or {}),
    )


def _digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _counts(path: Path, digest: str, n_words: int) -> np.ndarray:
    """The counts of words; they are small, and read whole."""
    try:
        content = path.read_bytes()
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    if hashlib.sha256(content).hexdigest() != digest or counts.shape != (2, n_words):
        raise UserError(f"{path} is not what its index says; prepare it again")
    return counts
