"""Preparing a text: files -> a folder of token files in nanoGPT's format, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from difftrain.data.vocabulary import make_vocabulary
from difftrain.errors import UserError

HELD_OUT = 10  # one file in ten, or the last tenth of a single text, is for validation
FORMAT = 1  # part of the cache's key; raise it when the prepared files change


def prepare(
    name: str,
    *,
    tokenizer: str = "char",
    out: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Tokenise a text into a folder in nanoGPT's format, once; returns the folder.

    Args:
        name: "stdlib", a text file or a folder of text files. One file in ten is held out for
            validation; of a single file, its last tenth.
        tokenizer: "char", the path of a ``tokenizer.json``, or a tiktoken encoding's name.
        out: the folder to make; by default one in the cache, named by the text's digest.
        say: is told what is under way, where the folder is made.
    """
    say = say or (lambda _: None)
    if name == "stdlib":
        # The digest of a version string spares reading the whole library at every start.
        key = hashlib.sha256(f"{sys.version}{FORMAT}{tokenizer}".encode()).hexdigest()[:12]
        folder = out or cache_folder() / f"stdlib-{key}"
        if out or not (folder / "meta.json").exists():
            say("preparing stdlib: reading its files")
            _write_folder(folder, *_split(_read_texts(_stdlib_files())), tokenizer, say)
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
    _write_folder(out, train, val, tokenizer, say)
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


def _write_folder(folder: Path, train: str, val: str, tokenizer: str, say: Callable[[str], None]) -> None:
    """Write the token files aside and rename the folder into place, so that no half of it is ever read."""
    vocabulary = make_vocabulary(tokenizer, train + val)
    dtype = np.uint16 if vocabulary.n_words <= 1 << 16 else np.uint32
    if folder.exists():
        raise UserError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, text in (("train", train), ("val", val)):
            say(f"preparing {folder}: {split}.bin from {len(text):,} characters")
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
