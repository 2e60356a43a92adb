"""A plain cross-entropy from the loss's own row loops: what the weights cost is the difference to it.

No x, no [MASK], no prediction, no case and no weight: a row is scanned, its nll stored, and its
gradient written by the same functions, with the same tiles, as in ``triton_kernels/``. The block
in which a maximum came first is computed there for the prediction; here nothing uses it, and the
compiler drops it. Streamed rows alone (V > 4096).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difftrain_kernels.terms import PLAIN
from difftrain_kernels.triton_kernels import SMALL_VOCAB, empty_gradient_like, launch_rescale
from difftrain_kernels.triton_kernels.blocks import head_size, row_pointer
from difftrain_kernels.triton_kernels.device import on_device
from difftrain_kernels.triton_kernels.scores import LN2, LOG2E, scaling_of
from difftrain_kernels.triton_kernels.spacing import spacing_of_rows
from difftrain_kernels.triton_kernels.streamed_rows import (
    on_one_scale,
    scan_row,
    write_gradient_row,
    zero_row,
)
from difftrain_kernels.triton_kernels.term_arguments import gradient_arguments
from difftrain_kernels.triton_kernels.tiles import choose_tile, tile_arguments


@triton.jit
def _plain_row(
    row_ptr, loss_ptr, row, y, vocab_size, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the nll of one row; what its gradient needs."""
    target = y.to(tl.int32)
    target_logit = tl.load(row_ptr + target).to(tl.float32)
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    n_vectors = (vocab_size - head) // VECTOR
    scaling = scaling_of(terms)
    sums = scan_row(
        row_ptr, head, n_vectors, n_vectors // (REPEAT * LANES), target, -1, vocab_size, scaling, terms,
        REPEAT, LANES, VECTOR,
    )  # fmt: skip
    _top, shift, moved = on_one_scale(sums, scaling, terms)
    rest = tl.sum(moved.total, axis=0)
    log2_p = tl.fma(target_logit, LOG2E, -shift)
    total = rest + tl.exp2(log2_p)
    tl.store(loss_ptr + row, (tl.log2(total) - log2_p) * LN2)
    return target, shift, rest, total


@triton.jit(do_not_specialize=["ignore_index"])
def _plain_loss_kernel(
    logits_ptr, y_ptr, loss_ptr, ignore_index, vocab_size, spacing, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int64)
    if y == ignore_index:
        tl.store(loss_ptr + row, 0.0)
    else:
        row_ptr = row_pointer(logits_ptr, row, spacing, ALIGNED)
        _plain_row(row_ptr, loss_ptr, row, y, vocab_size, terms, REPEAT, LANES, VECTOR, ALIGNED)


@triton.jit(do_not_specialize=["ignore_index"])
def _plain_loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, loss_ptr, upstream, divisor, ignore_index,
    vocab_size, spacing, gradient_spacing, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int64)
    gradient_row_ptr = row_pointer(gradient_ptr, row, gradient_spacing, ALIGNED)
    if y == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
    else:
        row_ptr = row_pointer(logits_ptr, row, spacing, ALIGNED)
        target, shift, rest, total = _plain_row(
            row_ptr, loss_ptr, row, y, vocab_size, terms, REPEAT, LANES, VECTOR, ALIGNED
        )
        write_gradient_row(
            row_ptr, gradient_row_ptr, target, -1, shift, rest, upstream / divisor / total, 0.0, 0.0, vocab_size,
            scaling_of(terms), terms, REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip


class _PlainLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, y, ignore_index, upstream_scale):
        gradient = empty_gradient_like(logits)
        loss = _launch(
            _plain_loss_and_gradient_kernel, logits, y, ignore_index, gradient_ptr=gradient,
            upstream=float(upstream_scale), divisor=float(len(y)), gradient_spacing=spacing_of_rows(gradient),
        )  # fmt: skip
        ctx.gradient, ctx.stated = gradient, upstream_scale
        return loss

    @staticmethod
    def backward(ctx, upstream):
        # The check on the device that the loss with a stated upstream gradient makes too.
        launch_rescale(ctx.gradient, upstream, stated=ctx.stated)
        return ctx.gradient, None, None, None


def plain_cross_entropy(logits: Tensor, y: Tensor, ignore_index: int, *, upstream_scale: float) -> Tensor:
    """Mean nll over all rows, 0-d fp32, its gradient made in forward for the stated upstream gradient.

    Args:
        logits: (N, V) fp32, bf16 or fp16, contiguous, V > 4096. y: (N,) int64 labels in [0, V).

    Raises:
        NotImplementedError: V is too small for the streamed kernels.
    """
    if logits.shape[1] <= SMALL_VOCAB:
        raise NotImplementedError("streamed rows alone")
    if torch.is_grad_enabled() and logits.requires_grad:
        return _PlainLoss.apply(logits, y, ignore_index, upstream_scale)
    return _launch(_plain_loss_kernel, logits.detach(), y, ignore_index)


def _launch(kernel, logits: Tensor, y: Tensor, ignore_index: int, **more) -> Tensor:
    n, vocab_size = logits.shape
    row_loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    tile = tile_arguments(logits, choose_tile(logits))
    with on_device(logits):
        kernel[(n,)](
            logits_ptr=logits, y_ptr=y, loss_ptr=row_loss, ignore_index=ignore_index,
            vocab_size=vocab_size, spacing=spacing_of_rows(logits), terms=gradient_arguments(PLAIN), **more, **tile,
        )  # fmt: skip
    return row_loss.sum() / n
