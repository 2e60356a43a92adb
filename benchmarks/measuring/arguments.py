"""Arguments of the programs: numbers of things, and paths with ``~`` and variables as in difftrain's own commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from difftrain.config.paths import expand_path
from difftrain.errors import UserError
from measuring import checkout  # noqa: F401  our packages from this checkout


def user_path(text: str) -> Path:
    """The path that a user's words stand for, as a ``type`` for argparse."""
    try:
        return Path(expand_path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A number of at least 1, as a ``type`` for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def linear_shape(text: str) -> tuple[int, ...]:
    """Positions, width and words, N,D,V, as a ``type`` for argparse."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected N,D,V, got {text}")
    return shape
