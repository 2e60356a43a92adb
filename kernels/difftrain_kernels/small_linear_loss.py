"""The plain loss of a linear head of few words on a CPU, and its gradients with it.

The chunks of ``chunks.py`` in as few steps as they take, with the loss of ``small_vocabulary.py``: products so small
cost less than what stands around them there. Rows that do not count are not multiplied, nor backward those whose
answer gave them weight 0. The products are those of ``chunks.py``, and so are the bits: what is compiled goes that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import small_vocabulary
from .calls import LossCall, Result
from .chunks import ChunkedLoss, product, slices_of, sum_dtype
from .implementation import forbid_second_derivative, make_table
from .positions import check_enough
from .small_vocabulary import np
from .validation import check_upstream
from .weight_sums import add_product

Array = Any


def takes(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss) -> bool:
    """Whether the loss of these hidden states and this head (V, D) is made here."""
    is_plain = hidden.dim() == 2 and chunked.reduction != "none" and not chunked.uses_triton
    dtypes = {hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype, chunked.dtype}
    is_wide = dtypes == {sum_dtype(chunked.dtype)}
    return is_plain and is_wide and small_vocabulary.takes(len(weight), hidden.device, chunked.terms)


def small_linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall, chunked: ChunkedLoss
) -> Result:
    """``fused_linear_diffusion_loss`` of checked arguments, hidden (N, D), that :func:`takes` takes."""
    head = hidden, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head):
        scores: list[Kept] = []
        loss = _SmallLinearLoss.apply(*head, chunked, call, scores)
    else:
        with torch.no_grad():
            loss, scores, _ = _run(*head, chunked, call, (False,) * 3)

    def tabulate():
        case, nll, gap = map(np.concatenate, zip(*(part.cases for part in scores), strict=True))
        return make_table(small_vocabulary.sum_cases(case, nll, gap), call.y.numel())

    return call.result(loss, tabulate, None)


class Kept(NamedTuple):
    """What is kept of a chunk's rows, arrays (rows,).

    Attributes:
        factor: weight of the loss and of its gradient.
        cases: case, nll and gap, where a table is wanted.
    """

    factor: Array
    cases: tuple[Array, Array, Array] | None


class _SmallLinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, ...) -> loss; puts what the table is made of into the list it is given."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, chunked, call, scores):
        ctx.chunked, ctx.needs = chunked, ctx.needs_input_grad[:3]
        loss, parts, ctx.made = _run(hidden, weight, bias, chunked, call, ctx.needs)
        scores += parts
        ctx.factors = [part.factor for part in parts]
        ctx.save_for_backward(hidden, weight, bias, call.y)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        with torch.no_grad():
            gradients = _SmallLinearLoss._gradients(ctx, check_upstream(upstream))
        if torch.is_grad_enabled():
            gradients = forbid_second_derivative(gradients, upstream, *ctx.saved_tensors[:3])
        return *gradients, None, None, None

    @staticmethod
    def _gradients(ctx, upstream):
        # What forward made is given away once. A second backward makes it again.
        made, ctx.made = ctx.made, None
        if made is None:
            *head, _ = ctx.saved_tensors
            made = _run_again(*head, ctx.chunked, ctx.factors, ctx.needs)
        if upstream != ctx.chunked.made_for:
            for gradient in made:
                if gradient is not None:
                    gradient.mul_(upstream / ctx.chunked.made_for)
        return made


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedLoss, call: LossCall, needs: Sequence[bool]
) -> tuple[Tensor, list[Kept], list[Tensor | None]]:  # fmt: skip
    """The loss, what is kept of each chunk, and those gradients of the first three that are wanted."""
    label, seen = call.y.numpy(), call.x.numpy()
    losses = torch.zeros(len(label), dtype=hidden.dtype, device="cpu")
    scores, made = [], _Gradients(hidden, weight, bias, chunked, needs)
    for chunk, states, logits in made.chunks():
        y = torch.from_numpy(label[chunk])
        scored = small_vocabulary.score(
            logits, y, torch.from_numpy(seen[chunk]), call.mask_id, call.pk, call.pm, call.ignore_index
        )
        losses.numpy()[chunk] = scored.row_loss.numpy()
        cases = None
        if call.return_cases:
            case, gap = small_vocabulary.find_cases(scored, y)
            cases = case, scored.nll, gap
        scores.append(Kept(scored.factor, cases))
        if any(needs):
            # No row that does not count is among these, so nothing has to be cleared.
            gradient = small_vocabulary.gradient(
                scored.exps, scored.total, scored.place, scored.factor, 1.0
            )
            made.add(chunk, gradient, states, scored.factor)
    return small_vocabulary.reduced(losses, chunked.reduction), scores, made.parts


def _run_again(hidden, weight, bias, chunked, factors: list[Array], needs) -> list[Tensor | None]:
    """The gradients alone, of rows with these weights."""
    label, made = chunked.y.numpy(), _Gradients(hidden, weight, bias, chunked, needs)
    for (chunk, states, logits), factor in zip(made.chunks(), factors, strict=True):
        gradient = small_vocabulary.gradient_again(logits, torch.from_numpy(label[chunk]), factor, 1.0)
        made.add(chunk, gradient, states, factor)
    return made.parts


class _Gradients:
    """The gradients of hidden, weight and bias, filled chunk by chunk; None for what is not wanted.

    A chunk is a slice of all rows, or where some do not count the numbers of some that do.
    """

    def __init__(self, hidden, weight, bias, chunked: ChunkedLoss, needs):
        self.head, self.chunked = (hidden.detach(), weight, bias), chunked
        is_counted = chunked.y.numpy() != chunked.ignore_index
        self.n = int(np.count_nonzero(is_counted))
        check_enough(chunked.counted, self.n)
        self.index = None if self.n == len(is_counted) else np.flatnonzero(is_counted)
        self.parts: list[Tensor | None] = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") if is_needed else None
            for tensor, is_needed in zip((hidden, weight, bias), needs, strict=True)
        ]
        if needs[0] and self.index is not None:
            self.parts[0].numpy()[~is_counted] = 0.0
        self.is_first = True

    def chunks(self) -> Iterator[tuple[slice | Array, Tensor, Tensor]]:
        """Each chunk, its states, and its logits in a buffer that all share."""
        hidden, weight, bias = self.head
        size = self.chunked.chunk_tokens or self.chunked.chunk_size(self.n, len(weight))
        buffer = torch.empty(min(self.n, size), len(weight), dtype=hidden.dtype, device="cpu")
        for rows in slices_of(self.n, size):
            chunk = rows if self.index is None else self.index[rows]
            states = _taken(hidden, chunk)
            yield chunk, states, product(states, weight, bias, buffer)

    def add(self, chunk: slice | Array, gradient: Tensor, states: Tensor, factor: Array) -> None:
        """The share of a chunk, from the gradient of its logits; rows of weight 0 have none."""
        of_hidden, of_weight, of_bias = self.parts
        scale, weight = self.chunked.scale, self.head[1]
        if not factor.all():
            if of_hidden is not None:
                of_hidden.numpy()[chunk] = 0.0
            live = np.flatnonzero(factor)
            gradient, states = _taken(gradient, live), _taken(states, live)
            chunk = live + chunk.start if isinstance(chunk, slice) else chunk[live]
        if of_hidden is not None and isinstance(chunk, slice):
            add_product(of_hidden[chunk], gradient, weight, scale, 0)
        elif of_hidden is not None:
            of_rows = gradient.new_empty(len(gradient), weight.shape[1])
            add_product(of_rows, gradient, weight, scale, 0)
            of_hidden.numpy()[chunk] = of_rows.numpy()
        if of_weight is not None:
            add_product(of_weight, gradient.t(), states, scale, 0 if self.is_first else 1)
        if of_bias is not None:
            of_bias = of_bias.zero_() if self.is_first else of_bias
            of_bias.add_(gradient.sum(0), alpha=scale)
        self.is_first = False


def _taken(values: Tensor, rows: slice | Array) -> Tensor:
    return values[rows] if isinstance(rows, slice) else torch.from_numpy(values.numpy().take(rows, 0))
