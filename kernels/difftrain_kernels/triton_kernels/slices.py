"""A slice of the vocabulary, where several devices hold one row between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, Terms
from . import tiles
from .blocks import row_pointer
from .device import on_device
from .row_statistics import RowStatistics, empty_statistics, store_statistics
from .scores import FAINT, scaling_of, shift_of, units_of
from .small_rows import read_small_rows, rows_of_program
from .spacing import spacing_of_rows
from .streamed_rows import read_row
from .term_arguments import scoring_arguments, slice_arguments
from .weights import (
    IGNORED,
    is_left_out,
    kind_and_weight,
    load_penalty,
    load_token_weight,
    penalty_arguments,
    target_column,
)

# What a slice tells the others of a row, (5, N) fp32, more where terms need it; of rows that do not count, anything.
TOP = tl.constexpr(0)  # largest logit of the slice
SLICE_REST = tl.constexpr(1)  # sum without the target, on the scale of the slice's own largest logit
ANSWER = tl.constexpr(2)  # 1 where the first maximum of the slice is [MASK], plus 2 where it is the target
TARGET_LOGIT = tl.constexpr(3)  # 0 outside the target's slice; the next one outside that of [MASK]
MASK_LOGIT = tl.constexpr(4)
N_MESSAGE = 5
# With smoothing two more: the sum of all exponents on the same scale, and of how many. With the entropy
# one more at the end: the sum of exp2 times exponent without the target.
EXPONENT_SUM = tl.constexpr(5)
WORDS = tl.constexpr(6)


def message_size(terms: Terms = PLAIN) -> int:
    """How many numbers of a row a slice tells the others."""
    return N_MESSAGE + 2 * (terms.label_smoothing > 0) + terms.entropy


@triton.jit
def _local_id(token, start, vocab_size):
    """The column of this slice that holds a token, -1 where another slice does."""
    return tl.where((token >= start) & (token < start + vocab_size), token - start, -1).to(tl.int32)


@triton.jit
def _store_message(
    message_ptr, row, n_rows, inside, top, rest, exponent_sum, moment, predicted, target, mask, target_logit,
    mask_logit, vocab_size, terms, N_COLUMNS: tl.constexpr,
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
    if terms.label_smoothing is not None:
        words = tl.cast(vocab_size, tl.float32)
        if terms.FORBID_MASK:
            words = tl.where(has_mask, words - 1.0, words)
        tl.store(base + EXPONENT_SUM * n_rows, exponent_sum, mask=inside)
        tl.store(base + WORDS * n_rows, words, mask=inside)
    if terms.ENTROPY:
        tl.store(base + (N_COLUMNS - 1) * n_rows, moment, mask=inside)


@triton.jit(do_not_specialize=["start", "mask_id", "ignore_index", "n_rows"])
def _slice_kernel(
    logits_ptr, y_ptr, message_ptr, start, mask_id, ignore_index, n_rows, vocab_size, spacing, terms,
    N_COLUMNS: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int64)
    if is_left_out(y, load_token_weight(row, True, terms), ignore_index, terms):
        for column in tl.static_range(N_COLUMNS):
            tl.store(message_ptr + row + column * n_rows, 0.0)
    else:
        target, mask = _local_id(y, start, vocab_size), _local_id(mask_id, start, vocab_size)
        if terms.FORBID_MASK:
            target = tl.where(y == mask_id, -1, target)
        top, _, rest, exponent_sum, moment, predicted, target_logit, mask_logit = read_row(
            row_pointer(logits_ptr, row, spacing, ALIGNED), target, tl.maximum(mask, 0), mask, vocab_size,
            scaling_of(terms), terms, REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip
        _store_message(
            message_ptr, row, n_rows, True, top, rest, exponent_sum, moment, predicted, target, mask, target_logit,
            mask_logit, vocab_size, terms, N_COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["start", "mask_id", "ignore_index", "n_rows"])
def _small_slice_kernel(
    logits_ptr, y_ptr, message_ptr, start, mask_id, ignore_index, n_rows, vocab_size, spacing, terms,
    N_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    target, mask = _local_id(y, start, vocab_size), _local_id(mask_id, start, vocab_size)
    if terms.FORBID_MASK:
        target = tl.where(y == mask_id, -1, target)
    # Rows that do not count are not read.
    left_out = is_left_out(y, load_token_weight(row, inside, terms), ignore_index, terms)
    _, top, _, rest, exponent_sum, moment, predicted, target_logit, mask_logit = read_small_rows(
        logits_ptr,
        row,
        tl.where(left_out, False, inside),
        target,
        mask,
        mask,
        vocab_size,
        spacing,
        scaling_of(terms),
        terms,
        BLOCK_V,
    )
    _store_message(
        message_ptr, row, n_rows, inside, top, rest, exponent_sum, moment, predicted, target, mask, target_logit,
        mask_logit, vocab_size, terms, N_COLUMNS,
    )  # fmt: skip


def launch_slice(
    logits: Tensor, y: Tensor, mask_id: int, ignore_index: int = -1, *, start: int, terms: Terms = PLAIN,
    tile: tiles.Tile | None = None,
) -> Tensor:  # fmt: skip
    """What one slice of the vocabulary tells the others, (message_size(terms), N) fp32. Reads the logits once.

    Args:
        logits: (N, V_r) or (B, T, V_r), columns [start, start + V_r) of the whole rows; V_r >= 1. Not modified.
        y: (N,) targets in the whole vocabulary, like ``mask_id``.
        terms: as in :func:`launch_loss`.
        tile: how to cut rows; by default the one for V_r.
    """
    n, vocab_size = len(y), logits.shape[-1]
    tile = tile or tiles.choose_tile(logits)
    message = torch.empty(message_size(terms), n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return message
    kernel = _small_slice_kernel if tile.rows else _slice_kernel
    with on_device(logits):
        kernel[(-(-n // (tile.rows or 1)),)](
            logits_ptr=logits, y_ptr=y.contiguous(), message_ptr=message,
            start=start, mask_id=mask_id, ignore_index=ignore_index, n_rows=n, vocab_size=vocab_size,
            spacing=spacing_of_rows(logits), terms=slice_arguments(terms, n), N_COLUMNS=len(message),
            **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return message


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows", "vocab_size", "n_slices"])
def _combine_kernel(
    messages_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, n_slices, terms, N_COLUMNS: tl.constexpr, PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    message = messages_ptr + row
    top = tl.load(message + TOP * n_rows, mask=inside, other=0.0)
    answer = tl.load(message + ANSWER * n_rows, mask=inside, other=0.0)
    target_logit = tl.load(message + TARGET_LOGIT * n_rows, mask=inside, other=0.0)
    mask_logit = tl.load(message + MASK_LOGIT * n_rows, mask=inside, other=0.0)
    for _ in range(1, n_slices):
        message += N_COLUMNS * n_rows
        slice_top = tl.load(message + TOP * n_rows, mask=inside, other=0.0)
        # Only a higher one: of equal maxima the first counts. The first NaN is the maximum.
        is_higher = (slice_top > top) | ((slice_top != slice_top) & (top == top))
        answer = tl.where(is_higher, tl.load(message + ANSWER * n_rows, mask=inside, other=0.0), answer)
        top = tl.where(is_higher, slice_top, top)
        target_logit += tl.load(message + TARGET_LOGIT * n_rows, mask=inside, other=0.0)
        mask_logit += tl.load(message + MASK_LOGIT * n_rows, mask=inside, other=0.0)

    scaling = scaling_of(terms)
    shift = shift_of(top, scaling, terms)  # where it is not finite, the row is NaN
    rest = tl.zeros([ROWS], tl.float32)
    exponent_sum = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    message = messages_ptr + row
    for _ in range(0, n_slices):
        slice_top = tl.load(message + TOP * n_rows, mask=inside, other=0.0)
        move = shift_of(slice_top, scaling, terms) - shift
        scale = tl.exp2(move)
        slice_rest = tl.load(message + SLICE_REST * n_rows, mask=inside, other=0.0)
        rest += slice_rest * scale
        if terms.label_smoothing is not None:
            words = tl.load(message + WORDS * n_rows, mask=inside, other=0.0)
            exponent_sum += tl.load(message + EXPONENT_SUM * n_rows, mask=inside, other=0.0)
            exponent_sum += tl.where(words > 0, words * move, 0.0)
        if terms.ENTROPY:
            slice_moment = tl.load(message + (N_COLUMNS - 1) * n_rows, mask=inside, other=0.0)
            moment += (slice_moment + slice_rest * tl.maximum(move, FAINT)) * scale
        message += N_COLUMNS * n_rows

    _, is_label = target_column(y, vocab_size, mask_id, terms)
    says_mask = (answer == 1.0) | (answer == 3.0)
    pk, pm = load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE)
    token_weight = load_token_weight(row, inside, terms)
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    case = kind * 3 + tl.where(says_mask, 0, tl.where(answer == 2.0, 1, 2))
    case = tl.where(is_left_out(y, token_weight, ignore_index, terms), IGNORED, case)
    # A label outside the vocabulary has logit 0 here.
    target_unit = tl.where(is_label, units_of(target_logit, scaling, terms), float("-inf"))
    mask_unit = units_of(mask_logit, scaling, terms)
    if terms.FORBID_MASK:
        mask_unit = float("-inf")
    store_statistics(
        case_ptr, statistics_ptr, row, n_rows, inside, kind, case, weight, y, is_label, mask_id, token_weight, pk, pm,
        target_unit, mask_unit, units_of(top, scaling, terms), shift, rest, exponent_sum, moment, vocab_size, scaling, terms,
    )  # fmt: skip


def launch_combine(
    messages: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor = 1.0, pm: float | Tensor = 1.0,
    ignore_index: int = -1, *, vocab_size: int, terms: Terms = PLAIN,
) -> RowStatistics:  # fmt: skip
    """Statistics of the whole rows, from what all slices of the vocabulary told.

    With them, and ``y`` less the slice's start, :func:`launch_gradient` makes the gradient of a slice.

    Args:
        messages: (slices, message_size(terms), N) fp32 contiguous, in the order of the vocabulary; see
            :func:`launch_slice`.
        vocab_size: of all slices together.
    """
    n_slices, n_columns, n = messages.shape
    statistics = empty_statistics(n, messages.device, terms)
    if n == 0:
        return statistics
    rows = 128
    with on_device(messages):
        _combine_kernel[(-(-n // rows),)](
            messages_ptr=messages, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n, vocab_size=vocab_size, n_slices=n_slices,
            terms=scoring_arguments(terms, n), N_COLUMNS=n_columns,
            ROWS=rows, num_warps=4, enable_fp_fusion=False, **penalty_arguments(pk, pm, messages.device),
        )  # fmt: skip
    return statistics
