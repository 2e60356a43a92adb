"""The plain loss of a linear head of few words on a CPU, and its gradients with it.

The chunks of ``chunks.py`` in as few steps as they take, with the loss of ``small_vocabulary.py``: products so small
cost less than what stands around them there. Rows that do not count are not multiplied, nor backward those whose
answer gave them weight 0. The products are those of ``chunks.py``, and so are the bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import small_vocabulary
from .calls import LossCall, Result
from .chunks import ChunkedLoss, product, slices_of, sum_dtype
from .implementation import forbid_second_derivative, make_table
from .positions import check_enough
from .small_vocabulary import Scored, np
from .validation import check_upstream
from .weight_sums import add_product

Array = Any


def takes(hidden: Tensor, weight: Tensor, chunked: ChunkedLoss) -> bool:
    """Whether the loss of these hidden states and this head (V, D) is made here."""
    is_plain = hidden.dim() == 2 and chunked.reduction != "none" and not chunked.uses_triton
    is_cast = not hidden.dtype == weight.dtype == chunked.dtype == sum_dtype(chunked.dtype)
    return is_plain and not is_cast and small_vocabulary.takes(len(weight), hidden.device, chunked.terms)


def small_linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall, chunked: ChunkedLoss
) -> Result:
    """``fused_linear_diffusion_loss`` of checked arguments, hidden (N, D), that :func:`takes` takes."""
    head = hidden, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head):
        found: list = []
        loss = _SmallLinearLoss.apply(*head, chunked, call, found)
    else:
        with torch.no_grad():
            loss, found, _ = _run(*head, chunked, call.labels[1:], (False,) * 3, call.return_cases)

    def tabulate():
        case, nll, gap = map(np.concatenate, zip(*found, strict=True))
        return make_table(small_vocabulary.sum_cases(case, nll, gap), call.y.numel())

    return call.result(loss, tabulate, None)


class _SmallLinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, ...) -> loss; puts what the table is made of into the list it is given."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, chunked, call, found):
        ctx.chunked = chunked
        ctx.weighting = call.mask_id, float(call.pk), float(call.pm), call.ignore_index
        ctx.needs = ctx.needs_input_grad[:3]
        labels = call.x, *ctx.weighting
        loss, parts, ctx.made = _run(hidden, weight, bias, chunked, labels, ctx.needs, call.return_cases)
        found += parts
        ctx.save_for_backward(hidden, weight, bias, call.y, call.x)
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
            *head, _, x = ctx.saved_tensors
            _, _, made = _run(*head, ctx.chunked, (x, *ctx.weighting), ctx.needs, False)
        if upstream.item() != ctx.chunked.made_for:
            for gradient in made:
                if gradient is not None:
                    gradient.mul_(upstream / ctx.chunked.made_for)
        return made


def _run(hidden, weight, bias, chunked, weighting, needs, wants_cases) -> tuple[Tensor, list, list]:
    """One pass over the chunks: (loss; case, nll and gap of each chunk's rows; gradients of the first three).

    Args:
        weighting: x (N,), mask_id, pk, pm, ignore_index.
    """
    x, *rest = weighting
    label, seen, hidden = chunked.y.numpy(), x.numpy(), hidden.detach()
    is_counted = label != rest[-1]
    n = int(np.count_nonzero(is_counted))
    check_enough(chunked.counted, n)
    index = None if n == len(label) else np.flatnonzero(is_counted)
    losses, cases, made = hidden.new_zeros(len(label)), [], []
    for tensor, is_needed in zip((hidden, weight, bias), needs, strict=True):
        made.append(tensor.new_empty(tensor.shape) if is_needed else None)
    if needs[0] and index is not None:
        made[0].numpy()[~is_counted] = 0.0
    size = chunked.chunk_tokens or chunked.chunk_size(n, len(weight))
    buffer = hidden.new_empty(min(n, size), len(weight))
    for chunk in slices_of(n, size):
        rows = chunk if index is None else index[chunk]
        states = _taken(hidden, rows)
        y, logits = torch.from_numpy(label[rows]), product(states, weight, bias, buffer)
        scored = small_vocabulary.score(logits, y, torch.from_numpy(seen[rows]), *rest)
        losses.numpy()[rows] = scored.row_loss.numpy()
        if wants_cases:
            case, gap = small_vocabulary.find_cases(scored, y)
            cases.append((case, scored.nll, gap))
        if any(needs):
            _add(made, scored, states, weight, rows, chunked.scale, is_first=chunk.start == 0)
    return small_vocabulary.reduced(losses, chunked.reduction), cases, made


def _add(made: list, scored: Scored, states, weight, rows, scale: float, *, is_first: bool) -> None:
    """The share of a chunk's rows in the gradients of hidden, weight and bias."""
    of_hidden, of_weight, of_bias = made
    gradient = small_vocabulary.gradient(scored.exps, scored.total, scored.place, scored.factor, 1.0)
    if not scored.factor.all():  # rows of weight 0 have none
        if of_hidden is not None:
            of_hidden.numpy()[rows] = 0.0
        live = np.flatnonzero(scored.factor)
        gradient, states = _taken(gradient, live), _taken(states, live)
        rows = live + rows.start if isinstance(rows, slice) else rows[live]
    if of_hidden is not None and isinstance(rows, slice):
        add_product(of_hidden[rows], gradient, weight, scale, 0)
    elif of_hidden is not None:
        of_rows = gradient.new_empty(len(gradient), weight.shape[1])
        add_product(of_rows, gradient, weight, scale, 0)
        of_hidden.numpy()[rows] = of_rows.numpy()
    if of_weight is not None:
        add_product(of_weight, gradient.t(), states, scale, 0 if is_first else 1)
    if of_bias is not None:
        of_bias = of_bias.zero_() if is_first else of_bias
        of_bias.add_(gradient.sum(0), alpha=scale)


def _taken(values: Tensor, rows: slice | Array) -> Tensor:
    return values[rows] if isinstance(rows, slice) else torch.from_numpy(values.numpy().take(rows, 0))
