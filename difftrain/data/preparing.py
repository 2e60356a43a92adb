"""Preparing a text: files -> a folder of token files in nanoGPT's format, once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from difftrain.appearing import appearing
from difftrain.config.paths import expand_path
from difftrain.data.encoding import Encoder, dtype_of
from difftrain.data.texts import NEWLINES, NotText, read_text, read_texts
from difftrain.data.vocabulary import Bytes, Characters, Vocabulary, make_vocabulary, read_tokenizer
from difftrain.errors import UserError
from difftrain.progress import progress

HELD_OUT = 10  # one file in ten, or the last tenth of a single text, is for validation
PIECE = 1 << 20  # characters encoded at a time, where each is a word
FORMAT = 2  # part of the cache's key; raise it when the prepared files change


def prepare(
    name: str,
    *,
    tokenizer: str = "char",
    out: Path | None = None,
    patterns: Sequence[str] = (),
    newline: str = "universal",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Tokenise a text into a folder in nanoGPT's format, once; returns the folder.

    Args:
        name: "stdlib", a text file or a folder of text files. One file in ten is held out for
            validation; of a single file, its last tenth.
        tokenizer: "char", "bytes", the path of a ``tokenizer.json``, or a tiktoken encoding's name.
        out: the folder to make; by default one in the cache, named by the text's digest.
        patterns: which files of a folder to take, by name or path; by default every text.
        newline: "universal": a byte-order mark goes, CRLF and CR become LF; "keep": as they are.
        say: is told what is under way, where the folder is made; and where it is made from a folder of
            texts, what was taken and what was left out.

    Raises:
        UserError: no text to train on, a pattern where there is no folder, an ``out`` that is there.
    """
    say = say or (lambda _: None)
    if newline not in NEWLINES:
        raise UserError(f"newline must be {' or '.join(NEWLINES)}, got {newline!r}")
    if out and out.exists():
        raise UserError(f"{out} exists already")
    if patterns and (name == "stdlib" or not Path(name).is_dir()):
        raise UserError(f"a pattern chooses files of a folder, and {name} is none")
    # What the token files depend on beside the text; a tokenizer's file can change under its name.
    key = f"{FORMAT} {newline} {read_tokenizer(tokenizer)}"
    if name == "stdlib":
        # The digest of a version string spares reading the whole library at every start.
        folder = out or cache_folder() / f"stdlib-{_digest(key, sys.version)}"
        if out or not (folder / "meta.json").exists():
            say("preparing stdlib: reading its files")
            files = progress(_stdlib_files(), what="reading", unit="file")
            texts = (read_text(file, newline) for file in files)
            _write_folder(folder, *_split([text for text in texts if text]), tokenizer, say)
        return folder
    texts, summary = _read(Path(name), patterns, newline)
    train, val = _split(texts)
    if len(train) < 2 or len(val) < 1:
        raise UserError(f"{name} is too short to train on: {len(train) + len(val)} characters")
    folder = out or cache_folder() / f"{Path(name).stem}-{_digest(key, train, val)}"
    if out or not (folder / "meta.json").exists():
        if summary:
            say(f"{name}: {summary}")
        _write_folder(folder, train, val, tokenizer, say)
    return folder


def cache_folder() -> Path:
    """Where prepared texts are kept: $DIFFTRAIN_CACHE, else difftrain in the user's cache."""
    own = os.environ.get("DIFFTRAIN_CACHE")
    return Path(expand_path(own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/difftrain"))


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, without its tests and pure ASCII ones only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (p for p in root.rglob("*.py") if not leave & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.is_file() and _is_plain(p.read_bytes()))


def _is_plain(content: bytes) -> bool:
    return content.isascii() and b"\0" not in content


def _read(path: Path, patterns: Sequence[str], newline: str) -> tuple[list[str], str]:
    """The texts of a file or a folder, and what is to be said about a folder."""
    if path.is_dir():
        texts, summary = read_texts(path, patterns, newline)
        if not texts:
            raise UserError(f"{path} holds neither train.bin nor text files: {summary}")
        return texts, summary
    if not path.is_file():
        raise UserError(f"data must be stdlib, a text file or a folder, and there is no {path}")
    try:
        text = read_text(path, newline)
    except NotText as reason:
        raise UserError(f"{path} is {reason}") from None
    if not text:
        raise UserError(f"{path} is empty")
    return [text], ""


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
    """Write the token files, so that no half of them is ever read."""
    vocabulary = make_vocabulary(tokenizer, train + val)
    try:
        with appearing(folder) as aside:
            aside.mkdir()
            for split, text in (("train", train), ("val", val)):
                say(f"preparing {folder}: {split}.bin from {len(text):,} characters")
                _encode(vocabulary, text).tofile(aside / f"{split}.bin")
            meta = vocabulary.to_meta() | {"dtype": dtype_of(vocabulary.n_words).name}
            (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    except OSError:
        if not (folder / "meta.json").exists():  # else another process made it meanwhile
            raise


def _encode(vocabulary: Vocabulary, text: str) -> np.ndarray:
    """The ids of a text. Where words may be longer than a character, a text cannot be cut without changing them."""
    encoder = Encoder(vocabulary)
    if not isinstance(vocabulary, Characters | Bytes):
        return encoder.encode(text)
    starts = progress(range(0, len(text), PIECE), what="encoding", unit="piece")
    pieces = [encoder.encode(text[start : start + PIECE]) for start in starts]
    return np.concatenate(pieces) if pieces else np.empty(0, encoder.dtype)
