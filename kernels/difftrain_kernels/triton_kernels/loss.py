"""The losses of all rows, and with them their gradient in the same pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import row_pointer
from .device import on_device
from .gradient import gradient_buffer
from .row_statistics import RowStatistics, empty_statistics, store_ignored
from .small_rows import rows_of_program, score_small_rows, write_small_gradient
from .streamed_rows import score_row, write_gradient_row, zero_row
from .weights import load_penalty, penalty_arguments


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _loss_kernel(
    logits_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, logits_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int64)
    if y == ignore_index:
        store_ignored(case_ptr, statistics_ptr, row, n_rows)
    else:
        score_row(
            row_pointer(logits_ptr, row, logits_stride, ALIGNED), case_ptr, statistics_ptr, row, n_rows,
            y, tl.load(x_ptr + row), mask_id,
            load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE), vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _small_loss_kernel(
    logits_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, logits_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    score_small_rows(
        logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, y != ignore_index, mask_id,
        load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE),
        vocab_size, logits_stride, BLOCK_V,
    )  # fmt: skip


def launch_loss(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor, pm: float | Tensor,
    ignore_index: int = -1, *, tile: tiles.Tile | None = None,
) -> RowStatistics:  # fmt: skip
    """Losses of all rows. Reads the logits once.

    Args:
        logits: (N, V) fp32, bf16 or fp16, last stride 1; not modified. ``y``, ``x``: (N,) integers.
        pk, pm: numbers, or 0-d float tensors on the device.
        tile: how to cut rows; by default the one for V.
    """
    n, vocab_size = logits.shape
    tile = tile or tiles.choose_tile(vocab_size)
    statistics = empty_statistics(logits)
    if n == 0:
        return statistics
    kernel = _small_loss_kernel if tile.rows else _loss_kernel
    with on_device(logits):
        kernel[(triton.cdiv(n, tile.rows or 1),)](
            logits_ptr=logits, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, logits_stride=logits.stride(0),
            **penalty_arguments(pk, pm, logits.device), **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return statistics


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, upstream, divisor,
    mask_id, ignore_index, n_rows, vocab_size, logits_stride, gradient_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = row_pointer(logits_ptr, row, logits_stride, ALIGNED)
    gradient_row_ptr = row_pointer(gradient_ptr, row, gradient_stride, ALIGNED)
    y = tl.load(y_ptr + row).to(tl.int64)
    if y == ignore_index:
        store_ignored(case_ptr, statistics_ptr, row, n_rows)
        zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
    else:
        target, shift, rest, per_total = score_row(
            row_ptr, case_ptr, statistics_ptr, row, n_rows, y, tl.load(x_ptr + row), mask_id,
            load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE), vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip
        write_gradient_row(
            row_ptr, gradient_row_ptr, target, shift, rest, per_total * upstream / divisor, vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _small_loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, upstream, divisor,
    mask_id, ignore_index, n_rows, vocab_size, logits_stride, gradient_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    is_counted = y != ignore_index
    values, target, shift, rest, per_total = score_small_rows(
        logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, is_counted, mask_id,
        load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE),
        vocab_size, logits_stride, BLOCK_V,
    )  # fmt: skip
    # In place, every thread must have read the target's and [MASK]'s logits first.
    tl.debug_barrier()
    write_small_gradient(
        gradient_ptr, row, inside, values, target, shift, rest, per_total * upstream / divisor,
        is_counted, vocab_size, gradient_stride, BLOCK_V,
    )  # fmt: skip


def launch_loss_and_gradient(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor, pm: float | Tensor,
    ignore_index: int = -1, *, upstream: float, divisor: float, gradient_out: Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[RowStatistics, Tensor]:  # fmt: skip
    """Losses of all rows and the gradient of sum(row losses) * upstream / divisor.

    Args:
        gradient_out: where the gradient goes, (N, V) in the logits' dtype and phase (see
            :func:`empty_gradient_like`); the logits themselves to overwrite them. New by default.

    The other arguments are those of :func:`launch_loss`. Reads the logits once from memory and
    writes the gradient once.
    """
    n, vocab_size = logits.shape
    tile = tile or tiles.choose_tile(vocab_size)
    statistics = empty_statistics(logits)
    gradient = gradient_buffer(logits, gradient_out)
    if n == 0:
        return statistics, gradient
    kernel = _small_loss_and_gradient_kernel if tile.rows else _loss_and_gradient_kernel
    with on_device(logits):
        kernel[(triton.cdiv(n, tile.rows or 1),)](
            logits_ptr=logits, gradient_ptr=gradient, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            upstream=float(upstream), divisor=float(divisor),
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, logits_stride=logits.stride(0), gradient_stride=gradient.stride(0),
            **penalty_arguments(pk, pm, logits.device), **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return statistics, gradient
