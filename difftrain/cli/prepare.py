"""``difftrain prepare``: a text as token files."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    from difftrain.data import prepare, read_folder

    say = partial(print, flush=True)
    corpus = read_folder(prepare(args.source, tokenizer=args.tokenizer, out=args.out, say=say))
    print(
        f"{corpus.folder}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, "
        f"{corpus.vocabulary.n_words} words; train with --data {corpus.folder}"
    )
