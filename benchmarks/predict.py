"""What the loss should take on five GPUs, predicted from machine code and a roofline; nothing is measured.
Takes a second, without torch and without a GPU. Writes the predictions into benchmarks/NOTES.md between
its markers; with --print nowhere.

    python benchmarks/predict.py [--print]

The constants and their sources are in reporting/predictions.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reporting import predictions
from reporting.pages import put_between
from reporting.result_files import ResultError

NOTES = Path(__file__).resolve().parent / "NOTES.md"
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"


def part() -> str:
    """What stands between the markers."""
    return f"""\
**Predicted, not measured**: ms in bf16, in brackets the per cent of the floor, which is a copy of the least
bytes. "default" is a plain call from the second of its kind on; "not predicted" makes
the gradient in backward (`upstream_prediction=False`, a first call); "stated" is `upstream_scale`.

{predictions.table()}

\\+ Bytes and launches alone: rows held in registers have no loop whose instructions could be counted.

{predictions.constants()}

A launch is {predictions.LAUNCH_US:.1f} microseconds, seen on a V100 (NVIDIA's blog, "Getting Started with CUDA
Graphs"). A copy is {100 * predictions.COPY_SHARE:.0f} % of the bandwidth on paper, as seen on an H100 and an H200.
Instructions: four schedulers to a multiprocessor, 32 lanes each, at the boost clock."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--print", action="store_true", help="print the tables, and the goals beside them")
    options = parser.parse_args(arguments)
    if options.print:
        print(part(), predictions.goals_text(), sep="\n\n")
        return 0
    try:
        put_between(NOTES, BEGIN, END, part())
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{NOTES.name}: predictions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
