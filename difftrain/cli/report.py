"""``difftrain report``: what one run did, or how several compare, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="write what runs did as one HTML page",
        description="Write what one run did, or how several compare, as one HTML file that stands alone.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="runs' folders")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE.html",
        type=Path,
        help="[RUN/report.html; of several runs comparison.html]",
    )
    parser.add_argument(
        "--allow_different_validation",
        action="store_true",
        help="draw runs together that were measured on different validation sets",
    )
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    from difftrain.reporting.page.writing import write_report

    out = write_report(args.runs, args.out, allow_different_validation=args.allow_different_validation)
    print(f"written: {out}")
