"""The command line: ``difftrain train | schedule | watch | report | evaluate | plot | sample | ...``, a file a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from difftrain.cli import (
    evaluate,
    export,
    import_,
    plot,
    prepare,
    repair,
    report,
    sample,
    schedule,
    train,
    watch,
)
from difftrain.cli.questions import Completion, Version
from difftrain.config.paths import expand_path
from difftrain.errors import (
    DISK_FULL,
    FailedElsewhere,
    OutputClosed,
    UserError,
    memory_told,
    near_matches,
)
from difftrain.progress import quiet

COMMANDS = (train, schedule, watch, report, evaluate, plot, sample, repair, prepare, import_, export)
PIPE_CLOSED = 128 + 13  # what a shell reports of a program that SIGPIPE ended
PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

EPILOG = """\
difftrain COMMAND --help shows a command's options.

A shell completes commands, options and presets with this in its start file (extra: completion):
  eval "$(difftrain --print-completion bash)"     # or zsh; fish: difftrain --print-completion fish | source"""


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes become one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: TextIO | None = None) -> None:  # argparse's hides that nobody reads it
        print(self.format_help(), end="", file=file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed (or a check found something), 2 the user's mistake, 141 nobody reads on."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model may write what the terminal cannot show
    try:
        try:
            args = _parse(sys.argv[1:] if argv is None else list(argv))
            with quiet(getattr(args, "quiet", False)):
                code = args.command(args) or 0
        except SystemExit:  # a help or the version was shown
            _flush()
            raise
        _flush()
    except OutputClosed as closed:
        return _complain(str(closed), PIPE_CLOSED)
    except BrokenPipeError:
        return _leave(PIPE_CLOSED)
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
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "TrainingFailed":
            return _complain(str(error), 1)
        if not (told := memory_told(error)):
            raise
        return _complain(told, 1)
    return code


def _complain(message: str, code: int) -> int:
    with suppress(OSError):
        print(f"difftrain: {' '.join(message.split())}", file=sys.stderr)
    return _leave(code)


def _leave(code: int) -> int:
    with suppress(OSError):
        _flush()
    return code


def _flush() -> None:
    """Flush both streams; raises OSError where one takes nothing (no reader, a full disk), and lets it take anything.

    Left to the interpreter's end, such a stream ends it with a complaint and another exit code.
    """
    failure = None
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            failure = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if failure:
        raise failure


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="difftrain",
        description="Train masked-diffusion language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, help="show what a bug report needs, and end")
    parser.add_argument(
        "--print-completion", action=Completion, metavar="SHELL", help="show a completion script, and end"
    )
    parser.set_defaults(command=lambda _: parser.print_help(), parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    for parser_of_command in commands.choices.values():
        parser_of_command.add_argument("--quiet", action="store_true", help="show no progress")
    args, extra = parser.parse_known_args(argv)
    if extra:
        name = extra[0].split("=")[0]
        known = [word for action in args.parser._actions for word in action.option_strings]
        what = "unknown option" if name.startswith("-") else "unexpected argument"
        raise UserError(f"{what} {name}{near_matches(name, known)}")
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, _expanded(value))
        elif isinstance(value, list) and all(isinstance(each, Path) for each in value):
            setattr(args, name, list(map(_expanded, value)))
    return args


def _expanded(path: Path) -> Path:
    return Path(expand_path(str(path)))
