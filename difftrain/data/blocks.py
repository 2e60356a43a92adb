"""Bytes of a file in blocks that end with lines, cut at the same places wherever reading begins."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from difftrain.data.sources import Source
from difftrain.errors import UserError, import_extra

BLOCK = 1 << 16  # bytes; a block holds the lines that begin in it
CHUNK = 1 << 20  # bytes read at a time
NEVER = 1 << 62  # bytes: the end of what has none


def open_bytes(source: Source) -> BinaryIO:
    """The unpacked bytes of a source, from its beginning on; reading raises UserError where they are damaged."""
    file = open(source.path, "rb")  # noqa: SIM115  closed by whom it is given to
    if source.packing == "gz":
        return _Unpacked(source, file, gzip.GzipFile(fileobj=file))
    if source.packing == "zst":
        return _Unpacked(source, file, _Zstandard(file))
    return file


class _Unpacked(io.RawIOBase):
    """What a packed file holds; a file that ends too early or is damaged is a user's mistake."""

    def __init__(self, source: Source, file: BinaryIO, content: Any) -> None:
        self._source, self._file, self._content = source, file, content

    def read(self, size: int = -1) -> bytes:
        try:
            return self._content.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self._source.label} is cut off or damaged: {error}") from None

    def packed_position(self) -> int:
        """Bytes of the file read so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstandard:
    """Reads Zstandard's frames one after the other; its own reader takes a frame that is cut off for whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._library = import_extra("zstandard", "data")
        self._file, self._frame, self._unread = file, None, b""

    def read(self, size: int) -> bytes:
        while True:
            packed = self._unread or self._file.read(min(size, CHUNK) // 8 or 1)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return b""
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                content = self._frame.decompress(packed)
            except self._library.ZstdError as error:
                raise EOFError(error) from None
            self._unread = b""
            if self._frame.eof:
                self._unread, self._frame = self._frame.unused_data, None
            if content:
                return content


class Blocks:
    """The blocks of a source between two offsets into its unpacked bytes.

    A cut at offset n lies behind the first line end at n - 1 or later. Where the next BLOCK bytes have
    none, it lies behind them, between two characters. So a cut depends on the file's content alone, and
    neighbouring ranges meet whatever part of the file each reader sees.

    Args:
        start: where to begin, a multiple of BLOCK.
        stop: where to end; 0: with the file.
        whole_lines: a line is never cut, however long.

    Attributes:
        lines: line ends before the block that was given last, from the first block on.
        position: bytes of the file that were read, packed where they are.
    """

    def __init__(self, source: Source, start: int = 0, stop: int = 0, *, whole_lines: bool = False) -> None:
        self.source, self._start, self._stop = source, start, stop or NEVER
        self._longest = NEVER if whole_lines else BLOCK
        self.lines = self.position = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Offsets and bytes of the blocks, none of them empty."""
        stream = open_bytes(self.source)
        try:
            self._stream, self._base, self._buffer = stream, max(0, self._start - 1), b""
            self._is_read = False
            if self._base:
                stream.seek(self._base)
            begin = self._first = self._cut(self._start) if self._start else 0
            nominal = self._start
            while nominal < self._stop:
                # A whole line may reach over many nominal cuts, all of which lie at its end.
                last = max(nominal, begin) if self._longest == NEVER else nominal
                nominal = min(last // BLOCK * BLOCK + BLOCK, self._stop)
                end = self._cut(nominal)
                if end > begin:
                    block = self._buffer[begin - self._base : end - self._base]
                    yield begin, block
                    self.lines += block.count(b"\n")
                elif self._is_read and end == self._base + len(self._buffer):
                    return
                begin = end
                if begin - self._base > CHUNK:  # a cut looks back a little, at most to begin - 4
                    self._buffer, self._base = self._buffer[begin - 8 - self._base :], begin - 8
        finally:
            stream.close()

    def line_of(self, ends: int) -> int:
        """The number of a line of the file, from 1 on, which comes after so many line ends of the last block."""
        before = 0
        if self._start:
            with open_bytes(self.source) as file:
                left = self._first
                while left and (chunk := file.read(min(left, CHUNK))):
                    before += chunk.count(b"\n")
                    left -= len(chunk)
        return before + self.lines + ends + 1

    def _cut(self, nominal: int) -> int:
        """Where the cut at a nominal offset lies."""
        seen, limit = nominal - 1, nominal - 1 + self._longest
        while True:
            at = self._buffer.find(b"\n", max(0, seen - self._base), limit - self._base)
            if at >= 0:
                return self._base + at + 1
            have = self._base + len(self._buffer)
            if have >= limit + 8:
                return self._between_characters(limit)
            if not self._read():
                return self._between_characters(limit) if have > limit else have
            seen = max(seen, have)

    def _between_characters(self, offset: int) -> int:
        after = self._buffer[offset - self._base : offset - self._base + 4]
        inside = next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))
        return offset + inside + (after[inside : inside + 1] == b"\n")

    def _read(self) -> bool:
        """More bytes into the buffer; whether there were any."""
        if self._is_read:
            return False
        chunk = self._stream.read(CHUNK)
        self._is_read = not chunk
        self._buffer += chunk
        packed = getattr(self._stream, "packed_position", None)
        self.position = packed() if packed else self.position + len(chunk)
        return bool(chunk)
