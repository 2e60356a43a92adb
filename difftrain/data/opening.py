"""Opening a corpus: a folder of token files in nanoGPT's format, or a text that is prepared first."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.data.contents import contents_of, find_above
from difftrain.data.corpus import Corpus
from difftrain.data.preparing import prepare
from difftrain.data.shards import is_sharded, read_index
from difftrain.data.vocabulary import Ids, from_meta
from difftrain.errors import UserError

FILES = ("train.bin", "val.bin")
GPT2_WORDS = 50257  # nanoGPT's folders without meta data hold GPT-2's byte-pair encoding


def open_corpus(name: str, say: Callable[[str], None] | None = None) -> Corpus:
    """The corpus that the option ``data`` names; a text is prepared on first use.

    Args:
        name: "stdlib", a text file, a folder with ``train.bin`` and ``val.bin`` or with shards, or any
            other folder, whose text files are taken.
        say: is told what is taken from a folder of texts, and of what takes long.

    Raises:
        UserError: nothing usable is there.
    """
    path = Path(name)
    if name != "stdlib" and path.is_dir() and ((path / "train.bin").exists() or is_sharded(path)):
        return read_folder(path, say)
    return read_folder(prepare(name, say=say), say)


def read_folder(folder: Path, say: Callable[[str], None] | None = None) -> Corpus:
    """A folder in nanoGPT's format: ``train.bin``, ``val.bin`` and ``meta.json`` or ``meta.pkl``; or one of shards.

    The first time, every token is read, to check that it is an id of the vocabulary; shards
    were checked when they were made.
    """
    meta: dict[str, Any] = {}
    if (folder / "meta.json").exists():
        meta = read_json(folder / "meta.json")
        vocabulary = from_meta(meta, str(folder / "meta.json"))
    elif (folder / "meta.pkl").exists():
        meta = read_plain_pickle(folder / "meta.pkl")
        vocabulary = from_meta(meta, str(folder / "meta.pkl"))
    else:
        vocabulary = Ids(GPT2_WORDS)
    dtype = meta.get("dtype", "uint16")
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"{folder}: dtype must be uint16 or uint32, got {dtype!r}")
    if is_sharded(folder):
        index = read_index(folder, dtype, vocabulary.n_words, say)
        digests = {f"{split}.bin": digest for split, digest in index.digests.items()}
        counts = dict(zip(index.splits, index.counts, strict=True))
        return Corpus(
            **index.splits,
            vocabulary=vocabulary,
            folder=folder,
            record={"dtype": dtype, **digests},
            counts=counts,
        )
    for name in FILES:
        _check_size(folder / name, dtype)
    record = {"dtype": dtype}
    for name, content in zip(FILES, contents_of(folder, FILES, dtype, say), strict=True):
        record[name] = content.sha256
        n_words = vocabulary.n_words
        if content.largest >= n_words and (found := find_above(folder / name, dtype, n_words)):
            raise UserError(
                f"{folder / name} holds the id {found[0]} at position {found[1]}, "
                f"but its vocabulary has {n_words} words"
            )
    splits = [np.memmap(folder / name, dtype=dtype, mode="r") for name in FILES]
    return Corpus(*splits, vocabulary, folder, record)


def _check_size(path: Path, dtype: str) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"{path} is missing or empty")
    if path.stat().st_size % np.dtype(dtype).itemsize:
        raise UserError(f"{path} is no file of {dtype}: its size is {path.stat().st_size} bytes")


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises UserError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Admits what needs no class: containers, strings and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """A pickle of plain containers, strings and numbers; anything else raises UserError unexecuted."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except Exception as error:  # a hostile pickle can raise anything
        raise UserError(f"{path} is refused: it must hold plain data only ({error})") from None
