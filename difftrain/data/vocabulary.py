"""Vocabularies: text <-> ids of the data's words. [MASK] is the id after the last word."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from difftrain.errors import UserError, import_extra


class Vocabulary:
    """Words with ids 0 .. n_words - 1."""

    n_words: int

    @property
    def vocab_size(self) -> int:
        """Words and [MASK]."""
        return self.n_words + 1

    @property
    def mask_id(self) -> int:
        return self.n_words

    def to_meta(self) -> dict[str, Any]:
        """What ``meta.json`` and a checkpoint store; :func:`from_meta` reads it back."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of a text; raises UserError for text outside the vocabulary."""
        raise NotImplementedError

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, each as :meth:`encode` gives them; a library may be faster so."""
        return [self.encode(text) for text in texts]

    def encode_known(self, text: str) -> tuple[list[int], dict[int, str]]:
        """Ids of a text with [MASK] for what is outside the vocabulary, and that by its place among the ids."""
        return self.encode(text), {}

    def encode_marked(self, text: str) -> list[int]:
        """As :meth:`encode`, where marks such as ``<|endoftext|>`` are the words that a tokenizer has for them."""
        return self.encode(text)

    def decode_words(self, ids: list[int]) -> str:
        """Text of ids without [MASK]."""
        raise NotImplementedError

    def decode(self, ids: list[int], mask: str = "_") -> str:
        """Text of ids, with ``mask`` for each [MASK]."""
        runs: list[list[int]] = [[]]
        for i in ids:
            if i == self.mask_id:
                runs.append([])
            else:
                runs[-1].append(i)
        return mask.join(self.decode_words(run) for run in runs)


@dataclass(frozen=True)
class Ids(Vocabulary):
    """Words without text: only their number is known, and a word's text is ``<id>``."""

    n_words: int

    def to_meta(self) -> dict[str, Any]:
        return {"kind": "ids", "vocab_size": self.n_words}

    def encode(self, text: str) -> list[int]:
        if text:
            raise UserError(
                "the data has a vocabulary size only (no text in its meta data), so text cannot be encoded"
            )
        return []

    def decode_words(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


@dataclass(frozen=True)
class Characters(Vocabulary):
    """One word a character."""

    characters: tuple[str, ...]

    @property
    def n_words(self) -> int:
        return len(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters)}

    def to_meta(self) -> dict[str, Any]:
        return {"kind": "char", "vocab_size": self.n_words, "itos": list(self.characters)}

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise UserError(f"characters outside the vocabulary: {' '.join(map(repr, unknown))}")
        return [self._ids[character] for character in text]

    def encode_known(self, text: str) -> tuple[list[int], dict[int, str]]:
        ids = [self._ids.get(character, self.mask_id) for character in text]
        return ids, {i: character for i, character in enumerate(text) if character not in self._ids}

    def decode_words(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids)


@dataclass(frozen=True)
class Bytes(Vocabulary):
    """One word a byte of the text as UTF-8; an id is the byte. What is no UTF-8 is shown as U+FFFD."""

    n_words = 256

    def to_meta(self) -> dict[str, Any]:
        return {"kind": "bytes", "vocab_size": self.n_words}

    def to_bytes(self, text: str) -> bytes:
        """A text as UTF-8; raises UserError where it has no such form."""
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds {text[error.start]!r}, which is no character") from None

    def encode(self, text: str) -> list[int]:
        return list(self.to_bytes(text))

    def decode_words(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@dataclass(frozen=True)
class Tokenizer(Vocabulary):
    """The words of a Hugging Face ``tokenizer.json``, kept whole in the meta data (extra: tok)."""

    definition: str

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizers = import_extra("tokenizers", "tok")
        try:
            return tokenizers.Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"not a tokenizer.json: {error}") from None

    @cached_property
    def n_words(self) -> int:
        return self._tokenizer.get_vocab_size()

    def to_meta(self) -> dict[str, Any]:
        return {"kind": "tokenizer", "vocab_size": self.n_words, "definition": self.definition}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_words(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


@dataclass(frozen=True)
class Tiktoken(Vocabulary):
    """The words of a tiktoken encoding such as gpt2 (extra: tok)."""

    name: str

    @cached_property
    def _encoding(self) -> Any:
        tiktoken = import_extra("tiktoken", "tok")
        try:
            return tiktoken.get_encoding(self.name)
        except ValueError as error:
            raise UserError(str(error).splitlines()[0]) from None

    @cached_property
    def n_words(self) -> int:
        return self._encoding.n_vocab

    def to_meta(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "vocab_size": self.n_words, "name": self.name}

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_marked(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def decode_words(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


def from_meta(meta: dict[str, Any], origin: str) -> Vocabulary:
    """The vocabulary that a ``meta.json`` (or nanoGPT's ``meta.pkl``) describes.

    Raises:
        UserError: the description is not one; the message names ``origin``.
    """
    if not isinstance(meta, dict):
        raise UserError(f"{origin} must hold an object, got {type(meta).__name__}")
    kind = meta.get("kind", "char" if "itos" in meta else "ids")
    if kind == "char":
        itos = meta.get("itos")
        if isinstance(itos, dict):  # nanoGPT: {0: '\n', 1: ' ', ...}
            itos = [itos.get(i) for i in range(len(itos))]
        if not isinstance(itos, list) or not all(isinstance(c, str) and len(c) == 1 for c in itos):
            raise UserError(f"{origin}: itos must list one character for each id from 0 on")
        vocabulary: Vocabulary = Characters(tuple(itos))
    elif kind == "bytes":
        vocabulary = Bytes()
    elif kind == "tokenizer" and isinstance(meta.get("definition"), str):
        vocabulary = Tokenizer(meta["definition"])
    elif kind == "tiktoken" and isinstance(meta.get("name"), str):
        vocabulary = Tiktoken(meta["name"])
    elif kind == "ids" and isinstance(meta.get("vocab_size"), int):
        vocabulary = Ids(meta["vocab_size"])
    else:
        raise UserError(
            f"{origin} must give vocab_size, or a kind of char, bytes, tokenizer, tiktoken or ids"
        )
    return with_two_words(vocabulary, origin)


def make_vocabulary(name: str, text: str) -> Vocabulary:
    """The vocabulary that ``difftrain prepare --tokenizer NAME`` asks for.

    Args:
        name: "char" (the text's own characters), "bytes", the path of a ``tokenizer.json``, or the name of
            a tiktoken encoding.
        text: the text to prepare.
    """
    if name == "char":
        vocabulary: Vocabulary = Characters(tuple(sorted(set(text))))
    elif name == "bytes":
        vocabulary = Bytes()
    elif name.endswith(".json"):
        vocabulary = Tokenizer(read_tokenizer(name))
    else:
        vocabulary = Tiktoken(name)
    return with_two_words(vocabulary, "the text")


def read_tokenizer(name: str) -> str:
    """What a tokenizer's words depend on: the content of its ``tokenizer.json``, or else its name."""
    if not name.endswith(".json"):
        return name
    if not Path(name).is_file():
        raise UserError(f"tokenizer file not found: {name}")
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text") from None


def with_two_words(vocabulary: Vocabulary, origin: str) -> Vocabulary:
    """The vocabulary, if a word can be replaced by another one."""
    if vocabulary.n_words < 2:
        raise UserError(f"{origin}: a vocabulary must have at least 2 words, got {vocabulary.n_words}")
    return vocabulary
