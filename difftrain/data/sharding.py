"""Preparing texts of any size: two passes at most in bounded memory, in several processes, resumed after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.appearing import HALF, replacing, write_whole
from difftrain.data.blocks import BLOCK
from difftrain.data.byte_pairs import learn_byte_pairs
from difftrain.data.contents import Content, remember
from difftrain.data.encoding import Alphabet, dtype_of
from difftrain.data.parts import (
    SPLIT_NAMES,
    Job,
    ShardRequest,
    collect_alphabet,
    counts_file,
    record_file,
    write_part,
)
from difftrain.data.processes import work
from difftrain.data.shards import COUNTS, FORMAT, INDEX
from difftrain.data.sources import ROWS, Source, find_sources, plan_parts
from difftrain.data.vocabulary import (
    Bytes,
    Characters,
    Tiktoken,
    Tokenizer,
    Vocabulary,
    from_meta,
    read_tokenizer,
    with_two_words,
)
from difftrain.errors import UserError

MANY = 100  # files; from so many on each is a document that is held out as a whole
LEARNED = 1 << 26  # characters from which byte pairs are learned, evenly spread
JOB, VOCABULARY, STDIN = "job.json", "vocabulary.json", "stdin"  # of a preparation under way


def prepare_shards(
    names: Sequence[str],
    out: Path,
    request: ShardRequest,
    *,
    workers: int = 1,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Tokenise texts into a folder of shards with an index; returns the folder, which appears when it is whole.

    The bytes depend on the sources and the request, not on the number of workers. What is under way lies
    in ``.NAME.partial`` beside ``out``; after a kill the same call goes on from the last finished shard.

    Args:
        names: files, folders, folders that ``datasets`` saved, or "-" for standard input.
        out: the folder to make.
        request: what to make of them.
        workers: processes.
        say: is told what is taken and what is under way.

    Raises:
        UserError: there is no text, or something in it is none; ``out`` is there; another process makes it.
    """
    say = say or (lambda _: None)
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if out.exists():
        raise UserError(f"{out} exists already")
    sources, lines = find_sources(names, request.patterns, request.format)
    for line in lines:
        say(line)
    request = _settled(request, sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _under_way(out, _identity(request, sources), say) as folder:
        sources = [_kept(source, folder) for source in sources]
        part_bytes = max(1, request.shard_bytes // BLOCK) * BLOCK  # so that parts end where blocks do
        job = Job(request, sources, plan_parts(sources, part_bytes), folder)
        run = partial(_work, job, workers=workers)
        meta = _vocabulary(job, run).to_meta()
        meta["dtype"] = dtype_of(meta["vocab_size"]).name
        done = [n for n in range(len(job.parts)) if record_file(folder, n).exists()]
        if done:
            say(f"{folder}: going on, {len(done)} of {len(job.parts)} parts are done")
        say(f"preparing {out}: {len(job.parts)} parts of {len(sources)} files, {meta['vocab_size']} words")
        for _ in run(
            partial(write_part, job, meta),
            [n for n in range(len(job.parts)) if n not in set(done)],
            "encoding",
        ):
            pass
        for source in sources:
            if _has_changed(source):
                raise UserError(f"{source.label} has changed while it was read; prepare it again")
        _write_index(job, meta)
        folder.rename(out)
    return out


def _kept(source: Source, folder: Path) -> Source:
    """The source itself; of standard input, which can be read once only, what it held, in a file."""
    if source.path != "-":
        return source
    if sys.stdin is None:
        raise UserError("standard input is closed; give a file")
    with replacing(folder / STDIN) as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    stat = (folder / STDIN).stat()
    if not stat.st_size:
        raise UserError("standard input is empty")
    return dataclasses.replace(
        source, path=str(folder / STDIN), size=stat.st_size, mtime_ns=stat.st_mtime_ns
    )


def _settled(request: ShardRequest, sources: Sequence[Source]) -> ShardRequest:
    """The request with "auto" decided."""
    if request.split != "auto":
        return request
    by_document = len(sources) >= MANY or any(source.kind in ROWS for source in sources)
    return dataclasses.replace(request, split="document" if by_document else "block")


def _identity(request: ShardRequest, sources: Sequence[Source]) -> str:
    """What is resumed must be of the same sources and the same request."""
    if any(source.path == "-" for source in sources):
        return ""  # what was read of standard input is gone
    tokenizer = "" if request.train_bpe else read_tokenizer(request.tokenizer)
    parts = [
        FORMAT,
        dataclasses.asdict(request),
        tokenizer,
        [dataclasses.astuple(source) for source in sources],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextlib.contextmanager
def _under_way(out: Path, identity: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder in which a preparation is under way, held by this process alone.

    What another preparation left there goes, and so does what is half-written. On an error it stays for the next
    try, unless it cannot be resumed.
    """
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {out}") from None
        job = folder / JOB
        if not identity or not job.exists() or job.read_text(encoding="utf-8") != identity:
            if job.exists():
                say(f"{folder} is of other sources or options; beginning anew")
            for path in folder.iterdir():
                path.unlink()
            write_whole(job, identity)
        for path in folder.glob(f"*{HALF}"):
            path.unlink()
        try:
            yield folder
        except BaseException:
            if not identity or not any(folder.glob("part-*.json")):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                say(f"{folder} keeps what is done; the same command goes on")
            raise
    finally:
        os.close(lock)


def _work(
    job: Job, function: Callable, numbers: Sequence[int], what: str, *, workers: int
) -> Iterator[tuple[int, Any]]:
    total = sum(piece.size for n in numbers for piece in job.parts[n])
    return work(function, numbers, workers=workers, what=what, total=total or None)


def _vocabulary(job: Job, run: Callable) -> Vocabulary:
    """The vocabulary that the request asks for: named, or found in a pass over all parts, once."""
    kept, request = job.folder / VOCABULARY, job.request
    if kept.exists():
        return from_meta(json.loads(kept.read_text(encoding="utf-8")), str(kept))
    numbers = range(len(job.parts))
    if request.train_bpe:
        vocabulary: Vocabulary = Tokenizer(learn_byte_pairs(_spread_texts(job), request.train_bpe))
    elif request.tokenizer == "char":
        alphabet = Alphabet(request.separator)
        for _, characters in run(partial(collect_alphabet, job), numbers, "reading"):
            alphabet.unite(characters)
        vocabulary = Characters(alphabet.sorted())
    elif request.tokenizer == "bytes":
        vocabulary = Bytes()
    elif request.tokenizer.endswith(".json"):
        vocabulary = Tokenizer(read_tokenizer(request.tokenizer))
    else:
        vocabulary = Tiktoken(request.tokenizer)
    with_two_words(vocabulary, "the text")
    write_whole(kept, json.dumps(vocabulary.to_meta()))
    return vocabulary


def _spread_texts(job: Job) -> Iterator[str]:
    """About LEARNED characters of all parts: every so-manieth piece."""
    stride = max(1, -(-sum(source.size for source in job.sources) // LEARNED))
    number = 0
    for part in range(len(job.parts)):
        for piece in job.pieces(part, lambda _: None):
            if number % stride == 0:
                yield piece.text
            number += 1


def _has_changed(source: Source) -> bool:
    stat = os.stat(source.path)
    return (stat.st_size, stat.st_mtime_ns) != (source.size, source.mtime_ns)


def _write_index(job: Job, meta: dict[str, Any]) -> None:
    """Put the parts' records together, and leave nothing in the folder but what a prepared one holds."""
    folder, splits, counts = job.folder, {}, 0
    records = [
        json.loads(record_file(folder, n).read_text(encoding="utf-8")) for n in range(len(job.parts))
    ]
    if not any(record[name] for record in records for name in SPLIT_NAMES):
        raise UserError("the sources hold no text")
    for name in SPLIT_NAMES:
        shards = [record[name] for record in records if record[name]]
        if not shards:
            raise UserError(
                f"all of the text was drawn for one split, none for {name}: give --split block, or another --val_share or --seed"
            )
        splits[name] = {
            "tokens": sum(shard["tokens"] for shard in shards),
            "documents": sum(shard["documents"] for shard in shards),
            "shards": shards,
        }
    for n in range(len(job.parts)):
        counts = counts + np.load(counts_file(folder, n))
    with replacing(folder / COUNTS) as file:
        np.save(file, counts)
    write_whole(folder / "meta.json", json.dumps(meta))
    digest = hashlib.sha256((folder / COUNTS).read_bytes()).hexdigest()
    request = dataclasses.asdict(job.request)
    index = {"format": FORMAT, "splits": splits, COUNTS: digest, "request": request}
    write_whole(folder / INDEX, json.dumps(index, indent=1))
    shards = {shard["file"]: shard for split in splits.values() for shard in split["shards"]}
    remember(
        folder,
        {name: Content(each["sha256"], each["largest"]) for name, each in shards.items()},
        meta["dtype"],
    )
    for path in [*folder.glob("part-*"), folder / VOCABULARY, folder / STDIN, folder / JOB]:
        path.unlink(missing_ok=True)
