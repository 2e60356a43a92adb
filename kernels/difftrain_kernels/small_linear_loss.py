"""The plain loss of a linear head of few words on a CPU, and its gradients with it.

The chunks of ``chunks.py`` in as few steps as they take, with the loss of ``small_vocabulary.py``: products so small
cost less than what stands around them there. Rows that do not count, and backward those of weight 0, are left out of
the products where they are many: to take a few out of a chunk costs more than to multiply them. Their gradient is 0, and
where one of them is not finite they are left out too. Under ``torch.compile`` the operator takes this way, so the bits are
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from . import small_vocabulary
from .calls import LossCall, Result
from .cases import IGNORED
from .chunks import ChunkedLoss, sum_dtype
from .implementation import forbid_second_derivative, make_table
from .positions import check_enough, slices_of
from .small_vocabulary import Scored, np
from .stepwise_reference import N_STATISTICS
from .validation import check_upstream

# Share of a chunk's rows from which it pays to take them out: measured 0.45 at V = 24, 0.3 at 66, and 0.1 to 0.2 at 250.
MANY = 0.25
Array = Any
Rows = slice | Array  # of all: a slice, or their numbers


def takes(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss) -> bool:
    """Whether the loss of these hidden states and this head (V, D) is made here."""
    dtype = chunked.dtype
    return (
        not chunked.uses_triton
        and small_vocabulary.takes(weight.shape[0], hidden.device, chunked.terms)
        and dtype is sum_dtype(dtype)
        and hidden.dtype is dtype
        and weight.dtype is dtype
        and (bias is None or bias.dtype is dtype)
        and chunked.reduction != "none"
    )


def small_linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall, chunked: ChunkedLoss
) -> Result:
    """``fused_linear_diffusion_loss`` of checked arguments, hidden (..., D), that :func:`takes` takes."""
    states = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    head, weighting = (states, weight, bias), (call.x, call.pk, call.pm)
    kept: list[tuple[Array, ...]] = []

    def keep(rows, scored):
        if call.return_cases:
            kept.append((scored.marks, scored.nll, scored.gap))

    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head):
        loss = _SmallLinearLoss.apply(*head, chunked, weighting, keep)
    else:
        with torch.no_grad():
            loss, *_ = _run(*head, chunked, weighting, (False,) * 3, keep)

    def tabulate():
        columns = kept[0] if len(kept) == 1 else map(np.concatenate, zip(*kept, strict=True))
        return make_table(small_vocabulary.sum_cases(*columns), call.y.shape[0])

    return call.result(loss, tabulate, None)


# For operators, as ChunkedLoss.run gives them.


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss, weighting: tuple, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor | None]]:  # fmt: skip
    """The loss, the statistics of all rows and the gradients; ``weighting`` is x (N,), pk and pm."""
    n = chunked.y.shape[0]
    case = torch.full((n,), IGNORED, dtype=torch.int32, device="cpu")
    columns = torch.zeros(N_STATISTICS, n, dtype=hidden.dtype, device="cpu")

    def keep(rows, scored):
        of_case, of_columns = small_vocabulary.statistics(scored)
        case.numpy()[rows], columns.numpy()[:, rows] = of_case.numpy(), of_columns.numpy()

    with torch.no_grad():
        loss, _, made = _run(hidden, weight, bias, chunked, weighting, needs, keep)
    return loss, (case, columns), made


def run_again(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss, columns: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:  # fmt: skip
    """The gradients, from the statistics."""
    with torch.no_grad():
        return _run_again(hidden, weight, bias, chunked, columns.numpy()[[0, 3, 5]], needs)


class _SmallLinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, ...) -> loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, chunked, weighting, keep):
        ctx.chunked, ctx.needs = chunked, ctx.needs_input_grad[:3]
        loss, ctx.columns, ctx.made = _run(hidden, weight, bias, chunked, weighting, ctx.needs, keep)
        ctx.save_for_backward(hidden, weight, bias, chunked.y)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if not torch.is_grad_enabled():
            return *_SmallLinearLoss._gradients(ctx, check_upstream(upstream)), None, None, None
        with torch.no_grad():
            gradients = _SmallLinearLoss._gradients(ctx, check_upstream(upstream))
        gradients = forbid_second_derivative(gradients, upstream, *ctx.saved_tensors[:3])
        return *gradients, None, None, None

    @staticmethod
    def _gradients(ctx, upstream):
        # What forward made is given away once. A second backward makes it again.
        made, ctx.made = ctx.made, None
        if made is None:
            *head, _ = ctx.saved_tensors
            made = _run_again(*head, ctx.chunked, ctx.columns, ctx.needs)
        if upstream.detach().numpy() != ctx.chunked.made_for:
            factor = upstream / ctx.chunked.made_for
            for gradient in made:
                if gradient is not None:
                    gradient.mul_(factor)
        return made


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose products autocast would narrow: a backward may run where the forward did not."""

    @wraps(function)
    def run(*arguments):
        if not torch.is_autocast_enabled("cpu"):
            return function(*arguments)
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return run


