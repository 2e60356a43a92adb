"""Time of a training step and of its parts, beside a plain GPT-2 step, and of saving and resuming.
Takes a minute on two CPU cores at its default shape. Prints a table, and writes it to the file that
--json names.

    python benchmarks/bench_train.py [--steps N] [--device D] [--deterministic] [--json FILE] [--n_layer N] ...

The defaults are the shape of the specification's first implementation: batch 12, block 64, 4
layers, 4 heads, width 128, vocabulary 66. Tokens are random: their values do not change the work.
The trainer's step and a plain one of the same shape (training_step/plain_step.py) are taken in turn; "loop" is
the trainer's step as its loop takes it, and is compared with the plain step. Times are medians with 20 % and 80 %
quantiles; on CUDA each part ends with a synchronisation. --clock cpu counts the seconds of all the process's
threads instead, which other programs on the machine disturb less. A checkpoint is saved in the background: "save
waits" is what the loop waits for, the copy of the state, "save writes" what the thread then takes to write, flush,
digest, read back and rename it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain.checkpoints.reading import find_newest_good
from difftrain.checkpoints.saver import CheckpointSaver
from difftrain.config import Config
from difftrain.data.vocabulary import Ids
from difftrain.model import Transformer, restore_optimizer
from difftrain.runtime import Runtime, start_runtime
from measuring.arguments import count, user_path
from measuring.timing import quantiles
from training_step.our_step import PARTS, OurStep
from training_step.plain_step import PlainGPT, PlainStep

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Times = dict[str, list[float]]


def measure(
    config: Config, vocab_size: int, runtime: Runtime, clock: Callable[[], float],
    steps: int, warmup: int, saves: int,
) -> tuple[Times, Times, Times]:  # fmt: skip
    """Milliseconds of each part of ours and of the plain step in each of ``steps`` steps, and of ``saves`` saves.

    ``warmup`` steps more come first. Of ours "loop" is a whole step, taken as the loop takes it.
    """
    device = runtime.device
    words = np.random.default_rng(0).integers(0, vocab_size - 1, 1_000_000, dtype=np.uint16)
    ours = OurStep(config, words, vocab_size, runtime)
    times: tuple[Times, Times] = {}, {}

    def record(step: Callable[[Callable[[str], None]], None], found: Times) -> None:
        since = clock()

        def lap(part: str) -> None:
            nonlocal since
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = clock()
            found.setdefault(part, []).append(1e3 * (now - since))
            since = now

        step(lap)

    def loop(lap: Callable[[str], None]) -> None:
        ours.as_the_loop_takes_it()
        lap("loop")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.bin"
        words.tofile(file)
        # The data's words: [MASK] is ours.
        shape = (vocab_size - 1, config.block_size, config.n_layer, config.n_head, config.n_embd)
        plain = PlainStep(PlainGPT(*shape), file, config.batch_size, device)
        for step in range(warmup + steps):
            if step == warmup:
                for found in times:
                    found.clear()
            record(ours, times[0])
            record(plain, times[1])
            record(loop, times[0])
    run = ours.run
    run.settle()
    return *times, measure_saves(config, run.model, run.optimizer, run.corpus.vocabulary, runtime, saves)


def measure_saves(
    config: Config,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    vocabulary: Ids,
    runtime: Runtime,
    saves: int,
) -> dict[str, list[float]]:
    """Milliseconds that the loop waits in a save, that the thread then writes, and that a resume takes."""
    times: dict[str, list[float]] = {"save waits": [], "save writes": [], "resume": []}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        for step in range(saves):
            saver = CheckpointSaver(run_dir, config, vocabulary, runtime)
            marks = [time.perf_counter()]
            saver.save(step, model, optimizer, {}, best_step=None)
            marks.append(time.perf_counter())
            saver.finish()
            marks.append(time.perf_counter())
            checkpoint, _ = find_newest_good(run_dir)
            checkpoint.load_weights(model)
            restore_optimizer(model, optimizer, checkpoint.read_optimizer)
            marks.append(time.perf_counter())
            for name, since, until in zip(times, marks, marks[1:], strict=False):
                times[name].append(1e3 * (until - since))
    return times


def summary(values: list[float]) -> dict[str, float]:
    return dict(zip(("median_ms", "q20_ms", "q80_ms"), quantiles(values), strict=True))


def report(ours: Times, plain: Times, saves: Times, config: Config) -> dict[str, object]:
    """Medians and quantiles in ms, tokens a second, ratios to the plain step, and shares of a step and a run."""
    ours, loop = {part: ours[part] for part in PARTS}, ours["loop"]

    def rows_of(parts: Times) -> dict[str, dict[str, float]]:
        steps = [sum(times) for times in zip(*parts.values(), strict=True)]
        return {name: summary(values) for name, values in {**parts, "step": steps}.items()}

    rows, others = rows_of(ours) | {"loop": summary(loop)}, rows_of(plain)
    total = rows["loop"]["median_ms"]
    interval = config.eval_interval * total
    rows |= {name: summary(values) for name, values in saves.items()}
    ratios = {name: rows[name]["median_ms"] / row["median_ms"] for name, row in others.items()}
    return {
        "parts": rows,
        "plain": others,
        "ratios": ratios | {"loop": total / others["step"]["median_ms"]},
        "tokens_per_second": 1e3 * config.global_batch_size * config.block_size / total,
        "data_share": (rows["data"]["median_ms"] + rows["corruption"]["median_ms"]) / total,
        "save_share": rows["save waits"]["median_ms"] / (interval + rows["save waits"]["median_ms"]),
        "eval_interval": config.eval_interval,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = {"batch_size": 12, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=f"[{default}]")
    parser.add_argument("--vocab_size", type=count, default=66, help="with [MASK] [66]")
    parser.add_argument(
        "--position", default="learned", choices=("learned", "rotary"), help="ours [learned]"
    )
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="which seconds are counted [wall]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--saves", type=count, default=20, help="checkpoints saved and resumed from [20]")
    parser.add_argument("--deterministic", action="store_true", help="as the option of difftrain train")
    parser.add_argument("--json", type=user_path, help="write the figures here too")
    args = parser.parse_args(arguments)
    config = Config(
        **{name: getattr(args, name) for name in shape},
        position=args.position,
        device=args.device,
        dtype="float32",
        deterministic=args.deterministic,
        eval_iters=2,
        eval_batch_size=1,
    )
    with start_runtime(config) as runtime:
        device = runtime.device
        is_cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine()
        setting = {
            "date": date.today().isoformat(),
            "device": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{
                key: getattr(args, key)
                for key in (*shape, "vocab_size", "position", "clock", "deterministic", "steps")
            },
        }
        print(" ".join(f"{key}={value}" for key, value in setting.items()))
        clock = CLOCKS[args.clock]
        times = measure(config, args.vocab_size, runtime, clock, args.steps, args.warmup, args.saves)
        result = report(*times, config)
    total = result["parts"]["loop"]["median_ms"]
    print(
        f"{'part':<12}{'median ms':>10}{'20 %':>9}{'80 %':>9}{'of a step':>11}{'plain ms':>10}{'ratio':>7}"
    )
    for part, row in result["parts"].items():
        share = row["median_ms"] / total
        line = (
            f"{part:<12}{row['median_ms']:>10.3f}{row['q20_ms']:>9.3f}{row['q80_ms']:>9.3f}{share:>11.1%}"
        )
        if part in result["ratios"]:
            plain = result["plain"]["step" if part == "loop" else part]["median_ms"]
            line += f"{plain:>10.3f}{result['ratios'][part]:>7.2f}"
        print(line)
    print(
        f"{result['tokens_per_second']:,.0f} tokens/s; data and corruption take {result['data_share']:.1%} of the "
        f"step; a checkpoint every {result['eval_interval']} steps takes {result['save_share']:.3%} of the run"
    )
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
