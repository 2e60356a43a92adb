"""CPU time and memory of the loss beside the eager formula that it replaces, forward and backward.
Takes about five minutes on two CPU cores with its default shapes. Prints a table, and writes it to the file that
--json names.

    python benchmarks/bench_cpu.py [--threads 1 2] [--seconds S] [--shapes 768x66 ...] [--json FILE]

Times are CPU seconds of the process (all its threads), of calls taken in turn, so that what else runs
on the machine meets all alike: medians with 20 % and 80 % quantiles, and the median of the ratios to
the eager call of the same round. Memory is the most that tensors hold beyond the inputs at one time,
by a dispatch mode that follows the storages. "eager" is what a researcher writes: ``cross_entropy`` in
the logits' dtype, argmax, weights, mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain_kernels import fused_diffusion_loss
from measuring.arguments import count, user_path
from measuring.environment import environment
from measuring.live_memory import peak_mib
from measuring.timing import cpu_times, quantiles

SHAPES = ("768x66", "4096x1003", "512x50304", "512x50304xbfloat16")


def eager(logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float, pm: float) -> Tensor:
    nll = F.cross_entropy(logits, y, ignore_index=-1, reduction="none")
    says_mask = logits.argmax(-1) == mask_id
    weight = torch.ones_like(nll)
    weight = torch.where((x == mask_id) & (y != mask_id) & says_mask, pk, weight)
    weight = torch.where((x == y) & (x != mask_id) & says_mask, pm, weight)
    return (weight * nll).mean()


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "fused": fused_diffusion_loss,
    "fused, with table": lambda *arguments: fused_diffusion_loss(*arguments, return_cases=True)[0],
}


def problem(shape: str) -> tuple:
    """Arguments of a loss; half of the positions masked, a quarter corrupted."""
    n, vocab_size, *dtype = shape.split("x")
    n, mask_id = int(n), int(vocab_size) - 1
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, mask_id + 1, generator=generator)
    logits = logits.to(getattr(torch, dtype[0] if dtype else "float32"))
    words, y = (torch.randint(0, mask_id, (n,), generator=generator) for _ in range(2))
    chance = torch.rand(n, generator=generator)
    x = torch.where(chance < 0.5, mask_id, torch.where(chance < 0.75, words, y))
    y = torch.where((chance >= 0.5) & (x != y), mask_id, y)
    return logits.requires_grad_(), y, x, mask_id, 0.5, 0.25


def step(loss: Callable[..., Tensor], arguments: tuple) -> None:
    arguments[0].grad = None
    loss(*arguments).backward()


def measure(shape: str, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU, ratios to eager and peak MiB of each contender."""
    arguments = problem(shape)
    times = cpu_times({name: partial(step, loss, arguments) for name, loss in CONTENDERS.items()}, seconds)
    rows = {}
    for name, values in times.items():
        ratios = [ours / eager for ours, eager in zip(values, times["eager"], strict=True)]
        rows[name] = dict(zip(("median_ms", "q20_ms", "q80_ms"), quantiles(values), strict=True))
        rows[name]["ratio"] = quantiles(ratios)[0]
        rows[name]["peak_mib"] = peak_mib(partial(step, CONTENDERS[name], arguments))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=count, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each shape and thread count [10]")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxV or NxVxDTYPE")
    parser.add_argument("--json", type=user_path, help="write the figures here too")
    args = parser.parse_args(arguments)
    found = []
    print(
        f"{'shape':<20}{'threads':>8}  {'loss':<18}{'CPU ms':>9}{'20 %':>9}{'80 %':>9}{'ratio':>7}{'MiB':>8}"
    )
    for shape in args.shapes:
        for threads in args.threads:
            torch.set_num_threads(threads)
            rows = measure(shape, args.seconds)
            found.append({"shape": shape, "threads": threads, "losses": rows})
            for name, row in rows.items():
                times = "".join(f"{row[key]:>9.3f}" for key in ("median_ms", "q20_ms", "q80_ms"))
                print(
                    f"{shape:<20}{threads:>8}  {name:<18}{times}{row['ratio']:>7.2f}{row['peak_mib']:>8.1f}",
                    flush=True,
                )
    if args.json:
        setting = environment() | {"cpu": _cpu(), "seconds": args.seconds}
        args.json.write_text(
            json.dumps({"setting": setting, "figures": found}, indent=1) + "\n", encoding="utf-8"
        )


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
