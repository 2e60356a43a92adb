"""Documents: a range of a source -> pieces of text, each with what draws whether it is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from difftrain.data.blocks import Blocks
from difftrain.data.sources import Range, Source, open_parquet
from difftrain.data.texts import BINARY, NOT_UTF8
from difftrain.errors import UserError, import_extra

SPLITS = ("auto", "document", "block")
ROWS_AT_ONCE = 256  # of Parquet, as text in memory
MARK = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """A piece of a document.

    Attributes:
        key: what names its document, or its block of one: a name and an offset or number in it.
        text: at most about two blocks of a text file, or a whole row.
        ends: whether its document ends with it.
    """

    key: str
    text: str
    ends: bool


def is_held_out(key: str, share: float, seed: int) -> bool:
    """Whether a document or block is for validation: a function of its key and the seed alone."""
    draw = hashlib.blake2b(f"{seed} {key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(draw, "big") < share * 2**64


def read_pieces(
    source: Source,
    part: Range,
    *,
    split: str,
    field: str,
    newline: str,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Piece]:
    """The pieces of a range of a source, in order.

    Args:
        split: "document" or "block": what a piece's key names.
        field: the field or column of a row that holds its text.
        newline: as for :func:`difftrain.data.texts.read_text`.
        advance: is told how many bytes of the file were read since the last time.

    Raises:
        UserError: what is there is no text; the message names the file and the line or row.
    """
    if source.kind == "text":
        yield from _text(source, part, split, newline, advance)
        return
    rows = {"jsonl": _lines, "parquet": _parquet, "arrow": _arrow}[source.kind]
    for place, text in rows(source, part, field, advance):
        if newline == "universal" and "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text:
            yield Piece(f"{source.name}:{place}", text, True)


def _text(
    source: Source, part: Range, split: str, newline: str, advance: Callable[[int], None]
) -> Iterator[Piece]:
    blocks, told = Blocks(source, part.start, part.stop), 0
    waiting = None
    for offset, block in blocks:
        bad = block.find(b"\0")
        if bad >= 0:
            line = blocks.line_of(block.count(b"\n", 0, bad))
            raise UserError(f"{source.label}, line {line}: {BINARY}")
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            line = blocks.line_of(block.count(b"\n", 0, error.start))
            raise UserError(f"{source.label}, line {line}: {NOT_UTF8}") from None
        if newline == "universal":
            if not offset:
                text = text.removeprefix("\ufeff")
            if "\r" in text:
                text = text.replace("\r\n", "\n").replace("\r", "\n")
        if waiting:
            yield waiting
        waiting = Piece(f"{source.name}:{offset}" if split == "block" else source.name, text, False)
        advance(blocks.position - told)
        told = blocks.position
    is_last = not part.stop or part.stop == source.size
    if waiting or is_last:
        yield (waiting or Piece(source.name, "", False))._replace(ends=is_last)


def _lines(
    source: Source, part: Range, field: str, advance: Callable[[int], None]
) -> Iterator[tuple[int, str]]:
    blocks, told = Blocks(source, part.start, part.stop, whole_lines=True), 0
    for offset, block in blocks:
        lines = block.removesuffix(b"\n").split(b"\n")
        for i, line in enumerate(lines):
            if line.strip():
                try:
                    yield offset, _text_of(json.loads(line.removeprefix(MARK)), field)
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # UserError and UnicodeDecodeError are among them
                    what = error if isinstance(error, UserError) else f"no JSON: {error}"
                    raise UserError(f"{source.label}, line {blocks.line_of(i)}: {what}") from None
            offset += len(line) + 1
        advance(blocks.position - told)
        told = blocks.position


def _text_of(row: object, field: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"no JSON object, but {type(row).__name__}")
    if field not in row:
        raise UserError(
            f"there is no field {field!r}, only {', '.join(sorted(row)[:5]) or 'none'}; --field names it"
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"the field {field!r} must be a text, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the field {field!r} holds {text[error.start]!r}, which is no character"
            ) from None
    return text


def _parquet(
    source: Source, part: Range, field: str, advance: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    file = open_parquet(source)
    _check_columns(source, file.schema_arrow, field)
    batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[part.start], columns=[field])
    yield from _rows(source, batches, f"{part.start}.")
    advance(part.size)


def _arrow(
    source: Source, part: Range, field: str, advance: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    arrow, ipc = import_extra("pyarrow", "data"), import_extra("pyarrow.ipc", "data")
    try:
        with arrow.memory_map(source.path) as file, ipc.open_stream(file) as stream:
            _check_columns(source, stream.schema, field)
            batches = (batch.select([field]) for batch in stream)
            yield from _rows(source, batches, "")
    except arrow.ArrowInvalid as error:
        raise UserError(f"{source.label} is cut off or damaged: {error}") from None
    advance(part.size)


def _check_columns(source: Source, schema, field: str) -> None:
    if field not in schema.names:
        raise UserError(
            f"{source.label}: there is no column {field!r}, only {', '.join(schema.names[:5])}; --field names it"
        )


def _rows(source: Source, batches: Iterable, group: str) -> Iterator[tuple[str, str]]:
    number = 0
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:  # pyarrow's errors are among both
            raise UserError(f"{source.label}, row {group}{number}: {error}") from None
        if batch is None:
            return
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for text in batch.column(0).slice(start, ROWS_AT_ONCE).to_pylist():
                if not isinstance(text, str):
                    raise UserError(
                        f"{source.label}, row {group}{number}: it must hold a text, got {type(text).__name__}"
                    )
                yield f"{group}{number}", text
                number += 1
