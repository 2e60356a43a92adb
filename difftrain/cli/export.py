"""``difftrain export``: a run's model for another program."""

from __future__ import annotations

import argparse
from pathlib import Path

from difftrain.cli.trained import add_checkpoint


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write a run's model for another program",
        description="Write a run's model as nanoGPT's ckpt.pt, or as a folder that Hugging Face's transformers loads, with "
        "its tokenizer and a card.",
        allow_abbrev=False,
    )
    parser.add_argument("format", choices=("nanogpt", "hf"), help="for which program")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--out", required=True, metavar="PATH", type=Path, help="the file or folder to make"
    )
    add_checkpoint(parser)
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    if args.format == "hf":
        from difftrain.exchange.to_hf import export_hf as export
    else:
        from difftrain.exchange.to_nanogpt import export_nanogpt as export

    for line in export(args.run, args.out, which=args.checkpoint):
        print(line)
