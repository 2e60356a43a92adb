"""The form of a user's mistake, and of a failure told elsewhere."""

from __future__ import annotations

import difflib
import errno
import numbers
import operator
import re
from importlib import import_module
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A mistake of the user's: the command line shows its message alone, in one line."""


class FailedElsewhere(UserError):
    """Another process failed and says why; this one ends without a word."""


class OutputClosed(BrokenPipeError):
    """Nobody reads standard output any longer; what was asked for has stopped or is done, as the message says."""


def memory_told(error: BaseException) -> str:
    """One line on memory that could not be had, by Python or by torch on any device; empty for other errors."""
    words = ("can't allocate memory", "Invalid buffer size", "Storage size calculation overflowed")
    is_torchs = type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
    if not isinstance(error, MemoryError) and not is_torchs:
        return ""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    return f"not enough memory{f' for {asked[1]} more' if asked else ''}; ask for less at a time"


def import_extra(module: str, extra: str) -> Any:
    """A module that comes with an extra of ours; raises UserError with the one command that installs it."""
    try:
        return import_module(module)
    except ImportError:
        name = module.rsplit(".", maxsplit=1)[-1]
        raise UserError(f"{name} is not installed: pip install 'difftrain[{extra}]'") from None


def whole_number(name: str, value: Any, low: int) -> int:
    """``value`` as an int, from ``low`` on and below 2^31; raises UserError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, got {type(value).__name__} {value!r}") from None
    if not low <= number < 2**31:
        raise UserError(f"{name} must be at least {low} and below 2^31, got {number}")
    return number


def real_number(name: str, value: Any) -> float:
    """``value`` as a float; raises UserError where it is no number. Its range is the caller's to check."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return float(value)


def plain_text(name: str, value: Any) -> str:
    """``value``, a text; raises UserError where it is none."""
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {type(value).__name__}")
    return value


def near_matches(name: str, known: list[str]) -> str:
    """'; did you mean a or b?', or nothing when no known name is like ``name``."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
