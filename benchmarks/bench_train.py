"""Time of a training step and of its parts, and of saving and resuming.
Takes half a minute on two CPU cores at its default shape. Prints a table, and writes it to the file that
--json names.

    python benchmarks/bench_train.py [--steps N] [--device D] [--deterministic] [--json FILE] [--n_layer N] ...

The defaults are the shape of the specification's first implementation: batch 12, block 64, 4
layers, 4 heads, width 128, vocabulary 66. Tokens are random: their values do not change the work.
Times are medians with 20 % and 80 % quantiles; on CUDA each part ends with a synchronisation. A
checkpoint is saved in the background: "save waits" is what the loop waits for, the copy of the state,
"save writes" what the thread then takes to write, flush, digest, read back and rename it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain.checkpoints.reading import find_newest_good
from difftrain.checkpoints.saver import CheckpointSaver
from difftrain.config import Config
from difftrain.data import Corpus, corrupt, sample_indices
from difftrain.data.vocabulary import Ids
from difftrain.model import Transformer, make_optimizer, restore_optimizer
from difftrain.runtime import Runtime, start_runtime
from difftrain.schedule import masking_penalties
from difftrain_kernels import fused_diffusion_loss
from measuring.arguments import user_path
from measuring.timing import quantiles

PARTS = ("data", "corruption", "forward", "loss", "backward", "optimizer")


def measure(
    config: Config, vocab_size: int, runtime: Runtime, steps: int, warmup: int, saves: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of each part in each of ``steps`` steps after ``warmup`` more, and of ``saves`` saves."""
    device = runtime.device
    words = np.random.default_rng(0).integers(0, vocab_size - 1, 1_000_000, dtype=np.uint16)
    corpus = Corpus(words, words, Ids(vocab_size - 1), Path())
    torch.manual_seed(config.seed)
    model = Transformer(config, vocab_size).to(device)
    optimizer = make_optimizer(model, config)
    mask_id = vocab_size - 1
    times: dict[str, list[float]] = {part: [] for part in PARTS}

    def lap(part: str, since: float) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        times[part].append(1e3 * (now - since))
        return now

    for step in range(warmup + steps):
        if step == warmup:
            for values in times.values():
                values.clear()
        pk, pm = masking_penalties(step, config)
        now = time.perf_counter()
        samples = sample_indices(step, 0, 0, 1, config)
        tokens = corpus.windows("train", samples, seed=config.seed, length=config.block_size).to(device)
        now = lap("data", now)
        x, y = corrupt(tokens, samples.to(device), seed=config.seed, split="train", vocab_size=vocab_size,
                       max_corruption=config.max_corruption)  # fmt: skip
        now = lap("corruption", now)
        logits = model(x)
        now = lap("forward", now)
        loss = fused_diffusion_loss(logits, y, x, mask_id, pk, pm)
        now = lap("loss", now)
        loss.backward()
        now = lap("backward", now)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lap("optimizer", now)
    return times, measure_saves(config, model, optimizer, corpus.vocabulary, runtime, saves)


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


def report(
    times: dict[str, list[float]], saves: dict[str, list[float]], config: Config
) -> dict[str, object]:
    """Medians and quantiles in ms, tokens a second, and the shares of data plus corruption and of saving."""
    steps = [sum(parts) for parts in zip(*times.values(), strict=True)]
    rows = {name: summary(values) for name, values in {**times, "step": steps, **saves}.items()}
    total = rows["step"]["median_ms"]
    interval = config.eval_interval * total
    return {
        "parts": rows,
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
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--vocab_size", type=int, default=66, help="with [MASK] [66]")
    parser.add_argument("--position", default="learned", choices=("learned", "rotary"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--saves", type=int, default=20, help="checkpoints saved and resumed from [20]")
    parser.add_argument("--deterministic", action="store_true", help="as the option of difftrain train")
    parser.add_argument("--json", type=user_path, help="write the figures here too")
    args = parser.parse_args(arguments)
    config = Config(
        **{name: getattr(args, name) for name in shape},
        position=args.position,
        device=args.device,
        dtype="float32",
        deterministic=args.deterministic,
    )
    with start_runtime(config) as runtime:
        device = runtime.device
        is_cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine()
        setting = {
            "device": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{
                key: getattr(args, key)
                for key in (*shape, "vocab_size", "position", "deterministic", "steps")
            },
        }
        print(" ".join(f"{key}={value}" for key, value in setting.items()))
        result = report(
            *measure(config, args.vocab_size, runtime, args.steps, args.warmup, args.saves), config
        )
    total = result["parts"]["step"]["median_ms"]
    print(f"{'part':<12}{'median ms':>10}{'20 %':>9}{'80 %':>9}{'of a step':>11}")
    for part, row in result["parts"].items():
        share = row["median_ms"] / total
        print(
            f"{part:<12}{row['median_ms']:>10.3f}{row['q20_ms']:>9.3f}{row['q80_ms']:>9.3f}{share:>11.1%}"
        )
    print(
        f"{result['tokens_per_second']:,.0f} tokens/s; data and corruption take {result['data_share']:.1%} of the "
        f"step; a checkpoint every {result['eval_interval']} steps takes {result['save_share']:.3%} of the run"
    )
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
