"""Arguments of the programs that are paths: ``~`` and variables as in difftrain's own commands."""

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
