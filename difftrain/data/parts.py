"""One part of a preparation: its ranges read, encoded and written as shards, by whichever process."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.appearing import replacing, write_whole
from difftrain.data.documents import SPLITS, Piece, is_held_out, read_pieces
from difftrain.data.encoding import Alphabet, Encoder, count_words
from difftrain.data.sources import Range, Source
from difftrain.data.texts import NEWLINES
from difftrain.data.vocabulary import from_meta
from difftrain.errors import UserError

SPLIT_NAMES = ("train", "val")
AT_ONCE = 1 << 20  # characters encoded together


@dataclass(frozen=True)
class ShardRequest:
    """What to make of texts; the fields are the options of ``difftrain prepare``.

    Attributes:
        tokenizer: "char", "bytes", the path of a ``tokenizer.json``, or a tiktoken encoding's name.
        train_bpe: learn a byte-pair vocabulary of so many words instead; 0: do not.
        patterns: which files of a folder to take.
        format: "auto" goes by a file's name; else "text" or "jsonl" for all.
        field: the field or column of a row that is its text.
        newline: "universal" or "keep".
        separator: text after each document.
        split: "document", "block" (about 64 KiB of lines) or "auto": documents where there are rows or
            at least MANY files.
        val_share: share of the documents or blocks that is held out, in (0, 1).
        seed: of the draw.
        shard_bytes: about so much of the sources goes into a shard.
    """

    tokenizer: str = "char"
    train_bpe: int = 0
    patterns: tuple[str, ...] = ()
    format: str = "auto"
    field: str = "text"
    newline: str = "universal"
    separator: str = "\n"
    split: str = "auto"
    val_share: float = 0.1
    seed: int = 0
    shard_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        for name, choices in {
            "format": ("auto", "text", "jsonl"),
            "newline": NEWLINES,
            "split": SPLITS,
        }.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 < self.val_share < 1:
            raise UserError(f"val_share must be in (0, 1), got {self.val_share:g}")
        if self.train_bpe and self.train_bpe < 257:
            raise UserError(f"train_bpe must be at least 257, the bytes and a mark, got {self.train_bpe}")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes must be at least 1, got {self.shard_bytes}")


@dataclass(frozen=True)
class Job:
    """A preparation as every process knows it: what to read, how, and where to write."""

    request: ShardRequest
    sources: list[Source]
    parts: list[list[Range]]
    folder: Path

    def pieces(self, number: int, advance: Callable[[int], None]) -> Iterator[Piece]:
        """The pieces of a part, in order."""
        request = self.request
        for piece_range in self.parts[number]:
            yield from read_pieces(
                self.sources[piece_range.source], piece_range,
                split=request.split, field=request.field, newline=request.newline, advance=advance,
            )  # fmt: skip


def collect_alphabet(job: Job, number: int, advance: Callable[[int], None]) -> tuple[str, ...]:
    """The characters of a part."""
    alphabet = Alphabet()
    for piece in job.pieces(number, advance):
        alphabet.add(piece.text)
    return alphabet.sorted()


def record_file(folder: Path, number: int) -> Path:
    """Where it stands that a part is done, and what it came to."""
    return folder / f"part-{number:05}.json"


def counts_file(folder: Path, number: int) -> Path:
    """How often each word stands in a part's splits, (2, n_words) int64."""
    return folder / f"part-{number:05}.npy"


def write_part(job: Job, meta: dict[str, Any], number: int, advance: Callable[[int], None]) -> None:
    """Write a part's shards, and then the record by which it counts as done.

    Args:
        meta: the vocabulary, as ``meta.json`` has it.
        advance: is told how many bytes of the sources were read since the last time.
    """
    request = job.request
    encoder = Encoder(from_meta(meta, "the vocabulary"), request.separator)
    record: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        shards = [
            stack.enter_context(_Shard(job.folder / f"{name}-{number:05}.bin", encoder))
            for name in SPLIT_NAMES
        ]
        for piece in job.pieces(number, advance):
            shards[is_held_out(piece.key, request.val_share, request.seed)].add(piece.text, piece.ends)
        for name, shard in zip(SPLIT_NAMES, shards, strict=True):
            record[name] = shard.finish()
        counts = np.stack([shard.counts for shard in shards])
    with replacing(counts_file(job.folder, number)) as file:
        np.save(file, counts)
    write_whole(record_file(job.folder, number), json.dumps(record))


class _Shard:
    """A shard that is being written; within ``with``, after which nothing half-written stays."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self._path, self._encoder = path, encoder
        self._pieces: list[tuple[str, bool]] = []
        self._waiting = self._tokens = self._documents = 0
        self._digest = hashlib.sha256()
        self.counts = np.zeros(encoder.vocabulary.n_words, np.int64)

    def __enter__(self) -> _Shard:
        self._context = replacing(self._path)
        self._file = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        if not self._tokens:
            self._path.unlink(missing_ok=True)

    def add(self, text: str, ends: bool) -> None:
        self._pieces.append((text, ends))
        self._documents += ends
        self._waiting += len(text)
        if self._waiting >= AT_ONCE:
            self._write()

    def finish(self) -> dict[str, Any] | None:
        """Write what waits; what the index says of this shard, None where it is empty."""
        self._write()
        if not self._tokens:
            return None
        return {
            "file": self._path.name, "tokens": self._tokens, "documents": self._documents,
            "sha256": self._digest.hexdigest(), "largest": int(np.nonzero(self.counts)[0][-1]),
        }  # fmt: skip

    def _write(self) -> None:
        ids = self._encoder.encode_pieces(self._pieces)
        self._pieces, self._waiting = [], 0
        self._file.write(ids.data)
        self._digest.update(ids.data)
        self._tokens += len(ids)
        self.counts += count_words(ids, len(self.counts))
