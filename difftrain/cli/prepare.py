"""``difftrain prepare``: a text as token files."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

from difftrain.config.paths import expand_path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn a text into token files",
        description="Turn a text, or a folder of texts, into train.bin, val.bin and meta.json. Of a folder only UTF-8 "
        "text is taken; hidden entries, version control and environments are left out.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="FILE|DIR", help="UTF-8 text, a folder of it, or stdlib")
    parser.add_argument(
        "--pattern",
        action="append",
        default=[],
        metavar="GLOB",
        help="take only files of a folder that match, such as '*.py' (a name) or 'docs/*' (a path in it); "
        "may be given again for more [all]",
    )
    parser.add_argument(
        "--newline",
        choices=("universal", "keep"),
        default="universal",
        help="universal: a byte-order mark goes, CRLF and CR become LF; keep: both stay as they are [universal]",
    )
    parser.add_argument(
        "--tokenizer", default="char", help="char, a tokenizer.json, or a tiktoken name such as gpt2 [char]"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to make [one in the user's cache]")
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    from difftrain.data import prepare, read_folder

    say = None if args.quiet else partial(print, flush=True)
    folder = prepare(
        expand_path(args.source),
        tokenizer=expand_path(args.tokenizer),
        out=args.out,
        patterns=args.pattern,
        newline=args.newline,
        say=say,
    )
    corpus = read_folder(folder, say)
    print(
        f"{corpus.folder}: {len(corpus.train):,} training and {len(corpus.val):,} validation tokens, "
        f"{corpus.vocabulary.n_words} words; train with --data {shlex.quote(str(corpus.folder))}"
    )
