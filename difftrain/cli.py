"""The command line: ``difftrain train | sample | plot | prepare``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from difftrain import __version__
from difftrain.config import (
    DISK_FULL,
    GROUPS,
    TYPES,
    Config,
    FailedElsewhere,
    UserError,
    near_matches,
    preset_names,
    preset_summary,
    resolve_config,
)

PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
METAVARS = {str: "TEXT", int: "N", float: "NUMBER", bool: "true|false"}


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
    for add in (_add_train, _add_sample, _add_plot, _add_prepare):
        add(commands)
    args, extra = parser.parse_known_args(argv)
    if extra:
        name = extra[0].split("=")[0]
        known = [word for action in args.parser._actions for word in action.option_strings]
        what = "unknown option" if name.startswith("-") else "unexpected argument"
        raise UserError(f"{what} {name}{near_matches(name, known)}")
    return args


# train --------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction) -> None:
    presets = "\n".join(f"  {name:<12} {preset_summary(name)}" for name in preset_names())
    parser = commands.add_parser(
        "train",
        help="train a model, or evaluate one",
        usage="difftrain train [PRESET] [--config FILE.toml] [--resume | --overwrite] [--eval_only] [--OPTION VALUE ...]",
        description="Train a model. Options come from the preset, then --config, then the command line.",
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="a named configuration, listed below")
    parser.add_argument(
        "--config", metavar="FILE.toml", help="a TOML file with any of the options below as keys"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in out_dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in out_dir")
    parser.add_argument("--eval_only", action="store_true", help="evaluate once and write nothing")
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        choices = getattr(TYPES[field.name], "__args__", None)
        kind = "|".join(choices) if choices else METAVARS[TYPES[field.name]]
        group.add_argument(
            f"--{field.name}",
            metavar=kind,
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} [{field.default}]".replace("%", "%%"),
        )
    parser.set_defaults(command=_train, parser=parser)


def _train(args: argparse.Namespace) -> None:
    names = {field.name for field in dataclasses.fields(Config)}
    words = {name: word for name, word in vars(args).items() if name in names}
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = resolve_config(args.preset, args.config, words, resume=args.resume)
    except UserError as error:  # the same on every process that torchrun started: one tells it
        raise error if is_main else FailedElsewhere(str(error)) from None
    if is_main:
        pairs = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v != "")
        print(textwrap.fill(pairs, 100, break_long_words=False, break_on_hyphens=False))
    from difftrain.train import train

    train(config, resume=args.resume, overwrite=args.overwrite, eval_only=args.eval_only)


# sample -------------------------------------------------------------------------------------------


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="write text with a trained model",
        description="Write text with a trained model: from nothing, after a prompt, or into the gaps of a text.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", default="", metavar="TEXT", help="the text begins with this")
    start.add_argument("--infill", metavar="TEXT", help="fill the gaps: ____ is four [MASK]s, _____ five")
    start.add_argument(
        "--held_out", action="store_true", help="mask and restore a piece of the validation text"
    )
    parser.add_argument("--share", type=float, default=0.15, help="share masked with --held_out [0.15]")
    parser.add_argument("--length", type=int, default=0, metavar="N", help="tokens a text [block_size]")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts, in one batch [1]")
    parser.add_argument("--max_steps", type=int, default=64, metavar="N", help="passes of the model [64]")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divides the logits; 0: greedy [0.8]"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="sample among the best N; 0: all [0]"
    )
    parser.add_argument(
        "--by_confidence", action="store_true", help="fill the most certain positions first"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of the held-out piece [0]")
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best, latest or a step [best]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.set_defaults(command=_sample, parser=parser)


def _sample(args: argparse.Namespace) -> None:
    from difftrain.sample import SampleRequest, sample_run

    names = {field.name for field in dataclasses.fields(SampleRequest)}
    request = SampleRequest(**{name: value for name, value in vars(args).items() if name in names})
    print(sample_run(args.run, request))


# plot and prepare ---------------------------------------------------------------------------------


def _add_plot(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw a run's curves",
        description="Draw a run's curves as one PNG.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="[RUN/plots/curves.png]")
    parser.set_defaults(command=_plot, parser=parser)


def _plot(args: argparse.Namespace) -> None:
    from difftrain.plot import plot_run

    print(f"drawn: {plot_run(args.run, args.out)}")


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn a text into token files",
        description="Turn a text, or a folder of texts, into train.bin, val.bin and meta.json.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="FILE|DIR", help="UTF-8 text, a folder of it, or stdlib")
    parser.add_argument(
        "--tokenizer", default="char", help="char, a tokenizer.json, or a tiktoken name such as gpt2 [char]"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to make [one in the user's cache]")
    parser.set_defaults(command=_prepare, parser=parser)


def _prepare(args: argparse.Namespace) -> None:
    from difftrain.data import prepare, read_folder

    corpus = read_folder(prepare(args.source, tokenizer=args.tokenizer, out=args.out))
    print(
        f"{corpus.folder}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, "
        f"{corpus.vocabulary.n_words} words; train with --data {corpus.folder}"
    )
