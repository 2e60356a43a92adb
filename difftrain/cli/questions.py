"""Questions that need no command: ``--version`` and ``--print-completion``. Neither imports torch."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

from difftrain import __version__
from difftrain.config.sources import preset_names
from difftrain.errors import UserError, import_extra
from difftrain.reporting.sessions import processor

PATIENCE = 10  # seconds that a driver may take to answer


class Version(argparse.Action):
    """Show versions and device, and end."""

    def __init__(self, *words: Any, **options: Any):
        super().__init__(*words, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_text())
        parser.exit()


class Completion(argparse.Action):
    """Show the script that completes words in a shell, and end."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: str, *__: Any) -> None:
        shtab = import_extra("shtab", "completion")
        if shell not in shtab.SUPPORTED_SHELLS:
            raise UserError(f"SHELL must be one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
        _offer_words(parser, shtab)
        print(shtab.complete(parser, shell))
        parser.exit()


def version_text() -> str:
    """Versions of difftrain and what it computes with, and the devices here: lines for a bug report."""
    return "\n".join(
        [
            f"difftrain {__version__}",
            *(f"{name} {_version_of(name)}" for name in ("torch", "triton")),
            f"Python {platform.python_version()} on {platform.platform()}",
            *(f"device: {device}" for device in [*_graphics_cards(), processor()]),
        ]
    )


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"


def _graphics_cards() -> list[str]:
    """NVIDIA's cards as their driver names them; torch, which knows of others, takes seconds to ask."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ["nvidia-smi does not answer"]
    lines = (done.stdout or done.stderr).splitlines()
    if done.returncode:
        return [f"nvidia-smi fails: {' '.join(lines[:1])}"]
    return [", driver ".join(line.rsplit(", ", 1)) for line in lines]


def _offer_words(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Tell shtab what options take; as argparse's own choices they would word the mistakes."""
    (commands,) = (action for action in parser._actions if isinstance(action.choices, dict))
    for command in commands.choices.values():
        for action in command._actions:
            kind = str(action.metavar or "")
            if action.dest == "preset":
                action.choices = preset_names()
            elif action.dest in ("run", "runs", "out_dir"):
                action.complete = shtab.DIRECTORY
            elif "|" in kind and kind == kind.lower():
                action.choices = kind.split("|")
            elif "FILE" in kind or action.dest == "data":
                action.complete = shtab.FILE
            elif "DIR" in kind:
                action.complete = shtab.DIRECTORY
