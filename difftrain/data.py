"""Data: a text or a folder of token files -> clean tokens (B, T), each window fixed by its sample index."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difftrain.config import Config, UserError
from difftrain.philox import random_words
from difftrain.vocabulary import Ids, Vocabulary, from_meta, make_vocabulary

STREAMS = {"train": 3, "val": 4}  # Philox streams; those of the corruption are in corruption.py
HELD_OUT = 10  # one file in ten, or the last tenth of a single text, is for validation
GPT2_WORDS = 50257  # nanoGPT's folders without meta data hold GPT-2's byte-pair encoding
FORMAT = 1  # part of the cache's key; raise it when the prepared files change


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two token files and their vocabulary.

    Attributes:
        train, val: 1-d arrays of token ids (uint16 or uint32), mapped from their files.
        vocabulary: words of the ids.
        folder: where the files lie.
    """

    train: np.ndarray
    val: np.ndarray
    vocabulary: Vocabulary
    folder: Path

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

    def unigram_entropy(self) -> float:
        """Entropy of the validation file's words in nats: what guessing by frequency costs."""
        counts = np.bincount(self.val)
        share = counts[counts > 0] / len(self.val)
        return float(-(share * np.log(share)).sum())

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
    return torch.arange(first, first + sequences)


# Opening and preparing ----------------------------------------------------------------------------


def open_corpus(name: str) -> Corpus:
    """The corpus that the option ``data`` names; a text is prepared on first use.

    Args:
        name: "stdlib", a text file, a folder with ``train.bin`` and ``val.bin``, or any other
            folder, whose text files are taken.

    Raises:
        UserError: nothing usable is there.
    """
    path = Path(name)
    if name != "stdlib" and path.is_dir() and (path / "train.bin").exists():
        return read_folder(path)
    return read_folder(prepare(name))


def read_folder(folder: Path) -> Corpus:
    """A folder in nanoGPT's format: ``train.bin``, ``val.bin`` and ``meta.json`` or ``meta.pkl``."""
    meta: dict[str, Any] = {}
    if (folder / "meta.json").exists():
        meta = _read_json(folder / "meta.json")
        vocabulary = from_meta(meta, str(folder / "meta.json"))
    elif (folder / "meta.pkl").exists():
        meta = read_plain_pickle(folder / "meta.pkl")
        vocabulary = from_meta(meta, str(folder / "meta.pkl"))
    else:
        vocabulary = Ids(GPT2_WORDS)
    dtype = meta.get("dtype", "uint16")
    if dtype not in ("uint16", "uint32"):
        raise UserError(f"{folder}: dtype must be uint16 or uint32, got {dtype!r}")
    splits = [_map_tokens(folder / f"{split}.bin", dtype, vocabulary.n_words) for split in ("train", "val")]
    return Corpus(*splits, vocabulary, folder)


def prepare(name: str, *, tokenizer: str = "char", out: Path | None = None) -> Path:
    """Tokenise a text into a folder in nanoGPT's format, once; returns the folder.

    Args:
        name: "stdlib", a text file or a folder of text files. One file in ten is held out for
            validation; of a single file, its last tenth.
        tokenizer: "char", the path of a ``tokenizer.json``, or a tiktoken encoding's name.
        out: the folder to make; by default one in the cache, named by the text's digest.
    """
    if name == "stdlib":
        # The digest of a version string spares reading the whole library at every start.
        key = hashlib.sha256(f"{sys.version}{FORMAT}{tokenizer}".encode()).hexdigest()[:12]
        folder = out or cache_folder() / f"stdlib-{key}"
        if out or not (folder / "meta.json").exists():
            _write_folder(folder, *_split(_read_texts(_stdlib_files())), tokenizer)
        return folder
    path = Path(name)
    if path.is_file():
        texts = _read_texts([path])
    elif path.is_dir():
        texts = _read_texts(sorted(p for p in path.rglob("*") if p.is_file()), skip_binary=True)
        if not texts:
            raise UserError(f"{path} holds neither train.bin nor text files")
    else:
        raise UserError(f"data must be stdlib, a text file or a folder, and there is no {name}")
    train, val = _split(texts)
    if len(train) < 2 or len(val) < 1:
        raise UserError(f"{path} is too short to train on: {len(train) + len(val)} characters")
    if out is None:
        key = hashlib.sha256(f"{FORMAT}{tokenizer}\0{train}\0{val}".encode()).hexdigest()[:12]
        out = cache_folder() / f"{path.stem}-{key}"
        if (out / "meta.json").exists():
            return out
    _write_folder(out, train, val, tokenizer)
    return out


def cache_folder() -> Path:
    """Where prepared texts are kept: $DIFFTRAIN_CACHE, else difftrain in the user's cache."""
    if "DIFFTRAIN_CACHE" in os.environ:
        return Path(os.environ["DIFFTRAIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difftrain"


def _stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, without its tests and pure ASCII ones only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (p for p in root.rglob("*.py") if not leave & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.is_file() and p.read_bytes().isascii())


def _read_texts(paths: list[Path], skip_binary: bool = False) -> list[str]:
    texts = []
    for path in paths:
        try:
            texts.append(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            if not skip_binary:
                raise UserError(f"{path} is not UTF-8 text") from None
    if paths and not any(texts) and not skip_binary:
        raise UserError(f"{paths[0]} is empty")
    return [text for text in texts if text]


def _split(texts: list[str]) -> tuple[str, str]:
    """Training and validation text: every tenth file is held out, or the last tenth of few files."""
    if len(texts) >= HELD_OUT:
        held_out = texts[HELD_OUT - 1 :: HELD_OUT]
        rest = [text for i, text in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1]
        return "\n".join(rest), "\n".join(held_out)
    text = "\n".join(texts)
    cut = len(text) - len(text) // HELD_OUT
    return text[:cut], text[cut:]


def _write_folder(folder: Path, train: str, val: str, tokenizer: str) -> None:
    """Write the token files aside and rename the folder into place, so that no half of it is ever read."""
    vocabulary = make_vocabulary(tokenizer, train + val)
    dtype = np.uint16 if vocabulary.n_words <= 1 << 16 else np.uint32
    if folder.exists():
        raise UserError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, text in (("train", train), ("val", val)):
            np.asarray(vocabulary.encode(text), dtype=dtype).tofile(aside / f"{split}.bin")
        meta = vocabulary.to_meta() | {"dtype": np.dtype(dtype).name}
        (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process made it meanwhile
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _map_tokens(path: Path, dtype: str, n_words: int) -> np.ndarray:
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"{path} is missing or empty")
    if path.stat().st_size % np.dtype(dtype).itemsize:
        raise UserError(f"{path} is no file of {dtype}: its size is {path.stat().st_size} bytes")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    largest = int(tokens[: 1 << 24].max())  # a look at the start finds a wrong vocabulary or dtype
    if largest >= n_words:
        raise UserError(f"{path} holds the id {largest}, but its vocabulary has {n_words} words")
    return tokens


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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
