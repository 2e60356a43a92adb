"""Speed of `difftrain prepare`: MB of text a second and process, beside a plain numpy pass over the same bytes.
Takes about a minute. Prints a line for each tokenizer and writes nothing.

    python benchmarks/bench_prepare.py [--megabytes 100] [--turns 3] [--tokenizer char bytes bpe]

The text is the standard library's, repeated. The plain pass reads it whole, makes uint16 of its bytes, takes their
SHA-256 and writes them. Both run turn by turn in one process; seconds are by the wall clock, so run it on a quiet
machine. "bpe" learns 4096 byte pairs from 4 MB beforehand (extra: tok) and is set beside the library's own
encode_batch_fast. First comes a probe of the machine: seconds of a loop of 2 million turns.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain.data import ShardRequest, prepare_shards
from difftrain.data.byte_pairs import learn_byte_pairs
from difftrain.data.vocabulary import Tokenizer
from measuring.arguments import count

LEARNED = 4_000_000  # characters
PIECE = 1 << 16


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def probe() -> None:
    for _ in range(2_000_000):
        pass


def write_text(path: Path, size: int) -> None:
    """Pure ASCII sources of the standard library, repeated to ``size`` bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p.read_bytes() for p in sorted(root.glob("*.py"))]
    text = b"".join(content for content in files if content.isascii())
    path.write_bytes((text * (size // len(text) + 1))[:size])


def plain_pass(source: Path, target: Path) -> None:
    ids = np.frombuffer(source.read_bytes(), np.uint8).astype(np.uint16)
    hashlib.sha256(ids.data).digest()
    ids.tofile(target)


def compare(folder: Path, tokenizer: str, size: int, turns: int) -> str:
    source, ours, theirs = folder / "text.txt", [], []
    write_text(source, size)
    request, other = ShardRequest(tokenizer=tokenizer), lambda: plain_pass(source, folder / "plain.bin")
    if tokenizer == "bpe":
        text = source.read_text()
        definition = learn_byte_pairs([text[i : i + PIECE] for i in range(0, LEARNED, PIECE)], 4096)
        (folder / "tokenizer.json").write_text(definition)
        request = ShardRequest(tokenizer=str(folder / "tokenizer.json"))
        library, pieces = Tokenizer(definition), [text[i : i + PIECE] for i in range(0, size, PIECE)]
        other = lambda: library.encode_many(pieces)  # noqa: E731
    for turn in range(turns):
        theirs.append(seconds_of(other))
        ours.append(
            seconds_of(
                lambda turn=turn: prepare_shards([str(source)], folder / f"{tokenizer}{turn}", request)
            )
        )
    mine, plain = statistics.median(ours), statistics.median(theirs)
    what = "the library alone" if tokenizer == "bpe" else "a plain pass"
    return f"{tokenizer}: {size / mine / 1e6:.1f} MB/s, {what} {size / plain / 1e6:.1f} MB/s, ratio of times {mine / plain:.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--turns", type=count, default=3)
    parser.add_argument(
        "--tokenizer", nargs="+", choices=("char", "bytes", "bpe"), default=["char", "bytes"]
    )
    options = parser.parse_args(argv)
    print(f"probe: {min(seconds_of(probe) for _ in range(3)):.3f} s")
    for tokenizer in options.tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(Path(folder), tokenizer, int(options.megabytes * 1e6), options.turns), flush=True)


if __name__ == "__main__":
    main()