@_outside_autocast
def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss, weighting: tuple, needs: Sequence[bool],
    keep: Callable[[Rows, Scored], None],
) -> tuple[Tensor, Array, list[Tensor | None]]:  # fmt: skip
    """The loss; of all rows loss, factor and total, (3, N); and those gradients of the first three that are wanted.

    Args:
        keep: is shown the rows of each chunk that are scored, and their scores.
    """
    x, pk, pm = weighting
    seen, made = x.numpy(), _Pass(hidden, weight, bias, chunked, needs)
    if chunked.counted is not None:
        check_enough(chunked.counted, int(np.count_nonzero(made.label != chunked.ignore_index)))
    columns = np.zeros((3, len(seen)), np.float64 if hidden.dtype is torch.float64 else np.float32)
    for rows, is_left_out, states, logits in made.chunks():
        scored = small_vocabulary.score(
            logits, made.label[rows], seen[rows], chunked.mask_id, pk, pm, is_left_out, shares=True
        )
        del logits  # before the gradients are made, which take as much
        columns[:, rows] = scored.loss, scored.factor, scored.total
        keep(rows, scored)
        if any(needs):
            gradient = small_vocabulary.gradient(scored.exps, None, scored.place, scored.factor)
            made.add(rows, gradient, states, scored.factor, scored.total)
            del gradient
        del scored  # before the next chunk's are made
    return small_vocabulary.reduced(columns[0], chunked.reduction), columns, made.gradients


@_outside_autocast
def _run_again(hidden, weight, bias, chunked, columns: Array, needs) -> list[Tensor | None]:
    """The gradients alone, from the columns of rows that were scored."""
    made = _Pass(hidden, weight, bias, chunked, needs)
    for rows, _, states, logits in made.chunks():
        _, factor, total = columns[:, rows]
        gradient = small_vocabulary.gradient_again(logits, made.label[rows], factor, shares=True)
        del logits
        made.add(rows, gradient, states, factor, total)
        del gradient
    return made.gradients


class _Pass:
    """One pass over the chunks, in which the gradients of hidden, weight and bias, where they are wanted, fill."""

    def __init__(self, hidden, weight, bias, chunked: ChunkedLoss, needs):
        # Plain ones: what is made of a subclass is of it.
        self.head = [None if t is None else t.detach().as_subclass(Tensor) for t in (hidden, weight, bias)]
        self.chunked, self.needs = chunked, needs
        self.label = chunked.y.numpy()
        self.gradients: list[Tensor | None] = [None] * 3

    def chunks(self) -> Iterator[tuple[Rows, Array | None, Tensor, Tensor]]:
        """The rows of each chunk that are taken; which of these do not count; their states and logits."""
        hidden, weight, bias = self.head
        n = len(self.label)
        size = self.chunked.chunk_tokens or self.chunked.chunk_size(n, weight.shape[0])
        for chunk in slices_of(n, size):
            rows: Rows = chunk
            is_left_out = small_vocabulary.left_out(self.label[chunk], self.chunked.ignore_index)
            if is_left_out is not None and np.count_nonzero(is_left_out) >= MANY * len(is_left_out):
                rows, is_left_out = chunk.start + np.flatnonzero(~is_left_out), None
            states = hidden if size >= n and rows is chunk else _taken(hidden, rows)
            yield rows, is_left_out, states, torch.nn.functional.linear(states, weight, bias)

    def add(self, rows: Rows, gradient: Tensor, states: Tensor, factor: Array, total: Array) -> None:
        """The share of a chunk, from the gradient of the logits of its rows that were taken, and their states."""
        weight = self.head[1]
        n_dead = len(factor) - np.count_nonzero(factor)
        # What is not finite would pass through 0 * NaN into the gradient of the weight.
        if n_dead and (n_dead >= MANY * len(factor) or not isfinite(np.add.reduce(total))):
            live = np.flatnonzero(factor)
            gradient, states = _taken(gradient, live), _taken(states, live)
            rows = rows.start + live if isinstance(rows, slice) else rows[live]
        needs_hidden, needs_weight, needs_bias = self.needs
        # Scaled by the products: gradients over N would lie below the normal numbers sooner, which take far longer.
        scale = self.chunked.scale
        if needs_hidden:
            self._put(rows, lambda **out: torch.addmm(states, gradient, weight, beta=0, alpha=scale, **out))
        if needs_weight and self.gradients[1] is None:
            self.gradients[1] = torch.addmm(weight, gradient.t(), states, beta=0, alpha=scale)
        elif needs_weight:
            self.gradients[1].addmm_(gradient.t(), states, alpha=scale)
        if needs_bias:
            of_bias = gradient.sum(0).mul_(scale)
            self.gradients[2] = of_bias if self.gradients[2] is None else self.gradients[2].add_(of_bias)

    def _put(self, rows: Rows, multiply: Callable[..., Tensor]) -> None:
        """The rows of the gradient of hidden that a product gives."""
        n = len(self.label)
        if isinstance(rows, slice) and rows.stop - rows.start >= n:
            self.gradients[0] = multiply()
            return
        if self.gradients[0] is None:
            self.gradients[0] = self.head[0].new_zeros(n, self.head[0].shape[1])
        if isinstance(rows, slice):
            multiply(out=self.gradients[0][rows])
        else:
            self.gradients[0].numpy()[rows] = multiply().numpy()


def _taken(values: Tensor, rows: Rows) -> Tensor:
    return values[rows] if isinstance(rows, slice) else torch.from_numpy(values.numpy().take(rows, 0))
