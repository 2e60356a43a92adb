"""The losses that bench_loss.py compares: ours in each mode, eager, compiled, and other libraries'.

A contender either gives the whole loss, or says what it lacks. Libraries that compute a plain
cross-entropy of logits are composed with the weights the way a user would: argmax of the logits,
then the weighted mean of their row losses. Without the logits there is no argmax, so the peers of
the linear loss are held against a plain cross-entropy (all weights 1), which is what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain_kernels import diffusion_loss_reference, fused_diffusion_loss, fused_linear_diffusion_loss

IGNORE_INDEX = -1
# What a contender may lack.
NO_WEIGHTS = "no weights"  # it is a plain cross-entropy
NARROW_LOSS = "loss in the input's dtype"


@dataclass(frozen=True)
class Problem:
    """One batch. ``inputs`` want gradients: (logits (N, V),) or (hidden (N, D), weight (V, D))."""

    inputs: tuple[Tensor, ...]
    y: Tensor
    x: Tensor
    mask_id: int
    pk: float | Tensor = 0.25
    pm: float | Tensor = 0.5

    @property
    def kind(self) -> str:
        return "logits" if len(self.inputs) == 1 else "linear"

    @property
    def labels(self) -> tuple:
        return self.y, self.x, self.mask_id, self.pk, self.pm

    def copy(self) -> Problem:
        return replace(self, inputs=tuple(t.detach().clone().requires_grad_() for t in self.inputs))


# (problem, upstream gradient that will come) -> mean loss, 0-d
Loss = Callable[[Problem, float], Tensor]


@dataclass(frozen=True)
class Contender:
    """``make`` imports what it needs (ImportError: not installed) and returns the loss."""

    name: str
    kind: str
    make: Callable[[], Loss]
    lacks: str = ""


def make_problem(
    n: int, vocab_size: int, dtype: torch.dtype, device, width: int = 0, seed: int = 0
) -> Problem:
    """Random logits, or with ``width`` hidden states and weight; half the rows answer [MASK].

    4 to 8 % of bf16 rows with V >= 50k have a tied maximum, which the tie rule decides. With hidden
    states, where the order of summation would decide, [MASK] is far above or below the rest.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    mask_id = vocab_size - 1
    says_mask = torch.rand(n, generator=generator, device=device) < 0.5
    if width:
        hidden, weight = normal(n, width), normal(vocab_size, width) / math.sqrt(width)
        hidden[:, 0] = torch.where(says_mask, 8.0, -8.0)
        weight[:, 0], weight[mask_id] = 0.0, 0.0
        weight[mask_id, 0] = 2.0
        inputs = (hidden, weight)
    else:
        logits = normal(n, vocab_size)
        logits[says_mask, mask_id] = logits[says_mask].amax(1)  # tied, and the first wins
        logits[says_mask.logical_and(torch.arange(n, device=device) % 2 == 0), mask_id] += 1.0
        inputs = (logits,)
    y = torch.randint(0, vocab_size, (n,), generator=generator, device=device)
    draw = torch.rand(n, generator=generator, device=device)
    x = torch.where(draw < 0.4, mask_id, y)
    y = torch.where(draw > 0.8, mask_id, y)
    y = torch.where(draw > 0.95, IGNORE_INDEX, y)
    return Problem(tuple(t.to(dtype).requires_grad_() for t in inputs), y, x, mask_id)


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


def _compiled(*, tensors: bool) -> Callable[[], Loss]:
    def make() -> Loss:
        torch._dynamo.reset()

        def step(inputs, y, x, mask_id, pk, pm):
            logits = inputs[0] if len(inputs) == 1 else F.linear(*inputs)
            return diffusion_loss_reference(logits, y, x, mask_id, pk, pm)

        compiled = torch.compile(step, dynamic=False)

        def loss(problem: Problem, _: float) -> Tensor:
            pk, pm = problem.pk, problem.pm
            if tensors:
                pk, pm = (torch.full((), p, device=problem.y.device) for p in (pk, pm))
            return compiled(problem.inputs, problem.y, problem.x, problem.mask_id, pk, pm)

        return loss

    return make


def _ours(*, stated: bool = False, overwrite: bool = False) -> Callable[[], Loss]:
    def loss(problem: Problem, scale: float) -> Tensor:
        return fused_diffusion_loss(
            *_logits(problem), *problem.labels,
            upstream_scale=scale if stated else None, overwrite_logits=overwrite,
        )  # fmt: skip

    return lambda: loss


def _ours_unweighted() -> Loss:
    return lambda p, _: fused_diffusion_loss(*p.inputs, p.y, p.x, p.mask_id, 1.0, 1.0)


def _ours_linear(**options) -> Callable[[], Loss]:
    return lambda: lambda p, _: fused_linear_diffusion_loss(*p.inputs, *p.labels, **options)


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return weighted(
        lambda logits, y: liger_cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none")
    )


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return weighted(lambda logits, y: cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none"))


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


def _cut_cross_entropy(impl: str) -> Callable[[], Loss]:
    def make() -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        def loss(problem: Problem, _: float) -> Tensor:
            hidden, weight = problem.inputs
            total = linear_cross_entropy(
                hidden, weight, problem.y, ignore_index=IGNORE_INDEX, reduction="sum", impl=impl
            )
            return total / len(hidden)

        return loss

    return make


CONTENDERS = (
    Contender("eager reference", "logits", _eager),
    Contender("torch.compile, float penalties", "logits", _compiled(tensors=False)),
    Contender("torch.compile, tensor penalties", "logits", _compiled(tensors=True)),
    Contender("ours", "logits", _ours()),
    Contender("ours, upstream stated", "logits", _ours(stated=True)),
    Contender("ours, over the logits", "logits", _ours(overwrite=True)),
    Contender("ours, stated, over the logits", "logits", _ours(stated=True, overwrite=True)),
    Contender("ours with penalties 1", "logits", _ours_unweighted, NO_WEIGHTS),
    Contender("Liger cross-entropy", "logits", _liger),
    Contender("QuACK cross-entropy", "logits", _quack),
    Contender("eager reference", "linear", _eager),
    Contender("torch.compile, tensor penalties", "linear", _compiled(tensors=True)),
    Contender("ours from logits", "linear", _ours(stated=True, overwrite=True)),
    Contender("ours linear", "linear", _ours_linear()),
    Contender("ours linear, 1024 tokens", "linear", _ours_linear(chunk_tokens=1024)),
    Contender("ours linear, 4096 tokens", "linear", _ours_linear(chunk_tokens=4096)),
    Contender("torch linear_cross_entropy", "linear", _torch_linear, f"{NO_WEIGHTS}, {NARROW_LOSS}"),
    Contender("Liger fused linear", "linear", _liger_linear, NO_WEIGHTS),
    Contender("cut-cross-entropy, filtered", "linear", _cut_cross_entropy("cce"), NO_WEIGHTS),
    Contender("cut-cross-entropy, exact", "linear", _cut_cross_entropy("cce_exact"), NO_WEIGHTS),
)
