"""The command line: ``difftrain train | sample | plot | prepare``, a file a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from difftrain import __version__
from difftrain.cli import plot, prepare, sample, train
from difftrain.config.paths import expand_path
from difftrain.errors import DISK_FULL, FailedElsewhere, UserError, near_matches

COMMANDS = (train, sample, plot, prepare)
PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes become one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 the user's mistake."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model may write what the terminal cannot show
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        args.command(args)
    except FailedElsewhere:
        return 2
    except UserError as error:
        return _complain(str(error), 2)
    except OSError as error:
        if error.errno in DISK_FULL:
            return _complain(
                f"the disk is full or a quota is reached: {error}; what was saved before is unharmed", 1
            )
        return _complain(str(error), 2 if isinstance(error, PATH_ERRORS) else 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingFailed":
            raise
        return _complain(str(error), 1)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"difftrain: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="difftrain", description="Train masked-diffusion language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"difftrain {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for command in COMMANDS:
        command.add_parser(commands)
    args, extra = parser.parse_known_args(argv)
    if extra:
        name = extra[0].split("=")[0]
        known = [word for action in args.parser._actions for word in action.option_strings]
        what = "unknown option" if name.startswith("-") else "unexpected argument"
        raise UserError(f"{what} {name}{near_matches(name, known)}")
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(expand_path(str(value))))
    return args
