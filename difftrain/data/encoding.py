"""Text -> ids as arrays: by table where a word is a character or a byte, by its library where it is a tokenizer's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from difftrain.data.vocabulary import Bytes, Characters, Vocabulary
from difftrain.errors import UserError

CODES = 0x110000  # code points of Unicode


def dtype_of(n_words: int) -> np.dtype:
    """The type of ids on the disk: uint16 as long as they fit."""
    return np.dtype(np.uint16 if n_words <= 1 << 16 else np.uint32)


class Encoder:
    """Encodes pieces of documents, with a separator after each document.

    Args:
        vocabulary: whose ids are written.
        separator: text that follows a document; empty: nothing does. A tokenizer may have one word
            for it, such as ``<|endoftext|>``.
    """

    def __init__(self, vocabulary: Vocabulary, separator: str = "") -> None:
        self.vocabulary, self.dtype = vocabulary, dtype_of(vocabulary.n_words)
        self._separator = separator
        self._table = _table(vocabulary) if isinstance(vocabulary, Characters) else None
        self._bytes, self._foreign = b"", b""
        if self._table is not None:
            in_ascii, n_words = self._table[:128], vocabulary.n_words
            self._bytes = bytes(min(i, 255) for i in in_ascii.tolist()) + bytes(128)
            # Where an id is no byte, an ASCII text goes the way of any other.
            self._foreign = bytes(c for c in range(128) if in_ascii[c] == n_words or in_ascii[c] > 255)
        self._end = np.asarray(vocabulary.encode_marked(separator), self.dtype)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, (n,) uint16 or uint32; raises UserError for text outside the vocabulary."""
        if isinstance(self.vocabulary, Bytes):
            return np.frombuffer(self.vocabulary.to_bytes(text), np.uint8).astype(self.dtype)
        if self._table is not None:
            return self._look_up(text, self._table)
        return self._checked(self.vocabulary.encode(text))

    def _checked(self, found: list[int]) -> np.ndarray:
        ids = np.asarray(found, np.uint32)
        if ids.size and ids.max() >= self.vocabulary.n_words:
            raise UserError(
                f"the tokenizer gives the id {ids.max()}, but its vocabulary has {self.vocabulary.n_words} words"
            )
        return ids.astype(self.dtype, copy=False)

    def _look_up(self, text: str, table: np.ndarray) -> np.ndarray:
        if text.isascii():
            raw = text.encode("ascii")
            if not self._foreign or len(raw.translate(None, self._foreign)) == len(raw):
                return np.frombuffer(raw.translate(self._bytes), np.uint8).astype(self.dtype)
        ids = table[_codes(text)]
        if ids.size and ids.max() == self.vocabulary.n_words:
            self.vocabulary.encode(text)  # names what is outside
        return ids.astype(self.dtype, copy=False)

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> np.ndarray:
        """Ids of pieces one after the other; a piece comes with whether a document ends with it."""
        if isinstance(
            self.vocabulary, Bytes | Characters
        ):  # whose words do not reach from a piece into the next
            return self.encode("".join(text + self._separator if ends else text for text, ends in pieces))
        arrays = []
        found = self.vocabulary.encode_many([text for text, _ in pieces])
        for ids, (_, ends) in zip(found, pieces, strict=True):
            arrays.append(self._checked(ids))
            if ends:
                arrays.append(self._end)
        return np.concatenate(arrays) if arrays else np.empty(0, self.dtype)


def _codes(text: str) -> np.ndarray:
    """The code points of a text, (n,) uint8 or uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _table(vocabulary: Characters) -> np.ndarray:
    """The id of each code point; for those outside the vocabulary the number of its words."""
    n_words = len(vocabulary.characters)
    table = np.full(CODES, n_words, np.uint32 if n_words >= 1 << 16 else np.uint16)
    table[[ord(character) for character in vocabulary.characters]] = np.arange(n_words)
    return table


def count_words(ids: np.ndarray, n_words: int) -> np.ndarray:
    """How often each word stands among ids, (n_words,) int64."""
    if n_words > 256 or len(ids) < 1 << 16:
        return np.bincount(ids, minlength=n_words)
    # Two at a time, which is twice as fast.
    pairs = np.bincount(ids[: len(ids) // 2 * 2].astype(np.uint8).view(np.uint16), minlength=1 << 16)
    square = pairs.reshape(256, 256)
    counts = square.sum(0) + square.sum(1)
    if len(ids) % 2:
        counts[ids[-1]] += 1
    return counts[:n_words]


class Alphabet:
    """The characters that texts hold, collected."""

    def __init__(self, text: str = "") -> None:
        self._is_there = np.zeros(CODES, bool)
        self._known = b""  # of ASCII
        self.add(text)

    def add(self, text: str) -> None:
        if text.isascii():
            new = text.encode("ascii").translate(None, self._known)
            if not new:
                return
            self._known += bytes(set(new))
        self._is_there[_codes(text)] = True

    def unite(self, characters: Iterable[str]) -> None:
        for each in characters:
            self._is_there[ord(each)] = True

    def sorted(self) -> tuple[str, ...]:
        return tuple(map(chr, np.nonzero(self._is_there)[0].tolist()))
