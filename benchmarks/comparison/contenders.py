"""The losses that bench_loss.py compares: ours in each mode, eager, compiled, and other libraries'.

A contender either gives the whole loss, or says what it lacks. Libraries that compute a plain
cross-entropy of logits are composed with the weights the way a user would: the predicted tokens
(argmax, where the library does not return them), then the weighted mean of the row losses. Without
the logits there is no argmax, so the peers of the linear loss are held against a plain
cross-entropy (all weights 1), which is what they compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from comparison.entries import LIBRARY, NARROW_LOSS, NO_WEIGHTS, OURS, TORCH
from comparison.plain_kernel import plain_cross_entropy
from comparison.problems import IGNORE_INDEX, Problem
from difftrain_kernels import diffusion_loss_reference, fused_diffusion_loss, fused_linear_diffusion_loss

# (problem, upstream gradient that will come) -> mean loss, 0-d
Loss = Callable[[Problem, float], Tensor]


@dataclass(frozen=True)
class Contender:
    """``make`` imports what it needs (ImportError: not installed) and returns the loss."""

    name: str
    kind: str
    family: str
    make: Callable[[], Loss]
    lacks: str = ""
    is_compiled: bool = False  # by torch.compile, which takes seconds each time


def weights_of(problem: Problem, predicted: Tensor) -> Tensor:
    """The weight of each position, (N,) fp32, from the argmax of its logits."""
    y, x, mask_id, pk, pm = problem.labels
    says_mask = predicted == mask_id
    weight = torch.where(says_mask & (x == mask_id) & (y != mask_id), pk, 1.0)
    return torch.where(says_mask & (x == y) & (x != mask_id), pm, weight)


def weighted(row_losses: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A cross-entropy with row losses, composed into the whole loss."""

    def loss(problem: Problem, _: float) -> Tensor:
        (logits,) = problem.inputs
        weight = weights_of(problem, logits.detach().argmax(1))  # first: some overwrite the logits
        return (weight * row_losses(logits, problem.y)).mean()

    return loss


def _eager() -> Loss:
    return lambda p, _: diffusion_loss_reference(*_logits(p), *p.labels)


def _logits(problem: Problem) -> tuple[Tensor]:
    return problem.inputs if problem.kind == "logits" else (F.linear(*problem.inputs),)


@lru_cache
def _on_device(penalty: float, device: torch.device) -> Tensor:
    """Made once, as a training step with tensor penalties keeps them."""
    return torch.full((), penalty, device=device)


def _compiled(
    function: Callable[..., Tensor] = diffusion_loss_reference, *, tensors: bool
) -> Callable[[], Loss]:
    def make() -> Loss:
        torch._dynamo.reset()

        def step(inputs, y, x, mask_id, pk, pm):
            logits = inputs[0] if len(inputs) == 1 else F.linear(*inputs)
            return function(logits, y, x, mask_id, pk, pm)

        compiled = torch.compile(step, dynamic=False)

        def loss(problem: Problem, _: float) -> Tensor:
            pk, pm = problem.pk, problem.pm
            if tensors:
                pk, pm = (_on_device(p, problem.y.device) for p in (pk, pm))
            return compiled(problem.inputs, problem.y, problem.x, problem.mask_id, pk, pm)

        return loss

    return make


def _ours(
    *, stated: bool = False, overwrite: bool = False, tensors: bool = False, predicts: bool = True
) -> Callable[[], Loss]:
    def loss(problem: Problem, scale: float) -> Tensor:
        if tensors:
            pk, pm = (_on_device(p, problem.y.device) for p in (problem.pk, problem.pm))
            problem = replace(problem, pk=pk, pm=pm)
        return fused_diffusion_loss(
            *_logits(problem), *problem.labels,
            upstream_scale=scale if stated else None, overwrite_logits=overwrite, upstream_prediction=predicts,
        )  # fmt: skip

    return lambda: loss


def _ours_plain() -> Loss:
    return lambda p, scale: plain_cross_entropy(*p.inputs, p.y, IGNORE_INDEX, upstream_scale=scale)


