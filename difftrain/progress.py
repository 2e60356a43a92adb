"""Progress of long work: a bar with rate and time left, on a terminal alone, and none where that is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

DELAY = 1.0  # seconds; what takes less shows no bar
_is_quiet = ContextVar("is_quiet", default=False)


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """Within it no progress is shown, or (False) as much as otherwise."""
    token = _is_quiet.set(is_quiet)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def is_quiet() -> bool:
    """Whether progress was asked to be left out."""
    return _is_quiet.get()


def is_shown() -> bool:
    """Whether a bar makes sense: on a terminal, of the first of torchrun's processes, and not quiet."""
    return not is_quiet() and os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def progress(items: Iterable[Any] | None = None, *, what: str, unit: str, total: int | None = None) -> tqdm:
    """The items, with a bar on standard error that goes when they end; without items a bar to ``update``."""
    return tqdm(
        items, desc=what, total=total, unit=unit, unit_scale=unit == "B",
        leave=False, delay=DELAY, dynamic_ncols=True, disable=not is_shown(),
    )  # fmt: skip
