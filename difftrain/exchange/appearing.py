"""A file or a folder that appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from difftrain.checkpoints.writing import as_os_error, flush
from difftrain.errors import UserError


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
