"""The form of a user's mistake, and of a failure told elsewhere."""

from __future__ import annotations

import difflib
import errno
from importlib import import_module
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A mistake of the user's: the command line shows its message alone, in one line."""


class FailedElsewhere(UserError):
    """Another process failed and says why; this one ends without a word."""


class OutputClosed(BrokenPipeError):
    """Nobody reads standard output any longer; what was asked for has stopped or is done, as the message says."""


def import_extra(module: str, extra: str) -> Any:
    """A module that comes with an extra of ours; raises UserError with the one command that installs it."""
    try:
        return import_module(module)
    except ImportError:
        name = module.rsplit(".", maxsplit=1)[-1]
        raise UserError(f"{name} is not installed: pip install 'difftrain[{extra}]'") from None


def near_matches(name: str, known: list[str]) -> str:
    """'; did you mean a or b?', or nothing when no known name is like ``name``."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
