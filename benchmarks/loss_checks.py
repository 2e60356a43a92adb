"""Whether a contender computes the loss it claims, against the reference accumulated in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from contenders import CONTENDERS, NARROW_LOSS, NO_WEIGHTS, Contender, Problem

from difftrain_kernels import diffusion_loss_reference


@dataclass
class Results:
    """Mean loss, 0-d, and the gradient of each input."""

    loss: torch.Tensor
    gradients: list[torch.Tensor]


def exact_results(problem: Problem, rows: int = 256) -> Results:
    """In fp64 from the logits as rounded to their dtype, some rows at a time."""
    n = len(problem.y)
    y, x, mask_id, pk, pm = problem.labels
    first, *weight = (t.detach() for t in problem.inputs)
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    # Of logits, fp32 is exact enough, and half the memory.
    wide = torch.float64 if weight else torch.float32
    gradients = [torch.zeros_like(t, dtype=wide) for t in (first, *weight)]
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        logits = F.linear(first[part], *weight) if weight else first[part]
        logits = logits.double().requires_grad_()
        loss = diffusion_loss_reference(logits, y[part], x[part], mask_id, pk, pm, reduction="sum") / n
        (gradient,) = torch.autograd.grad(loss, logits)
        total += loss.detach()
        gradients[0][part] = gradient @ weight[0].double() if weight else gradient
        if weight:
            gradients[1] += gradient.t() @ first[part].double()
    return Results(total, gradients)


def results_of(loss_of, problem: Problem, upstream: float) -> Results:
    """What a contender gives, on a copy, since some write over their input."""
    problem = problem.copy()
    loss = loss_of(problem, upstream)
    gradients = torch.autograd.grad(loss, problem.inputs, torch.full_like(loss, upstream))
    return Results(loss.detach(), list(gradients))


def largest_errors(found: Results, exact: Results, upstream: float, rows: int = 256) -> list[float]:
    """max |found - exact| of the loss and of each gradient; a NaN stays NaN."""
    errors = [abs(found.loss.double() - exact.loss).item()]
    for ours, theirs in zip(found.gradients, exact.gradients, strict=True):
        pairs = zip(ours.split(rows), theirs.split(rows), strict=True)
        parts = [(a.double() - b.double() * upstream).abs().max() for a, b in pairs]
        errors.append(torch.stack(parts).max().item())
    return errors


class Judge:
    """Holds the exact results of one problem, and how far eager PyTorch is from them."""

    def __init__(self, problem: Problem, upstreams: tuple[float, ...]):
        self.problem = problem
        self.exact = exact_results(problem)
        eager = next(c for c in CONTENDERS if c.kind == problem.kind).make()
        self.eager = {u: largest_errors(results_of(eager, problem, u), self.exact, u) for u in upstreams}

    def objection(self, loss_of, is_loss_narrow: bool = False) -> str:
        """What is wrong, or nothing."""
        dtype = self.problem.inputs[0].dtype
        names = ["loss"] + [
            "gradient" if self.problem.kind == "logits" else f"{n} gradient" for n in ("hidden", "weight")
        ]
        sizes = [t.abs().max().item() for t in (self.exact.loss, *self.exact.gradients)]
        # A loss in fp32 may be summed in any order.
        rounding = torch.finfo(dtype).eps
        roundings = [rounding if is_loss_narrow else 1e-5] + [rounding] * len(self.exact.gradients)
        for upstream, eager_errors in self.eager.items():
            errors = largest_errors(results_of(loss_of, self.problem, upstream), self.exact, upstream)
            for i, error in enumerate(errors):
                size = sizes[i] * (upstream if i else 1)
                allowed = tolerance(eager_errors[i], size, roundings[i])
                if not error <= allowed:
                    return f"{names[i]} off by {error:.2g}, allowed {allowed:.2g}, upstream {upstream:g}"
        return ""


def tolerance(eager_error: float, size: float, rounding: float) -> float:
    """Twice what eager in the same dtype is off, and one rounding of the largest value."""
    return 2 * eager_error + rounding * size


def objections(problem: Problem, contenders: list[Contender], upstreams: tuple[float, ...]) -> list[str]:
    """Why each contender must not be timed, or nothing.

    One that lacks the weights is held against the loss without them: penalties of 1.
    """
    found = {}
    for is_plain in (False, True):
        group = [c for c in contenders if (NO_WEIGHTS in c.lacks) == is_plain]
        fitting = replace(problem, pk=1.0, pm=1.0) if is_plain else problem
        judge = Judge(fitting, upstreams) if group else None
        for contender in group:
            found[contender.name] = _objection(contender, judge)
    return [found[c.name] for c in contenders]


def _objection(contender: Contender, judge: Judge) -> str:
    try:
        wrong = judge.objection(contender.make(), NARROW_LOSS in contender.lacks)
    except ImportError as error:
        return f"not installed: {error}"
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # a peer's failure is a result, not the end of the run
        return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    return f"wrong: {wrong}" if wrong else ""
