"""Captured in a CUDA graph, the losses must follow new inputs and penalties, bit for bit as called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comparison.problems import Problem, make_problem
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss
from measuring import device
from measuring.rehearsal import is_rehearsed

# Rows in registers and streamed rows; hidden states, in two chunks of tokens.
SHAPES = {"small rows": (64, 66), "streamed rows": (64, 5001)}
LINEAR_SHAPE = (64, 32, 5001)
PENALTIES = ((1.0, 0.0), (0.25, 0.5), (0.6, 2.0))

# (step) -> (replay, the step's outputs, which replay fills anew)
Capture = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], object], list[Tensor]]]


def cases() -> dict[str, tuple[Callable[[Problem], Tensor], tuple[int, ...]]]:
    """Every loss that is captured, and its shape."""

    def logits(problem: Problem, **options: Any) -> Tensor:
        return fused_diffusion_loss(*problem.inputs, *problem.labels, **options)

    found = {}
    for name, shape in SHAPES.items():
        found[name] = (logits, shape)
        found[f"{name}, upstream stated"] = (partial(logits, upstream_scale=1.0), shape)
    found["linear"] = (
        lambda p: fused_linear_diffusion_loss(*p.inputs, *p.labels, chunk_tokens=48),
        LINEAR_SHAPE,
    )
    return found


def cuda_capture(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """Record the step in a graph, after three calls on another stream to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph.replay, outputs


def rehearsed_capture(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """In place of a graph: what is replayed is called again, into the same outputs."""
    outputs = step()

    def replay() -> None:
        for old, new in zip(outputs, step(), strict=True):
            old.copy_(new)

    return replay, outputs


def replays_wrong(
    loss_of: Callable[[Problem], Tensor], shape: tuple[int, ...], capture: Capture, where: str
) -> str:
    """What a replay gets wrong, or nothing."""
    n, *width, vocab_size = shape

    def problem_of(seed: int) -> Problem:
        pk, pm = (torch.tensor(p, device=where) for p in PENALTIES[seed])
        made = make_problem(n, vocab_size, torch.bfloat16, where, *(width or [0]), seed=seed)
        return replace(made, pk=pk, pm=pm)

    def step_on(problem: Problem) -> list[Tensor]:
        loss = loss_of(problem)
        return [loss.detach(), *torch.autograd.grad(loss, problem.inputs)]

    static = problem_of(0)
    replay, outputs = capture(lambda: step_on(static))
    names = ["loss", *(["gradient"] if not width else ["hidden gradient", "weight gradient"])]
    for seed in range(len(PENALTIES)):
        new = problem_of(seed)
        static.restore(new)
        for name in ("y", "x", "pk", "pm"):
            getattr(static, name).copy_(getattr(new, name))
        replay()
        for name, found, expected in zip(names, outputs, step_on(new), strict=True):
            if not torch.equal(found, expected):
                error = (found.double() - expected.double()).abs().max().item()
                return f"replay {seed}: {name} off by {error:.2g}"
    return ""


def run_graphs(capture: Capture | None = None, where: str | None = None) -> dict[str, Any]:
    """Every case: nothing where all replays are right, else what is wrong."""
    capture = capture or (rehearsed_capture if is_rehearsed() else cuda_capture)
    found = {}
    for name, (loss_of, shape) in cases().items():
        try:
            found[name] = replays_wrong(loss_of, shape, capture, where or device.kind())
        except Exception as error:  # capture itself may fail; that is the result
            found[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    wrong = [f"{name}: {what}" for name, what in found.items() if what]
    summary = f"{len(found) - len(wrong)} of {len(found)} losses replay bit for bit"
    return {"ok": not wrong, "summary": "; ".join([summary, *wrong]), "cases": found}