def _ours_linear(**options) -> Callable[[], Loss]:
    return lambda: lambda p, _: fused_linear_diffusion_loss(*p.inputs, *p.labels, **options)


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    if "return_predicted_tokens" not in inspect.signature(liger_cross_entropy).parameters:
        return weighted(
            lambda logits, y: liger_cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none")
        )

    def loss(problem: Problem, _: float) -> Tensor:
        result = liger_cross_entropy(
            *problem.inputs, problem.y,
            ignore_index=IGNORE_INDEX, reduction="none", return_predicted_tokens=True,
        )  # fmt: skip
        return (weights_of(problem, result.predicted_tokens) * result.loss).mean()

    return loss


def _quack(**options) -> Callable[[], Loss]:
    def make() -> Loss:
        from quack.cross_entropy import cross_entropy

        return weighted(
            lambda logits, y: cross_entropy(
                logits, y, ignore_index=IGNORE_INDEX, reduction="none", **options
            )
        )

    return make


def _torch_linear() -> Loss:
    try:
        options = torch.nn.LinearCrossEntropyOptions()
    except AttributeError:
        raise ImportError("torch has linear_cross_entropy from 2.13") from None

    def loss(problem: Problem, _: float) -> Tensor:
        hidden, weight = problem.inputs
        total = F.linear_cross_entropy(
            hidden, weight, problem.y, ignore_index=IGNORE_INDEX, reduction="sum", options=options
        )
        return total / len(hidden)

    return loss


def _liger_linear() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(problem: Problem, _: float) -> Tensor:
        hidden, weight = problem.inputs
        total = liger_fused_linear_cross_entropy(
            hidden, weight, problem.y, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return total / len(hidden)

    return loss


def _cut_cross_entropy(**options) -> Callable[[], Loss]:
    def make() -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        def loss(problem: Problem, _: float) -> Tensor:
            hidden, weight = problem.inputs
            total = linear_cross_entropy(
                hidden, weight, problem.y, ignore_index=IGNORE_INDEX, reduction="sum", **options
            )
            return total / len(hidden)

        return loss

    return make


_COMPILED = partial(Contender, family=TORCH, is_compiled=True)
CONTENDERS = (
    Contender("ours", "logits", OURS, _ours()),
    Contender("ours, upstream stated", "logits", OURS, _ours(stated=True)),
    Contender("ours, not predicted", "logits", OURS, _ours(predicts=False)),
    Contender("ours, over the logits", "logits", OURS, _ours(overwrite=True)),
    Contender("ours, stated, over the logits", "logits", OURS, _ours(stated=True, overwrite=True)),
    Contender("ours, tensor penalties", "logits", OURS, _ours(tensors=True)),
    Contender(
        "ours, compiled", "logits", OURS, _compiled(fused_diffusion_loss, tensors=True), is_compiled=True
    ),
    Contender("plain cross-entropy, our kernel", "logits", OURS, _ours_plain, NO_WEIGHTS),
    Contender("eager reference", "logits", TORCH, _eager),
    Contender("Liger cross-entropy", "logits", LIBRARY, _liger, NARROW_LOSS),
    Contender("QuACK cross-entropy", "logits", LIBRARY, _quack()),
    Contender("QuACK, over the logits", "logits", LIBRARY, _quack(inplace_backward=True)),
    _COMPILED("torch.compile, float penalties", "logits", make=_compiled(tensors=False)),
    _COMPILED("torch.compile, tensor penalties", "logits", make=_compiled(tensors=True)),
    Contender("ours linear", "linear", OURS, _ours_linear()),
    Contender("ours linear, 1024 tokens", "linear", OURS, _ours_linear(chunk_tokens=1024)),
    Contender("ours linear, 4096 tokens", "linear", OURS, _ours_linear(chunk_tokens=4096)),
    Contender("ours from logits", "linear", OURS, _ours(stated=True, overwrite=True)),
    Contender("eager reference", "linear", TORCH, _eager),
    Contender("torch linear_cross_entropy", "linear", TORCH, _torch_linear, f"{NO_WEIGHTS}, {NARROW_LOSS}"),
    Contender("Liger fused linear", "linear", LIBRARY, _liger_linear, NO_WEIGHTS),
    Contender("cut-cross-entropy", "linear", LIBRARY, _cut_cross_entropy(), NO_WEIGHTS),
    Contender(
        "cut-cross-entropy, unfiltered", "linear", LIBRARY, _cut_cross_entropy(filter_eps=None), NO_WEIGHTS
    ),
    _COMPILED("torch.compile, tensor penalties", "linear", make=_compiled(tensors=True)),
)
