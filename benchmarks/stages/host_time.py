"""What a call of a loss costs its host on this machine, launches included; the device is never waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from comparison.checks import failure
from comparison.contenders import CONTENDERS
from comparison.problems import make_problem
from comparison.worker import calls_of
from measuring import device
from measuring.rehearsal import is_rehearsed
from measuring.timing import Nothing, quantiles

# Small, so that the device is done before the host is.
SHAPES = {"logits": (256, 0, 66), "linear": (256, 64, 1024)}
NAMES = ("ours", "ours, upstream stated", "ours, not predicted", "ours linear", "eager reference")
ROUNDS, CALLS = 30, 20


def host_us(call: Callable[[], object], rounds: int, calls: int) -> tuple[float, float, float]:
    """Microseconds of a call on the host: median and 20 and 80 % quantiles of the rounds."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls * 1e6)
    device.synchronize()
    return quantiles(times)


def run_host() -> dict[str, Any]:
    """Loss and gradient of each contender, and of a function of autograd that does nothing."""
    rounds, calls = (2, 2) if is_rehearsed() else (ROUNDS, CALLS)
    rows = []
    for kind, (n, width, vocab_size) in SHAPES.items():
        problem = make_problem(n, vocab_size, torch.bfloat16, device.kind(), width)
        losses = {"nothing": lambda p, _: Nothing.apply(*p.inputs)} | {
            c.name: c.make() for c in CONTENDERS if c.kind == kind and c.name in NAMES
        }
        for name, loss_of in losses.items():
            row: dict[str, Any] = {"kind": kind, "contender": name, "shape": [n, width, vocab_size]}
            try:
                (call,) = calls_of(loss_of, [problem], 1.0, None)
                row["us"], row["us_20"], row["us_80"] = host_us(call.run, rounds, calls)
            except Exception as error:
                row["failure"] = failure(error)
            rows.append(row)
    shown = ", ".join(f"{r['kind']} {r['contender']} {r['us']:.0f}" for r in rows if "us" in r)
    return {"ok": all("us" in row for row in rows), "summary": f"us: {shown}", "rows": rows}
