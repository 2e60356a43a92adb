"""``difftrain import``: another program's checkpoint as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from difftrain.config.paths import expand_path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "import",
        help="make a run of another program's checkpoint",
        description="Make a run of a nanoGPT checkpoint: sample, evaluate and train --resume take it. Nothing in the "
        "file is executed; a model that would compute other numbers here is refused.",
        allow_abbrev=False,
    )
    parser.add_argument("format", choices=("nanogpt",), help="whose checkpoint it is")
    parser.add_argument("file", metavar="FILE", type=Path, help="nanoGPT's ckpt.pt")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the run's folder to make")
    parser.add_argument(
        "--meta", metavar="FILE", type=Path, help="its words: meta.pkl, or meta.json [numbers]"
    )
    parser.add_argument(
        "--mode",
        choices=("gpt2", "diffusion"),
        default="",
        help="diffusion drops a causal mask, to train on from there [as it was trained]",
    )
    parser.add_argument(
        "--data", default="", metavar="TEXT", help="what the run's --data is to say [the folder of --meta]"
    )
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    from difftrain.exchange.from_nanogpt import import_nanogpt

    data = expand_path(args.data) if args.data else ""
    for line in import_nanogpt(args.file, args.out, meta=args.meta, mode=args.mode, data=data):
        print(line)
