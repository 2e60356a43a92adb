"""Whether a contender computes the loss it claims, against the reference accumulated in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from comparison.contenders import Contender, Loss
from comparison.entries import NARROW_LOSS, NO_WEIGHTS
from comparison.problems import Problem
from difftrain_kernels import diffusion_loss_reference

CHUNK = 2**26  # logits to a chunk: 512 MiB in fp64


@dataclass
class Results:
    """Mean loss, 0-d, and the gradient of each input."""

    loss: torch.Tensor
    gradients: list[torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """Why a contender must not be timed, or nothing; and whether it writes over its inputs."""

    objection: str
    overwrites: bool = False


def exact_results(problem: Problem, rows: int = 0) -> Results:
    """In fp64 from the logits as rounded to their dtype, ``rows`` at a time."""
    y, x, mask_id, pk, pm = problem.labels
    first, *weight = (t.detach() for t in problem.inputs)
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    # Of logits, fp32 is exact enough, and half the memory.
    wide = torch.float64 if weight else torch.float32
    gradients = [torch.zeros_like(t, dtype=wide) for t in (first, *weight)]
    for part in _parts(problem, rows):
        logits = F.linear(first[part], *weight) if weight else first[part]
        logits = logits.double().requires_grad_()
        loss = diffusion_loss_reference(logits, y[part], x[part], mask_id, pk, pm, reduction="sum") / len(y)
        (gradient,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        gradients[0][part] = gradient @ weight[0].double() if weight else gradient
        if weight:
            gradients[1] += gradient.t() @ first[part].double()
    return Results(total, gradients)


def eager_results(problem: Problem, upstream: float, rows: int = 0) -> Results:
    """What the reference gives in the inputs' own dtype, ``rows`` at a time: whole, it may not fit."""
    y, x, mask_id, pk, pm = problem.labels
    first, *weight = (t.detach() for t in problem.inputs)
    total = torch.zeros((), device=y.device)
    gradients = [torch.empty_like(first), *(torch.zeros_like(t, dtype=torch.float32) for t in weight)]
    for part in _parts(problem, rows):
        leaves = [t.requires_grad_() for t in (first[part].clone(), *(w.detach() for w in weight))]
        logits = F.linear(*leaves) if weight else leaves[0]
        loss = diffusion_loss_reference(logits, y[part], x[part], mask_id, pk, pm, reduction="sum") / len(y)
        found = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
        total += loss.detach()
        gradients[0][part] = found[0]
        if weight:
            gradients[1] += found[1]
    return Results(total, [g.to(first.dtype) for g in gradients])


def _parts(problem: Problem, rows: int) -> list[slice]:
    rows = rows or max(1, CHUNK // problem.inputs[-1].shape[-1 if problem.kind == "logits" else 0])
    return [slice(start, start + rows) for start in range(0, len(problem.y), rows)]


def results_of(loss_of: Loss, problem: Problem, upstream: float) -> tuple[Results, bool]:
    """What a contender gives on a copy, and whether it wrote over its input."""
    copy = problem.copy()
    loss = loss_of(copy, upstream)
    gradients = torch.autograd.grad(loss, copy.inputs, torch.full_like(loss, upstream))
    return Results(loss.detach(), list(gradients)), _differs(copy, problem)


def _differs(copy: Problem, problem: Problem) -> bool:
    pairs = zip(copy.inputs, problem.inputs, strict=True)
    return not all(torch.equal(a.detach(), b.detach()) for a, b in pairs)


def largest_errors(found: Results, exact: Results, upstream: float) -> list[float]:
    """max |found - exact| of the loss and of each gradient; a NaN stays NaN."""
    errors = [abs(found.loss.double() - exact.loss).item()]
    for ours, theirs in zip(found.gradients, exact.gradients, strict=True):
        rows = max(1, CHUNK // ours.shape[1])
        pairs = zip(ours.split(rows), theirs.split(rows), strict=True)
        parts = [(a.double() - b.double() * upstream).abs().max() for a, b in pairs]
        errors.append(torch.stack(parts).max().item())
    return errors


class Judge:
    """Holds the exact results of one problem, and how far eager PyTorch is from them."""

    def __init__(self, problem: Problem, upstreams: tuple[float, ...]):
        self.problem = problem
        self.exact = exact_results(problem)
        self.eager = {u: largest_errors(eager_results(problem, u), self.exact, u) for u in upstreams}
        of = ["gradient"] if problem.kind == "logits" else ["hidden gradient", "weight gradient"]
        self.names = ["loss", *of]

    def verdict(self, loss_of: Loss, is_loss_narrow: bool = False) -> Verdict:
        """Loss and gradients for each upstream gradient, and the loss where no gradient is wanted."""
        sizes = [t.abs().max().item() for t in (self.exact.loss, *self.exact.gradients)]
        # A loss in fp32 may be summed in any order.
        rounding = torch.finfo(self.problem.inputs[0].dtype).eps
        roundings = [rounding if is_loss_narrow else 1e-5] + [rounding] * len(self.exact.gradients)
        overwrites = False
        for upstream, eager_errors in self.eager.items():
            results, is_changed = results_of(loss_of, self.problem, upstream)
            overwrites |= is_changed
            errors = largest_errors(results, self.exact, upstream)
            for i, error in enumerate(errors):
                allowed = tolerance(eager_errors[i], sizes[i] * (upstream if i else 1), roundings[i])
                if not error <= allowed:
                    return Verdict(f"wrong: {self.names[i]} {_off(error, allowed)}, upstream {upstream:g}")
        copy = self.problem.copy().without_gradient()
        with torch.no_grad():
            error = abs(loss_of(copy, 1.0).double() - self.exact.loss).item()
        allowed = tolerance(next(iter(self.eager.values()))[0], sizes[0], roundings[0])
        if not error <= allowed:
            return Verdict(f"wrong: loss {_off(error, allowed)} without gradient")
        return Verdict("", overwrites or _differs(copy, self.problem))


def _off(error: float, allowed: float) -> str:
    return f"off by {error:.2g}, allowed {allowed:.2g}"


def tolerance(eager_error: float, size: float, rounding: float) -> float:
    """Twice what eager in the same dtype is off, and one rounding of the largest value."""
    return 2 * eager_error + rounding * size


def fitting_problem(problem: Problem, contender: Contender) -> Problem:
    """What a contender is held against: one that lacks the weights, the loss with penalties of 1."""
    return replace(problem, pk=1.0, pm=1.0) if NO_WEIGHTS in contender.lacks else problem


def verdict_on(contender: Contender, loss_of: Loss, judge: Judge) -> Verdict:
    """The judge's verdict; a failure is one too."""
    try:
        return judge.verdict(loss_of, NARROW_LOSS in contender.lacks)
    except Exception as error:  # a peer's failure is a result, not the end of the run
        return Verdict(failure(error))


def failure(error: Exception) -> str:
    """Why a contender could not run, in one line."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
