"""``difftrain prepare``: texts as token files."""

from __future__ import annotations

import argparse
import json
import shlex
from functools import partial
from pathlib import Path

from difftrain.config.paths import expand_path
from difftrain.errors import UserError

PLAIN = 1 << 26  # bytes; texts that come to more are written in shards

# Options of shards alone: their names in ShardRequest, and what argparse takes of them.
SHARDS = {
    "train_bpe": {"type": int, "metavar": "N", "help": "learn a byte-pair vocabulary of N words (extra: tok)"},
    "format": {"help": "auto (by a file's name), or text or jsonl for all, standard input too [auto]"},
    "field": {"metavar": "NAME", "help": "field or column of a row that is its text [text]"},
    "separator": {"metavar": "TEXT", "help": r"text after each document, such as '<|endoftext|>' or '' [\n]"},
    "split": {"help": "what is held out: document, block (64 KiB of lines), or auto: documents where there are rows "
              "or at least 100 files [auto]"},
    "val_share": {"type": float, "metavar": "SHARE", "help": "share of documents or blocks that is held out [0.1]"},
    "seed": {"type": int, "metavar": "N", "help": "seed of the draw of what is held out [0]"},
}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn texts into token files",
        description="Turn texts into token files. One text, or a folder of texts, of at most 64 MiB becomes train.bin, "
        "val.bin and meta.json; anything else shards with an index, in bounded memory, and after a kill the same "
        "command goes on. Of a folder only UTF-8 text is taken; hidden entries, version control and "
        "environments are left out.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="UTF-8 text, .jsonl, .parquet, .gz or .zst of these, a folder of them, a folder that datasets saved, "
        "- for standard input, or stdlib",
    )
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
        "--tokenizer",
        default="char",
        help="char, bytes, a tokenizer.json, or a tiktoken name such as gpt2 [char]",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to make [one in the user's cache]")
    shards = parser.add_argument_group("shards", "each of these options asks for shards, which need --out")
    shards.add_argument("--shards", action="store_true", help="shards, however small the text")
    for name, options in SHARDS.items():
        shards.add_argument(f"--{name}", **options)
    shards.add_argument("--shard_mib", type=int, metavar="N", help="MiB of the sources for each shard [64]")
    shards.add_argument(
        "--workers", type=int, metavar="N", help="processes; the bytes are the same for any number [1]"
    )
    parser.set_defaults(command=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    say = None if args.quiet else partial(print, flush=True)
    names = [name if name == "stdlib" else expand_path(name) for name in args.sources]
    if _wants_shards(args, names):
        folder, counts, n_words = _run_shards(args, names, say)
    else:
        folder, counts, n_words = _run_plain(args, names[0], say)
    print(
        f"{folder}: {counts['train']:,} training and {counts['val']:,} validation tokens, "
        f"{n_words} words; train with --data {shlex.quote(str(folder))}"
    )


def _wants_shards(args: argparse.Namespace, names: list[str]) -> bool:
    """Whether an option or the sources ask for shards; one text of usual size stays what nanoGPT reads."""
    given = [name for name in (*SHARDS, "shard_mib", "workers") if getattr(args, name) is not None]
    if args.shards or given or len(names) > 1 or names == ["-"]:
        if "stdlib" in names:
            raise UserError(
                "stdlib is one text without shards; it takes --tokenizer, --newline and --out alone"
            )
        return True
    if names == ["stdlib"]:
        return False
    from difftrain.data.sources import find_sources

    try:
        sources, _ = find_sources(names, args.pattern, "auto")
    except UserError:  # the plain way says it
        return False
    return sum(s.size for s in sources) > PLAIN or any(s.kind != "text" or s.packing for s in sources)


def _run_shards(args: argparse.Namespace, names: list[str], say) -> tuple[Path, dict[str, int], int]:
    from difftrain.data import ShardRequest, prepare_shards
    from difftrain.data.shards import INDEX

    if args.out is None:
        raise UserError(
            "more than one text of at most 64 MiB becomes shards, which need a folder of their own: give --out DIR"
        )
    given = {name: getattr(args, name) for name in SHARDS if getattr(args, name) is not None}
    if args.shard_mib is not None:
        if args.shard_mib < 1:
            raise UserError(f"shard_mib must be at least 1, got {args.shard_mib}")
        given["shard_bytes"] = args.shard_mib << 20
    request = ShardRequest(
        tokenizer=expand_path(args.tokenizer), patterns=tuple(args.pattern), newline=args.newline, **given
    )
    workers = 1 if args.workers is None else args.workers
    folder = prepare_shards(names, args.out, request, workers=workers, say=say)
    index, meta = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (INDEX, "meta.json"))
    return folder, {name: split["tokens"] for name, split in index["splits"].items()}, meta["vocab_size"]


def _run_plain(args: argparse.Namespace, name: str, say) -> tuple[Path, dict[str, int], int]:
    from difftrain.data import prepare, read_folder

    folder = prepare(
        name,
        tokenizer=expand_path(args.tokenizer),
        out=args.out,
        patterns=args.pattern,
        newline=args.newline,
        say=say,
    )
    corpus = read_folder(folder, say)
    counts = {split: len(getattr(corpus, split)) for split in ("train", "val")}
    return corpus.folder, counts, corpus.vocabulary.n_words
