"""``difftrain plot``: a run's curves as a PNG."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw a run's curves",
        description="Draw a run's curves as one PNG.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="[RUN/plots/curves.png]")
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    from difftrain.reporting.plot import plot_run

    print(f"drawn: {plot_run(args.run, args.out)}")
