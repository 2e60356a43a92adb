"""A slice of the vocabulary, where several devices hold one row between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import row_pointer
from .device import on_device
from .row_statistics import LOG2E, RowStatistics, empty_statistics, store_statistics
from .small_rows import read_small_rows, rows_of_program
from .streamed_rows import read_row
from .weights import IGNORED, kind_and_weight, load_penalty, penalty_arguments, target_column

# What a slice tells the others of a row, (5, N) fp32; of ignored rows, anything.
TOP = tl.constexpr(0)  # largest logit of the slice
SLICE_REST = tl.constexpr(1)  # sum without the target, on the scale of the slice's own largest logit
ANSWER = tl.constexpr(2)  # 1 where the first maximum of the slice is [MASK], plus 2 where it is the target
TARGET_LOGIT = tl.constexpr(3)  # 0 outside the target's slice; the next one outside that of [MASK]
MASK_LOGIT = tl.constexpr(4)
N_MESSAGE = 5


@triton.jit
def _local_id(token, start, vocab_size):
    """The column of this slice that holds a token, -1 where another slice does."""
    return tl.where((token >= start) & (token < start + vocab_size), token - start, -1).to(tl.int32)


@triton.jit
def _store_message(
    message_ptr, row, n_rows, inside, top, rest, predicted, target, mask, target_logit, mask_logit
):  # fmt: skip
    has_target, has_mask = target >= 0, mask >= 0
    answer = tl.where(has_mask & (predicted == mask), 1.0, 0.0)
    answer += tl.where(has_target & (predicted == target), 2.0, 0.0)
    base = message_ptr + row
    tl.store(base + TOP * n_rows, top, mask=inside)
    tl.store(base + SLICE_REST * n_rows, rest, mask=inside)
    tl.store(base + ANSWER * n_rows, answer, mask=inside)
    tl.store(base + TARGET_LOGIT * n_rows, tl.where(has_target, target_logit, 0.0), mask=inside)
    tl.store(base + MASK_LOGIT * n_rows, tl.where(has_mask, mask_logit, 0.0), mask=inside)


@triton.jit(do_not_specialize=["start", "mask_id", "ignore_index", "n_rows"])
def _slice_kernel(
    logits_ptr, y_ptr, message_ptr, start, mask_id, ignore_index, n_rows, vocab_size, logits_stride,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int64)
    if y == ignore_index:
        for column in tl.static_range(5):
            tl.store(message_ptr + row + column * n_rows, 0.0)
    else:
        target, mask = _local_id(y, start, vocab_size), _local_id(mask_id, start, vocab_size)
        top, _, rest, predicted, target_logit, mask_logit = read_row(
            row_pointer(logits_ptr, row, logits_stride, ALIGNED), target, tl.maximum(mask, 0), vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip
        _store_message(
            message_ptr, row, n_rows, True, top, rest, predicted, target, mask, target_logit, mask_logit
        )


@triton.jit(do_not_specialize=["start", "mask_id", "ignore_index", "n_rows"])
def _small_slice_kernel(
    logits_ptr, y_ptr, message_ptr, start, mask_id, ignore_index, n_rows, vocab_size, logits_stride,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    target, mask = _local_id(y, start, vocab_size), _local_id(mask_id, start, vocab_size)
    # Ignored rows are not read.
    _, top, _, rest, predicted, target_logit, mask_logit = read_small_rows(
        logits_ptr, row, inside & (y != ignore_index), target, mask, vocab_size, logits_stride, BLOCK_V
    )
    _store_message(
        message_ptr, row, n_rows, inside, top, rest, predicted, target, mask, target_logit, mask_logit
    )


def launch_slice(
    logits: Tensor, y: Tensor, mask_id: int, ignore_index: int = -1, *, start: int, tile: tiles.Tile | None = None,
) -> Tensor:  # fmt: skip
    """What one slice of the vocabulary tells the others, (5, N) fp32. Reads the logits once.

    Args:
        logits: (N, V_r), columns [start, start + V_r) of the whole rows; V_r >= 1. Not modified.
        y: (N,) targets in the whole vocabulary, like ``mask_id``.
        tile: how to cut rows; by default the one for V_r.
    """
    n, vocab_size = logits.shape
    tile = tile or tiles.choose_tile(vocab_size)
    message = torch.empty(N_MESSAGE, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return message
    kernel = _small_slice_kernel if tile.rows else _slice_kernel
    with on_device(logits):
        kernel[(triton.cdiv(n, tile.rows or 1),)](
            logits_ptr=logits, y_ptr=y.contiguous(), message_ptr=message,
            start=start, mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, logits_stride=logits.stride(0), **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return message


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows", "vocab_size", "n_slices"])
def _combine_kernel(
    messages_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, n_slices, PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    message = messages_ptr + row
    top = tl.load(message + TOP * n_rows, mask=inside, other=0.0)
    answer = tl.load(message + ANSWER * n_rows, mask=inside, other=0.0)
    target_logit = tl.load(message + TARGET_LOGIT * n_rows, mask=inside, other=0.0)
    mask_logit = tl.load(message + MASK_LOGIT * n_rows, mask=inside, other=0.0)
    for _ in range(1, n_slices):
        message += 5 * n_rows
        slice_top = tl.load(message + TOP * n_rows, mask=inside, other=0.0)
        # Only a higher one: of equal maxima the first counts. The first NaN is the maximum.
        is_higher = (slice_top > top) | ((slice_top != slice_top) & (top == top))
        answer = tl.where(is_higher, tl.load(message + ANSWER * n_rows, mask=inside, other=0.0), answer)
        top = tl.where(is_higher, slice_top, top)
        target_logit += tl.load(message + TARGET_LOGIT * n_rows, mask=inside, other=0.0)
        mask_logit += tl.load(message + MASK_LOGIT * n_rows, mask=inside, other=0.0)

    shift = top * LOG2E  # where it is not finite, the row is NaN
    rest = tl.zeros([ROWS], tl.float32)
    message = messages_ptr + row
    for _ in range(0, n_slices):
        slice_top = tl.load(message + TOP * n_rows, mask=inside, other=0.0)
        scale = tl.exp2(slice_top * LOG2E - shift)
        rest += tl.load(message + SLICE_REST * n_rows, mask=inside, other=0.0) * scale
        message += 5 * n_rows

    _, is_label = target_column(y, vocab_size)
    says_mask = (answer == 1.0) | (answer == 3.0)
    pk, pm = load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE)
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    case = kind * 3 + tl.where(says_mask, 0, tl.where(answer == 2.0, 1, 2))
    case = tl.where(y == ignore_index, IGNORED, case)
    store_statistics(
        case_ptr, statistics_ptr, row, n_rows, inside, case, weight, target_logit, mask_logit, top, shift, rest, is_label
    )  # fmt: skip


def launch_combine(
    messages: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor, pm: float | Tensor,
    ignore_index: int = -1, *, vocab_size: int,
) -> RowStatistics:  # fmt: skip
    """Statistics of the whole rows, from what all slices of the vocabulary told.

    With them, and ``y`` less the slice's start, :func:`launch_gradient` makes the gradient of a slice.

    Args:
        messages: (slices, 5, N) fp32 contiguous, in the order of the vocabulary; see :func:`launch_slice`.
        vocab_size: of all slices together.
    """
    n_slices, _, n = messages.shape
    statistics = empty_statistics(y)
    if n == 0:
        return statistics
    rows = 128
    with on_device(messages):
        _combine_kernel[(triton.cdiv(n, rows),)](
            messages_ptr=messages, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n, vocab_size=vocab_size, n_slices=n_slices,
            ROWS=rows, num_warps=4, enable_fp_fusion=False, **penalty_arguments(pk, pm, messages.device),
        )  # fmt: skip
    return statistics
