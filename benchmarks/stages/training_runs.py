"""The same training with each implementation of the loss: speed, memory, and whether the curves agree.

GPT-2 small, 32768 tokens a step in one micro-batch, on made-up tokens in which every other word
follows from the one before: something to learn, with GPT-2's vocabulary, and nothing to download.
Then short trainings of 4096 to 65536 tokens a step, for their time and memory.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.config import Config
from difftrain.data.opening import GPT2_WORDS
from difftrain.reporting.log import FILE
from measuring.checkout import SOURCES
from measuring.supervision import run_command

IMPLEMENTATIONS = ("reference", "logits", "linear")
GPT2_SMALL = {
    "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32, "position": "learned",
    "max_iters": 500, "learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 50, "masking_warmup_iters": 200,
    "eval_interval": 500, "eval_iters": 2, "eval_batch_size": 8, "log_interval": 10, "keep_checkpoints": 1,
    "dtype": "bfloat16", "device": "cuda",
}  # fmt: skip
N_TOKENS = 20_000_000
FULL_SECONDS = 600.0  # with less, as many fewer steps
FEWEST_STEPS = 60  # the first records are left out of the speed
# The first step starts from equal weights on an equal batch: the losses differ by their rounding
# alone, far below bf16's 0.4 %. Later the runs drift apart as any two bf16 runs do, around one curve.
FIRST_STEP, WINDOW_MEAN = 1e-3, 1e-2
WINDOWS = 10
FEWEST_RECORDS = 5 * WINDOWS  # with fewer, a tenth is a few noisy losses
SIZES = (4, 16, 64)  # sequences of a step, of 1024 tokens
SHORT_STEPS = 40


def write_tokens(folder: Path, n_words: int = GPT2_WORDS, n_tokens: int = N_TOKENS, seed: int = 0) -> Path:
    """Token files in nanoGPT's format: words by Zipf's law, every other one told by the one before."""
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, n_words + 1)
    successor = rng.permutation(n_words)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", n_tokens), ("val", n_tokens // 10)):
        words = rng.choice(n_words, n // 2, p=share / share.sum())
        np.stack([words, successor[words]], axis=1).astype(np.uint16).tofile(folder / f"{split}.bin")
    if n_words != GPT2_WORDS:  # without meta data a folder holds GPT-2's words
        meta = {"vocab_size": n_words, "dtype": "uint16"}
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def train_by_command(config: Config, seconds: float) -> None:
    """Run `difftrain train` in a process of its own, so that its peak memory is its own.

    Raises:
        RuntimeError: it failed, or did not finish in time; the message ends with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(config.to_toml(), encoding="utf-8")
        paths = [*SOURCES, os.environ.get("PYTHONPATH", "")]
        code, text = run_command(
            [sys.executable, "-m", "difftrain", "train", "--config", str(file)], seconds,
            environment={"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        )  # fmt: skip
    if code != 0:
        last = (text.strip().splitlines() or ["no output"])[-1][:200]
        what = f"not finished in {seconds:.0f} s" if code is None else f"exit code {code}"
        raise RuntimeError(f"{what}: {last}")


def read_run(config: Config) -> dict[str, Any]:
    """Speed, memory and curve from a finished run's log."""
    lines = (Path(config.out_dir) / FILE).read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    settled = records[2:] or records  # the first intervals compile kernels
    return {
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in settled),
        "peak_memory_mib": records[-1]["peak_memory_mib"],
        "curve": [[r["step"], r["loss"]] for r in records],
    }


def differences(curve: list[list[float]], reference: list[list[float]]) -> tuple[float, float]:
    """Relative difference of the first loss, and the largest of the windows' means."""
    if [step for step, _ in curve] != [step for step, _ in reference]:
        raise ValueError("the curves have other steps")
    ours, theirs = (np.array([loss for _, loss in c], dtype=float) for c in (curve, reference))
    means = [[part.mean() for part in np.array_split(c, min(WINDOWS, len(c)))] for c in (ours, theirs)]
    apart = np.abs(np.subtract(*means)) / np.abs(means[1])
    return float(abs(ours[0] / theirs[0] - 1)), float(apart.max())  # a NaN stays NaN


def agreement(curve: list[list[float]], reference: list[list[float]]) -> tuple[bool, str]:
    """Whether two curves agree, and the numbers it rests on; a NaN never does."""
    first, largest = differences(curve, reference)
    if len(curve) < FEWEST_RECORDS and first <= FIRST_STEP and largest < float("inf"):
        return True, f"agrees at first: {100 * first:.2g} % apart; too few losses to compare curves"
    agrees = first <= FIRST_STEP and largest <= WINDOW_MEAN
    word = "agrees" if agrees else "differs"
    return (
        agrees,
        f"{word}: first loss {100 * first:.2g} % apart, means of tenths at most {100 * largest:.2g} %",
    )


def _trained(
    options: dict[str, Any], impl: str, data: Path, train: Callable[[Config, float], object], end: float
) -> dict[str, Any]:
    """What a run's log says, or why it failed."""
    config = Config(**options, data=str(data), out_dir=str(data.parent / "run"), loss_impl=impl)
    try:
        train(config, max(1.0, end - time.monotonic()))
        return read_run(config)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    finally:
        # Checkpoints take gigabytes; only the log was wanted.
        shutil.rmtree(config.out_dir, ignore_errors=True)


def run_training(
    seconds: float,
    changes: dict[str, Any] | None = None,
    *,
    n_words: int = GPT2_WORDS,
    n_tokens: int = N_TOKENS,
    train: Callable[[Config, float], object] = train_by_command,
) -> dict[str, Any]:
    """Train with each implementation in turn.

    Args:
        seconds: for all of them together; one that does not finish is recorded as such. With less than
            FULL_SECONDS they take fewer steps.
        changes: of GPT2_SMALL's options.
        train: how one run is made.
    """
    end = time.monotonic() + seconds
    # A short session's runs are short.
    steps = max(FEWEST_STEPS, int(GPT2_SMALL["max_iters"] * min(1.0, seconds / FULL_SECONDS)))
    options = GPT2_SMALL | {"max_iters": steps, "eval_interval": steps} | (changes or {})
    with tempfile.TemporaryDirectory() as folder:
        data = write_tokens(Path(folder) / "tokens", n_words, n_tokens)
        runs = {impl: _trained(options, impl, data, train, end) for impl in IMPLEMENTATIONS}
    oks = []
    for run in runs.values():
        if "failure" in run:
            oks.append(False)
        elif "failure" in runs["reference"]:
            run["agreement"] = "no reference to compare with"
            oks.append(False)
        else:
            ok, run["agreement"] = agreement(run["curve"], runs["reference"]["curve"])
            oks.append(ok)
    tokens = options["batch_size"] * options["block_size"]
    what = (
        f"{options['max_iters']} steps of {tokens} tokens, {options['n_layer']} layers of width "
        f"{options['n_embd']}, vocabulary {n_words + 1}, {options['dtype']}"
    )
    summary = "; ".join(f"{impl}: {r.get('failure') or r['agreement']}" for impl, r in runs.items())
    return {"ok": all(oks), "summary": summary, "what": what, "options": options, "runs": runs}


def run_sizes(
    seconds: float,
    changes: dict[str, Any] | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    n_words: int = GPT2_WORDS,
    n_tokens: int = N_TOKENS // 10,
    train: Callable[[Config, float], object] = train_by_command,
) -> dict[str, Any]:
    """Time and memory of a step with each implementation, for each number of sequences in a step.

    One that fails, for want of memory say, is a result; ok is False only where every run of a size failed.

    Args:
        seconds, changes, train: as in :func:`run_training`.
    """
    end = time.monotonic() + seconds
    options = GPT2_SMALL | {"max_iters": SHORT_STEPS, "eval_interval": SHORT_STEPS} | (changes or {})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_tokens(Path(folder) / "tokens", n_words, n_tokens)
        for size in sizes:
            tokens = size * options["block_size"]
            for impl in IMPLEMENTATIONS:
                run = _trained(options | {"batch_size": size}, impl, data, train, end)
                row = {"tokens": tokens, "impl": impl, "failure": run.get("failure")}
                if "failure" not in run:
                    row["ms"] = 1e3 * tokens / run["tokens_per_second"]
                    row["peak_mib"] = run["peak_memory_mib"]
                rows.append(row)
    trained = [row["tokens"] for row in rows if not row["failure"]]
    return {
        "ok": all(row["tokens"] in trained for row in rows),
        "summary": f"{len(trained)} of {len(rows)} runs of {options['max_iters']} steps",
        "rows": rows,
    }
