"""Files and folders that appear under their names only when they are whole."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from difftrain.errors import UserError

HALF = ".half"  # ends the name of a file that is being written


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A place beside ``target`` at which to write a file or a folder; at the end it takes the target's name.

    On an error (disk full) it goes, and nothing has the target's name.

    Raises:
        UserError: there is something of that name already.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already; give another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with as_os_error():
            yield aside
        for path in (*aside.rglob("*"), aside):
            flush(path)
        aside.rename(target)
        flush(target.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the target's name, and the place of what had it, when it is whole and on the disk.

    A reader never meets half of it; on an error it goes and what was there stays. A kill leaves a file whose name
    ends in HALF.
    """
    half = target.with_name(f".{target.name}-{secrets.token_hex(4)}{HALF}")
    try:
        with half.open("wb") as file:
            yield file
        flush(half)
        half.replace(target)
    finally:
        half.unlink(missing_ok=True)


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file by :func:`replacing`, in a folder that is made where it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def flush(path: Path) -> None:
    """Have a file or a folder on the disk before anything that is done next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems refuse to flush a folder; the rename is still atomic there.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Let a writer that hides the system's error in its own text fail with that error."""
    try:
        yield
    except BaseException as error:  # a CheckpointException is no Exception
        number = re.search(r"(?:os error |Errno )(\d+)", str(error))
        if number and not isinstance(error, OSError):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise
