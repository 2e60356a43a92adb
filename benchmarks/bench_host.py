"""What a call of the losses costs its host, forward and backward, with the launches left out. No GPU.
Takes a few seconds of one CPU core. Prints a table, and writes it to the file that --json names.

    python benchmarks/bench_host.py [--repeats N] [--json FILE]

Every kernel and every matrix product is replaced by a function that does nothing; all else runs: checks, autograd,
buffers, PyTorch's small operations. Each way of calling takes its turn with a function of autograd that does nothing,
so the ratio to that holds on any machine. Times are CPU time of the calling thread in microseconds, the least of
all repeats: what others do to the machine only adds. What Triton's own launcher takes is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels take CPU tensors

import torch
from triton.runtime.interpreter import InterpretedFunction

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain_kernels import chunks, fused_diffusion_loss, fused_linear_diffusion_loss, weight_sums
from difftrain_kernels.positions import part_of
from measuring.arguments import count, user_path
from measuring.environment import environment
from measuring.timing import Nothing

SHAPE = (4, 64, 66)
N_EMBD = 32
MASK_ID = 65
CALLS = 20  # to a repeat
WAYS = {
    "plain": {},
    "not predicted": {"upstream_prediction": False},
    "upstream stated": {"upstream_scale": 1.0},
    "with the case table": {"return_cases": True},
}
LINEAR_WAYS = {
    "linear, one chunk": {},
    "linear, two chunks": {"chunk_tokens": 128},
    "linear, with the table": {"return_cases": True},
}


def count_launches(calls: dict) -> dict[str, list[str]]:
    """The kernels and products that a steady call launches, forward and backward; the products no more from now on."""
    found: list[str] = []

    def launch(kernel, grid):
        return lambda **arguments: found.append(kernel.fn.__name__.strip("_").removesuffix("_kernel"))

    def product(states, weight, bias, buffer):
        found.append("product")
        return part_of(buffer, slice(0, states.shape[0]))

    def add_product(*_):
        found.append("product")

    InterpretedFunction.__getitem__ = launch
    chunks.product, chunks.add_product, weight_sums.add_product = product, add_product, add_product
    counted = {}
    for name, call in calls.items():
        found.clear()
        call()
        counted[name] = list(found)
    return counted


def measure(repeats: int) -> list[dict]:
    """An entry for each way of calling: microseconds forward and together, and the ratio to nothing."""
    logits = torch.zeros(SHAPE, dtype=torch.bfloat16, device="cpu", requires_grad=True)
    y = torch.zeros(SHAPE[:-1], dtype=torch.int64, device="cpu")
    upstream = torch.ones((), dtype=torch.float32, device="cpu")
    like = {"dtype": torch.bfloat16, "device": "cpu", "requires_grad": True}
    head = torch.zeros(*SHAPE[:-1], N_EMBD, **like), torch.zeros(SHAPE[-1], N_EMBD, **like)
    rest = (y, y, MASK_ID, 0.25, 0.5)
    forwards = {"nothing": (partial(Nothing.apply, logits), logits)}
    for name, options in WAYS.items():
        call = partial(fused_diffusion_loss, logits, *rest, impl="triton", **options)
        forwards[name] = call, logits
    for name, options in LINEAR_WAYS.items():
        call = partial(fused_linear_diffusion_loss, *head, *rest, impl="triton", **options)
        forwards[name] = call, head

    def both(forward, inputs):
        loss = forward()
        torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, inputs, upstream)

    launches = count_launches({name: partial(both, *f) for name, f in forwards.items()})
    InterpretedFunction.__getitem__ = lambda kernel, grid: lambda **arguments: None
    times = {name: {"forward": [], "together": []} for name in forwards}
    for _ in range(repeats):
        for name, (forward, inputs) in forwards.items():
            for part, call in (("forward", forward), ("together", partial(both, forward, inputs))):
                start = time.thread_time()
                for _ in range(CALLS):
                    call()
                times[name][part].append((time.thread_time() - start) / CALLS * 1e6)
    least = {name: {part: min(all_) for part, all_ in parts.items()} for name, parts in times.items()}
    return [
        {
            "way": name,
            "forward_us": round(parts["forward"], 1),
            "together_us": round(parts["together"], 1),
            "ratio": round(parts["together"] / least["nothing"]["together"], 2),
            "launches": launches[name],
        }
        for name, parts in least.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--repeats", type=count, default=40)
    parser.add_argument("--json", type=user_path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {SHAPE} bf16; linear: D = {N_EMBD}"
    )
    for row in rows:
        print(
            f"{row['way']:22} {row['forward_us']:8.1f} us forward {row['together_us']:8.1f} us together "
            f"{row['ratio']:6.2f} of nothing  {', '.join(row['launches'])}"
        )
    if options.json:
        setting = environment() | {"repeats": options.repeats, "shape": SHAPE, "n_embd": N_EMBD}
        text = json.dumps({"setting": setting, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
