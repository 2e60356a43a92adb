"""CPU time of the loss from hidden states beside a matrix product and the eager formula, forward and backward.
Takes about two minutes. Prints a table, and writes it to the file that --json names.

    python benchmarks/bench_cpu_linear.py [--shape N,D,V ...] [--threads 1 2] [--seconds 8] [--ignored 0.0]
        [--json FILE]

The eager formula is written as a user writes it: ``linear``, ``cross_entropy`` of each position, ``argmax``, the
weights, a mean. Both run in one process, in turns of at least 20 ms. What is compared is the CPU seconds of all
threads, by median; the ratio is ours over eager. fp32, case table included. Memory is the most that torch's tensors
hold beyond the inputs at one time, gradients included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from comparison.problems import IGNORE_INDEX, Problem, make_problem
from difftrain_kernels import fused_linear_diffusion_loss
from measuring.arguments import count, linear_shape, user_path
from measuring.environment import environment
from measuring.live_memory import peak_mib
from measuring.timing import cpu_times

SHAPES = [(768, 128, 66), (4096, 256, 1003), (512, 768, 50304)]


def ours(problem: Problem) -> torch.Tensor:
    loss, _ = fused_linear_diffusion_loss(*problem.inputs, *problem.labels, return_cases=True)
    return loss


def eager(problem: Problem) -> torch.Tensor:
    y, x, mask_id, pk, pm = problem.labels
    logits = F.linear(*problem.inputs)
    nll = F.cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none")
    says_mask = logits.detach().argmax(1) == mask_id
    weight = torch.where(says_mask & (x == mask_id) & (y != mask_id), pk, 1.0)
    weight = torch.where(says_mask & (x == y) & (x != mask_id), pm, weight)
    return (weight * nll).mean()


def step(loss: Callable[[Problem], torch.Tensor], problem: Problem) -> None:
    """Forward and backward."""
    for tensor in problem.inputs:
        tensor.grad = None
    loss(problem).backward()


def compare(problem: Problem, seconds: float) -> tuple[float, float, int]:
    """Median CPU milliseconds of ours and of eager, and how many turns they are of."""
    torch.testing.assert_close(ours(problem), eager(problem), rtol=1e-4, atol=1e-5)
    times = cpu_times({loss.__name__: partial(step, loss, problem) for loss in (ours, eager)}, seconds)
    return statistics.median(times["ours"]), statistics.median(times["eager"]), len(times["ours"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", nargs="+", type=linear_shape, metavar="N,D,V", default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=count, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and number of threads")
    parser.add_argument("--ignored", type=float, default=0.0, help="share of positions that do not count")
    parser.add_argument("--json", type=user_path, help="write the figures here too")
    options = parser.parse_args(arguments)
    found = []
    print(f"torch {torch.__version__}, fp32; CPU ms, median of turns")
    for n, width, vocab_size in options.shape:
        problem = make_problem(n, vocab_size, torch.float32, "cpu", width)
        problem.y[: int(options.ignored * n)] = IGNORE_INDEX
        mine, theirs = (peak_mib(partial(step, loss, problem)) for loss in (ours, eager))
        print(f"{n} x {width} x {vocab_size}, MiB: ours {mine:.1f}, eager {theirs:.1f}")
        peaks = {"ours_peak_mib": mine, "eager_peak_mib": theirs}
        for threads in options.threads:
            torch.set_num_threads(threads)
            mine, theirs, turns = compare(problem, options.seconds)
            print(
                f"{n} x {width} x {vocab_size}, {threads} thread(s): ours {mine:8.2f}, eager "
                f"{theirs:8.2f}, ratio {mine / theirs:.2f} ({turns} turns)",
                flush=True,
            )
            figure = {"shape": [n, width, vocab_size], "threads": threads, "turns": turns}
            figure |= {"ours_ms": mine, "eager_ms": theirs, "ratio": mine / theirs}
            found.append(figure | peaks)
    if options.json:
        setting = environment() | {"seconds": options.seconds, "ignored": options.ignored}
        text = json.dumps({"setting": setting, "figures": found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
