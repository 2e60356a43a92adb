"""``difftrain train``: every option of the configuration, and what is checked before a run begins."""

from __future__ import annotations

import argparse
import dataclasses
import os

from difftrain.config.options import GROUPS, TYPES, Config
from difftrain.config.sources import preset_names, preset_summary, resolve_config
from difftrain.errors import FailedElsewhere, UserError

METAVARS = {str: "TEXT", int: "N", float: "NUMBER", bool: "true|false"}


def add_parser(commands: argparse._SubParsersAction) -> None:
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
    parser.add_argument(
        "--allow_changed_data", action="store_true", help="resume though the data is not what it was"
    )
    add_options(parser)
    parser.set_defaults(command=_run, parser=parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of the configuration; one that is not given does not stand among the arguments."""
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


def words_of(args: argparse.Namespace) -> dict[str, str]:
    """The options that were given, with their words."""
    names = {field.name for field in dataclasses.fields(Config)}
    return {name: word for name, word in vars(args).items() if name in names}


def _run(args: argparse.Namespace) -> None:
    words = words_of(args)
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = resolve_config(args.preset, args.config, words, resume=args.resume)
    except UserError as error:  # the same on every process that torchrun started: one tells it
        raise error if is_main else FailedElsewhere(str(error)) from None
    from difftrain.training.loop import train

    train(
        config,
        resume=args.resume,
        overwrite=args.overwrite,
        eval_only=args.eval_only,
        allow_changed_data=args.allow_changed_data,
    )
