"""``difftrain watch``: a run in the terminal while it goes on."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "watch",
        help="follow a run in the terminal",
        description="Follow a run until it ends: losses, answers, penalties, time left, the last warning. "
        "It only reads. Where there is no terminal, a line for each record.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, which need not be there yet")
    parser.add_argument("--once", action="store_true", help="show the run as it is, and end")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks at the run [1]"
    )
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    from difftrain.reporting.watch import watch_run

    watch_run(args.run, interval=args.interval, is_once=args.once)
