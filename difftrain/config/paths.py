"""Paths as users write them: ``~`` and environment variables, where no shell has seen them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from difftrain.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]+)\})", re.ASCII)


def expand_path(text: str) -> str:
    """The path that a user's words stand for: ``~``, ``~user``, ``$NAME`` and ``${NAME}`` as in a shell.

    Raises:
        UserError: there is no such variable or user, and no file of just this name: a run would go
            into a folder called ``$NAME``.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if os.path.lexists(path):
        return path
    for name in (plain or braced for plain, braced in _VARIABLE.findall(text)):
        if name not in os.environ:
            raise UserError(f"{text} names the environment variable {name}, which is not set")
    if path.startswith("~"):
        raise UserError(f"{text} names the user {path[1:].split('/')[0]!r}, and there is none")
    return path


def path_of(name: str, value: Any) -> Path:
    """The path that a caller gave, as text or as a path, expanded; raises UserError where it is none."""
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"{name} must be a path, got {type(value).__name__}")
    return Path(expand_path(os.fsdecode(value)))
