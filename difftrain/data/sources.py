"""What there is to read: texts, JSON lines, Parquet and saved datasets, packed or not, cut into ranges of much the same size."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from difftrain.data.texts import BINARY, EMPTY, NOT_UTF8, UNREADABLE, find_files, name_in, summarize
from difftrain.errors import UserError, import_extra

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # by suffix; all else is text
PACKINGS = {".gz": "gz", ".zst": "zst"}
ROWS = ("jsonl", "parquet", "arrow")  # kinds whose rows are documents
SNIFFED = 1 << 16  # bytes that decide whether a file of a folder is text


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: where it lies; "-" is standard input before it is kept in a file.
        name: what names it in the draw of held-out documents: its path in the folder that was given, else its
            name, packed or not; "-" for standard input.
        kind: "text", "jsonl", "parquet" or "arrow".
        packing: "", "gz" or "zst".
        size, mtime_ns: by what it is known to be unchanged.
    """

    path: str
    name: str
    kind: str
    packing: str
    size: int
    mtime_ns: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return "standard input" if self.name == "-" else self.path


@dataclass(frozen=True)
class Range:
    """A part of a source: bytes of a file as it is, row groups of Parquet, all of any other (stop 0).

    Attributes:
        source: its number among the sources.
        size: bytes of it, for the bar.
    """

    source: int
    start: int
    stop: int
    size: int


def find_sources(
    names: Sequence[str], patterns: Sequence[str], kind: str
) -> tuple[list[Source], list[str]]:
    """The files that names stand for, in order, and a line about each folder among them.

    Args:
        names: files, folders, folders that ``datasets`` saved, or "-" for standard input.
        patterns: which files of a folder to take.
        kind: "auto" goes by the suffix; "text" and "jsonl" are what no suffix tells.

    Raises:
        UserError: something is not there, is no folder where there are patterns, or holds nothing.
    """
    sources, lines = [], []
    for name in names:
        path = Path(name)
        if name == "-":
            sources.append(Source("-", "-", "text" if kind == "auto" else kind, "", 0, 0))
        elif patterns and not path.is_dir():
            raise UserError(f"a pattern chooses files of a folder, and {name} is none")
        elif (path / "dataset_dict.json").is_file():
            raise UserError(f"{name} holds several splits of a dataset; name one, such as {path / 'train'}")
        elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            sources += [_source(file, f"{path.name}/{file.name}", "arrow") for file in _arrow_files(path)]
        elif path.is_dir():
            found, line = _of_folder(path, patterns, kind)
            sources += found
            lines.append(f"{name}: {line}")
        elif path.is_file():
            sources.append(_source(path, path.name, kind))
        else:
            raise UserError(f"there is no file or folder {name}")
    if not any(source.size or source.path == "-" for source in sources):
        raise UserError(f"{', '.join(names)} holds no text{': ' + lines[0] if lines else ''}")
    return [source for source in sources if source.size or source.path == "-"], lines


def _source(path: Path, name: str, kind: str) -> Source:
    stat, packing = path.stat(), PACKINGS.get(path.suffix, "")
    if kind == "auto":
        kind = KINDS.get((path.with_suffix("") if packing else path).suffix, "text")
    return Source(
        str(path),
        name.removesuffix(path.suffix) if packing else name,
        kind,
        packing,
        stat.st_size,
        stat.st_mtime_ns,
    )


def _of_folder(root: Path, patterns: Sequence[str], kind: str) -> tuple[list[Source], str]:
    left_out: dict[str, list[str]] = defaultdict(list)
    sources = []
    for path in find_files(root, patterns, left_out):
        source = _source(path, name_in(root, path), kind)
        reason = _why_not(source)
        if reason:
            left_out[reason].append(name_in(root, path))
        else:
            sources.append(source)
    return sources, summarize(len(sources), left_out)


def _why_not(source: Source) -> str:
    """Why a file of a folder is left out, by its beginning; empty where it is not."""
    if not source.size:
        return EMPTY
    try:
        with open(source.path, "rb") as file:
            start = file.read(SNIFFED)
    except PermissionError:
        return UNREADABLE
    if source.packing or source.kind == "parquet":
        return ""
    if b"\0" in start:
        return BINARY
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if len(start) < SNIFFED or error.start < len(start) - 3:  # else a character is cut
            return NOT_UTF8
    return ""


def _arrow_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} is not what datasets writes: {error!r}") from None
    if state.get("_indices_mapping") or state.get("_indices_files"):
        raise UserError(f"{folder} takes rows by an index; save dataset.flatten_indices()")
    for name in names:
        if os.sep in name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing")
    return [folder / name for name in names]


def plan_parts(sources: Sequence[Source], size: int) -> list[list[Range]]:
    """Ranges of all sources in order, grouped to about ``size`` bytes a part; a function of the sources alone."""
    parts: list[list[Range]] = []
    filled = 0
    for number, source in enumerate(sources):
        for piece in _ranges(number, source, size):
            if not parts or filled + piece.size > size:
                parts.append([])
                filled = 0
            parts[-1].append(piece)
            filled += piece.size
    return parts


def _ranges(number: int, source: Source, size: int) -> list[Range]:
    if source.kind == "parquet":
        metadata = open_parquet(source).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        return [
            Range(number, i, i + 1, max(1, source.size * n // max(1, sum(sizes))))
            for i, n in enumerate(sizes)
        ]
    if source.packing or source.kind == "arrow":
        return [Range(number, 0, 0, source.size)]
    ends = [*range(size, source.size, size), source.size]
    return [Range(number, start, stop, stop - start) for start, stop in zip([0, *ends], ends, strict=False)]


def open_parquet(source: Source):
    """A Parquet file (extra: data); raises UserError where it is none."""
    parquet = import_extra("pyarrow.parquet", "data")
    if source.packing:
        raise UserError(f"{source.path}: Parquet packs its columns itself; unpack the file")
    try:
        return parquet.ParquetFile(source.path, memory_map=True)
    except (OSError, ValueError) as error:  # pyarrow's errors are among both
        raise UserError(f"{source.path} is no whole Parquet file: {error}") from None
