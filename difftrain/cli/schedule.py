"""``difftrain schedule``: what penalties, learning rate and schedules will be over the steps of a run, before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from difftrain.cli.train import add_options, words_of
from difftrain.config.paths import expand_path
from difftrain.config.sources import CONFIG_FILE, preset_names, resolve_config


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "schedule",
        help="show what moves over the steps of a run",
        usage="difftrain schedule [CONFIG] [--OPTION VALUE ...]",
        description="Show what moves over the steps of a run, as a table and as pictures. Nothing is trained.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", nargs="?", metavar="CONFIG", help="a preset, a TOML file or a run's folder"
    )
    add_options(parser)
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    preset = file = None
    if args.source in preset_names():
        preset = args.source
    elif args.source:
        path = Path(expand_path(args.source))
        file = str(path / CONFIG_FILE if path.is_dir() else path)
    config = resolve_config(preset, file, words_of(args))
    from difftrain.reporting.schedules import schedule_lines

    print("\n".join(schedule_lines(config)))
