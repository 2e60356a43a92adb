"""``difftrain evaluate``: what a run's model knows of a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from difftrain.cli.trained import add_checkpoint, add_computing


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a trained model on a text",
        description="Measure a trained model on its held-out text or on any other: the loss at any penalties, the "
        "nll of masked words, how many wrong words it finds, and how likely it finds the text. "
        "docs/evaluation.md states each formula.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or what export hf wrote")
    parser.add_argument(
        "--data", default="", metavar="TEXT",
        help="a text, - for standard input, or what training's --data takes [the run's held-out text]",
    )  # fmt: skip
    add_checkpoint(parser)
    parser.add_argument(
        "--windows", type=int, default=128, metavar="N",
        help="pieces of block_size tokens, evenly spaced over the text; 0: all [128]",
    )  # fmt: skip
    parser.add_argument(
        "--levels", type=_per_cents, default=(15.0, 50.0, 85.0), metavar="P,P,...",
        help="per cents of words masked [15,50,85]",
    )  # fmt: skip
    parser.add_argument(
        "--errors", type=_per_cents, default=(1.0, 5.0, 15.0), metavar="P,P,...",
        help="per cents of words replaced by others [1,5,15]",
    )  # fmt: skip
    parser.add_argument(
        "--penalties", type=_pair, action="append", default=[], metavar="PK,PM",
        help="tell the loss at these too; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--estimators", type=lambda text: tuple(text.split(",")), default=("mdlm", "llada"), metavar="E,E",
        help="of the bound on the likelihood, in diffusion mode: mdlm, llada [mdlm,llada]",
    )  # fmt: skip
    parser.add_argument(
        "--draws", type=int, default=8, metavar="N", help="maskings of each window in it [8]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is masked and replaced [0]")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="windows a pass [32]")
    add_computing(parser, "float32")
    parser.add_argument(
        "--allow_changed_data", action="store_true", help="take the data though it is not what it was"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(command=_run, parser=parser)


def _per_cents(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _pair(text: str) -> tuple[float, float]:
    pk, pm = map(float, text.split(","))
    return pk, pm


# What argparse calls them in "invalid ... value".
_per_cents.__name__, _pair.__name__ = "list of per cents", "pair PK,PM"


def _run(args: argparse.Namespace) -> None:
    from difftrain.evaluation.lines import lines_of
    from difftrain.evaluation.of_run import EvaluationRequest, evaluate_run
    from difftrain.runtime import is_main_process

    names = {field.name for field in dataclasses.fields(EvaluationRequest)}
    values = vars(args) | {"penalties": tuple(args.penalties)}
    record = evaluate_run(
        args.run, EvaluationRequest(**{name: value for name, value in values.items() if name in names})
    )
    if is_main_process():
        print(json.dumps(record, indent=2) if args.json else "\n".join(lines_of(record)), flush=True)
