"""Launch every kernel of the loss on small shapes and check what it gives; for compute-sanitizer.

cd benchmarks; compute-sanitizer --tool memcheck python -m stages.small_launches
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from comparison.checks import Judge
from comparison.contenders import CONTENDERS
from comparison.entries import NO_WEIGHTS, OURS
from comparison.problems import Problem, make_problem
from difftrain_kernels import fused_diffusion_loss
from measuring import device
from measuring.rehearsal import is_rehearsed

# Rows held in registers; streamed rows of one full block and a tail, aligned and not.
VOCAB_SIZES = (66, 4104, 4201)
DTYPES = (torch.bfloat16, torch.float32)
N, WIDTH = 6, 16
UPSTREAMS = (1.0, 0.125)


def losses(kind: str, vocab_size: int, impl: str = "auto") -> Iterator[tuple[str, bool, object]]:
    """(name, is it a plain cross-entropy, loss) of all that can be launched on such rows."""
    for contender in (c for c in CONTENDERS if not c.is_compiled):  # whose kernels are the same
        is_plain = NO_WEIGHTS in contender.lacks
        if contender.family == OURS and contender.kind == kind and not (is_plain and vocab_size <= 4096):
            yield contender.name, is_plain, contender.make()
    if kind == "logits":
        # What another upstream gradient than stated launches, and the case table.
        for overwrite in (False, True):
            yield (
                f"stated wrongly, over the logits {overwrite}",
                False,
                partial(_stated_wrongly, overwrite, impl),
            )
        yield "with the case table", False, partial(_with_cases, impl)


def _stated_wrongly(overwrite: bool, impl: str, problem: Problem, scale: float) -> torch.Tensor:
    return fused_diffusion_loss(
        *problem.inputs, *problem.labels, impl=impl, upstream_scale=2 * scale, overwrite_logits=overwrite
    )


def _with_cases(impl: str, problem: Problem, _: float) -> torch.Tensor:
    loss, cases = fused_diffusion_loss(*problem.inputs, *problem.labels, impl=impl, return_cases=True)
    if int(cases.counts.sum()) != int((problem.y != -1).sum()):
        raise AssertionError("the case table counts other positions than the batch holds")
    return loss


def check(where: str, vocab_sizes=VOCAB_SIZES, dtypes=DTYPES, impl: str = "auto") -> list[str]:
    """One line for each loss on each shape: its name, and what is wrong or nothing."""
    lines = []
    for kind in ("logits", "linear"):
        for vocab_size in vocab_sizes:
            for dtype in dtypes:
                problem = make_problem(N, vocab_size, dtype, where, WIDTH if kind == "linear" else 0)
                judges = {}
                for name, is_plain, loss_of in losses(kind, vocab_size, impl):
                    if is_plain not in judges:
                        plain = replace(problem, pk=1.0, pm=1.0) if is_plain else problem
                        judges[is_plain] = Judge(plain, UPSTREAMS)
                    wrong = judges[is_plain].verdict(loss_of).objection
                    lines.append(f"{kind} V={vocab_size} {dtype} {name}: {wrong}".rstrip())
    return lines


def main() -> int:
    if not device.is_there():
        print("small_launches.py launches kernels on a CUDA GPU, and torch finds none.", file=sys.stderr)
        return 1
    lines = check(device.kind(), VOCAB_SIZES[:1] if is_rehearsed() else VOCAB_SIZES)
    device.synchronize()
    wrong = [line for line in lines if not line.endswith(":")]
    print("\n".join(wrong))
    print(f"{len(lines)} results checked, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
