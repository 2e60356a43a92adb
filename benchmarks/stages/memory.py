"""Peak memory of loss and gradients beside the inputs, as the number of positions grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from comparison.checks import failure
from comparison.contenders import CONTENDERS
from comparison.problems import make_problem
from comparison.worker import calls_of
from measuring import device
from measuring.rehearsal import is_rehearsed
from measuring.timing import peak_mib

# From 4k to 64k positions at GPT-2's shape; each contender twice, since the first call may hold more.
POSITIONS, WIDTH, VOCAB_SIZE = (4096, 16384, 65536), 768, 50304
NAMES = ("ours linear", "ours from logits", "eager reference")


def run_memory(
    positions: Sequence[int] | None = None, width: int = WIDTH, vocab_size: int = VOCAB_SIZE
) -> dict[str, Any]:
    """MiB of each contender for each number of positions; one that finds no memory is a result."""
    if is_rehearsed():
        positions, width, vocab_size = (8, 16), 8, 40
    rows = []
    for n in positions or POSITIONS:
        problem = make_problem(n, vocab_size, torch.bfloat16, device.kind(), width)
        gradients = sum(t.nbytes for t in problem.inputs) / 2**20
        for contender in (c for c in CONTENDERS if c.kind == "linear" and c.name in NAMES):
            row: dict[str, Any] = {"positions": n, "contender": contender.name, "gradients_mib": gradients}
            try:
                # Over the logits: those of the linear problems are made within the call.
                (call,) = calls_of(contender.make(), [problem], 1.0, None)
                call.run()
                row["peak_mib"] = peak_mib(call.run)
            except Exception as error:
                row["failure"] = failure(error)
            rows.append(row)
            device.empty_cache()
    measured = [row for row in rows if "peak_mib" in row]
    ours = [row for row in rows if row["contender"] == NAMES[0]]
    return {
        "ok": all("peak_mib" in row for row in ours),
        "summary": f"{len(measured)} of {len(rows)} measured, the linear loss on up to {ours[-1]['positions']} positions",
        "rows": rows,
    }
