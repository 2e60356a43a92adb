"""What is in a token file: a digest of it and its largest id, found once and then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.appearing import write_whole
from difftrain.data.preparing import cache_folder
from difftrain.errors import UserError
from difftrain.progress import progress

MEMO = ".difftrain.json"  # beside the token files, or else in the cache
BLOCK = 1 << 22  # bytes in memory at a time
LARGE = 1 << 30  # bytes; reading as many takes so long that it is said
SETTLED = 2 * 10**9  # ns; until then a file can change again within one tick of its file system's clock


@dataclass(frozen=True)
class Content:
    """What a token file holds.

    Attributes:
        sha256: digest of all its bytes, in hex.
        largest: its largest id.
    """

    sha256: str
    largest: int


def contents_of(
    folder: Path, names: Sequence[str], dtype: str, say: Callable[[str], None] | None = None
) -> list[Content]:
    """The content of each of a folder's token files, none of them empty.

    A file is read whole once, a block at a time. After that it counts as unchanged as long as its
    size and the times of its last change are the same.

    Args:
        folder: where the files lie.
        names: their names.
        dtype: "uint16" or "uint32".
        say: is told of a file that takes long to read.
    """
    memos = [_read_memo(file) for file in _memo_files(folder)]
    entries, settled, is_new = [], {}, False
    for name in names:
        marks = _marks(folder / name, dtype)
        entry = next((memo[name] for memo in memos if _fits(memo.get(name), marks)), None)
        if entry is None:
            if say and marks["size"] >= LARGE:
                say(f"reading {folder / name} once, to check its ids and to know it again")
            began = time.time_ns()
            entry = _read(folder / name, dtype)
            marks = _marks(folder / name, dtype)
            entry |= marks
            if max(marks["mtime_ns"], marks["ctime_ns"]) < began - SETTLED:
                settled[name], is_new = entry, True
        else:
            settled[name] = entry
        entries.append(entry)
    if is_new:
        _write_memo(folder, settled)
    return [Content(entry["sha256"], entry["largest"]) for entry in entries]


def remember(folder: Path, contents: dict[str, Content], dtype: str) -> None:
    """Keep what the files of a new folder hold, which its writer knows: nobody else has written to them."""
    entries = {
        name: {"sha256": content.sha256, "largest": content.largest} | _marks(folder / name, dtype)
        for name, content in contents.items()
    }
    (folder / MEMO).write_text(json.dumps(entries), encoding="utf-8")


def find_above(path: Path, dtype: str, bound: int) -> tuple[int, int] | None:
    """The first id of a token file that is ``bound`` or more, and its position from 0 on; None without one."""
    start = 0
    for block in _blocks(path):
        ids = np.frombuffer(block, dtype)
        (where,) = np.nonzero(ids >= bound)
        if len(where):
            return int(ids[where[0]]), start + int(where[0])
        start += len(ids)
    return None


def _read(path: Path, dtype: str) -> dict[str, Any]:
    digest, largest = hashlib.sha256(), 0
    with progress(what=f"checking {path.name}", unit="B", total=path.stat().st_size) as bar:
        for block in _blocks(path):
            digest.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype).max()))
            bar.update(len(block))
    return {"sha256": digest.hexdigest(), "largest": largest}


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _marks(path: Path, dtype: str) -> dict[str, Any]:
    """By what a file is known to be unchanged; its ctime also where a copy brought the old mtime along."""
    stat = path.stat()
    return {
        "dtype": dtype, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns,
    }  # fmt: skip


def _fits(entry: Any, marks: dict[str, Any]) -> bool:
    """Whether a memo's entry is one, and that of a file with these marks."""
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        return False
    return type(entry.get("largest")) is int and all(entry.get(key) == mark for key, mark in marks.items())


def _memo_files(folder: Path) -> list[Path]:
    files = [folder / MEMO]
    with contextlib.suppress(UserError):  # no cache: a memo is worth no error
        name = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
        files.append(cache_folder() / "contents" / f"{name}.json")
    return files


def _read_memo(file: Path) -> dict[str, Any]:
    try:
        memo = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return memo if isinstance(memo, dict) else {}


def _write_memo(folder: Path, entries: dict[str, Any]) -> None:
    """Remember in the first place that can be written, if there is one."""
    for file in _memo_files(folder):
        with contextlib.suppress(OSError):
            write_whole(file, json.dumps(entries))
            return
