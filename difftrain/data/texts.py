"""Which files are texts, and how a text is read: as UTF-8, its line ends as Python's text files have them."""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from difftrain.progress import progress

NEWLINES = ("universal", "keep")
FOREIGN = {"venv", "node_modules", "__pycache__", "site-packages"}  # folders of other people's code
NAMED = 3  # entries that are named for each reason to leave some out

# Why an entry is left out, as the line about a folder says it.
HIDDEN, ENVIRONMENT = "hidden", "of an environment or a cache"
NO_FILE, NO_MATCH, TWICE = "no file or a broken link", "of another name", "reached twice"
BINARY, NOT_UTF8, EMPTY = "binary, with NUL bytes", "not UTF-8 text", "empty"
UNREADABLE = "not readable"


class NotText(Exception):
    """A file is no text; the message says what it is."""


def read_text(path: Path, newline: str) -> str:
    """The text of a file, which may be empty; raises NotText.

    With ``newline`` "universal" a byte-order mark goes and CRLF and CR become LF, as ``utf-8-sig``
    and universal newlines have it; with "keep" all stays as it is.
    """
    return decode_text(path.read_bytes(), newline)


def decode_text(content: bytes, newline: str) -> str:
    """The text that bytes are, as :func:`read_text` reads a file's."""
    if b"\0" in content:
        raise NotText(BINARY)
    try:
        text = content.decode("utf-8" if newline == "keep" else "utf-8-sig")
    except UnicodeDecodeError:
        raise NotText(NOT_UTF8) from None
    return text if newline == "keep" else text.replace("\r\n", "\n").replace("\r", "\n")


def read_texts(root: Path, patterns: Sequence[str], newline: str) -> tuple[list[str], str]:
    """The texts below a folder in the order of their paths, and one line on what was taken and left out.

    Args:
        root: the folder; its own name may be anything.
        patterns: take only files that one of these matches; none: all. One without a slash is for a
            file's name, one with a slash for its path below ``root``; ``*`` matches slashes too.
        newline: as for :func:`read_text`.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    texts = []
    for path in progress(find_files(root, patterns, left_out), what="reading", unit="file"):
        try:
            text = read_text(path, newline)
            reason = "" if text else EMPTY
        except NotText as what:
            reason = str(what)
        except PermissionError:
            reason = UNREADABLE
        if reason:
            left_out[reason].append(name_in(root, path))
        else:
            texts.append(text)
    return texts, summarize(len(texts), left_out)


def find_files(root: Path, patterns: Sequence[str], left_out: dict[str, list[str]]) -> list[Path]:
    """Files below a folder by path, each once; where one can be reached without a link, by that way."""
    found, folders, links = [], [root], []  # links: a heap
    home = root.resolve()
    seen = {home, *home.parents}  # a link to a folder above would lead back here
    while folders or links:
        entries = []
        if folders:
            folder = folders.pop()
            try:
                inside = list(folder.iterdir())
            except PermissionError:
                left_out[UNREADABLE].append(name_in(root, folder))
                continue
            for entry in inside:
                if entry.is_symlink():
                    heapq.heappush(links, entry)
                else:
                    entries.append(entry)
        else:
            entries.append(heapq.heappop(links))
        for entry in sorted(entries):
            reason = _why_not(entry, patterns, seen, root)
            if reason:
                left_out[reason].append(name_in(root, entry))
                continue
            seen.add(entry.resolve())
            (folders if entry.is_dir() else found).append(entry)
    return sorted(found)


def _why_not(entry: Path, patterns: Sequence[str], seen: set[Path], root: Path) -> str:
    """Why an entry is left out; empty where it is not."""
    if entry.name.startswith("."):
        return HIDDEN
    if os.path.isdir(entry):  # os.path's tests are no errors where something is not readable
        if entry.name in FOREIGN or os.path.exists(entry / "pyvenv.cfg"):
            return ENVIRONMENT
    elif not os.path.isfile(entry):
        return NO_FILE
    elif patterns and not any(_matches(entry, pattern, root) for pattern in patterns):
        return NO_MATCH
    return TWICE if entry.resolve() in seen else ""


def _matches(path: Path, pattern: str, root: Path) -> bool:
    pattern = pattern.replace("**/", "")  # any folders or none, which * is too
    return fnmatchcase(name_in(root, path) if "/" in pattern else path.name, pattern)


def name_in(root: Path, path: Path) -> str:
    """A file's or a folder's path below a folder, as it is written in lists of what was left out."""
    return path.relative_to(root).as_posix() + ("/" if os.path.isdir(path) else "")


def summarize(n_taken: int, left_out: dict[str, list[str]]) -> str:
    """The line about a folder: how many files were taken, and which were left out for what reason."""
    parts = []
    for reason, names in left_out.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{len(names)} {reason} ({', '.join(sorted(names)[:NAMED])}{more})")
    n_left_out = sum(map(len, left_out.values()))
    line = f"{n_taken} text file{'s' * (n_taken != 1)} taken, {n_left_out} left out"
    return f"{line}: {'; '.join(parts)}" if parts else line
