"""Triton kernels of the loss from logits, and at the end the functions that launch them.

A row is one position: V logits. Two families do the same work:

- streamed rows (V > ``SMALL_VOCAB``): one program per row, the row read in blocks of
  ``REPEAT * LANES * VECTOR`` logits, one lane per thread, 16 bytes per load. Every lane keeps its
  own running maximum and sum, so that nothing crosses lanes before the row's end.
- small rows: several rows per program, each held in registers.

Bytes moved, for N rows of V logits of b bytes: the loss reads N*V*b; loss and gradient together
read and write N*V*b each; the gradient alone, from saved row statistics, the same again. The
second read of a streamed row comes from the cache as long as all rows in flight fit in it.

Numbers are compiled with ``enable_fp_fusion=False``; what must be fused says ``tl.fma``. A shift
that is rounded once and then used everywhere cancels exactly, at any logit offset; a product the
compiler fuses into one use of it and not into another does not. A row whose largest logit is beyond
1.8e8 in size gives NaN: there fp32 shifts are too coarse for an exact loss. No atomics: two runs
give the same bits. The formula of the loss is in ``reference.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, since -inf minus -inf is NaN; its product with LOG2E too.
FLOOR = tl.constexpr(-2e38)
# Beyond it the shift's own rounding, half a unit in its last place, would show in the loss.
LARGEST_SHIFT = tl.constexpr(2.0**28)

# Columns of the row statistics, (6, N) fp32.
ROW_LOSS = tl.constexpr(0)  # weight * nll
NLL = tl.constexpr(1)
GAP = tl.constexpr(2)  # largest logit - logit of [MASK]
SHIFT = tl.constexpr(3)  # softmax = exp2(logit * LOG2E - SHIFT) / total
PER_TOTAL = tl.constexpr(4)  # weight / total, NaN for a label outside the vocabulary
REST = tl.constexpr(5)  # total without the target, summed without it: total - x would lose it as p -> 1
N_STATISTICS = 6

# What a slice of the vocabulary tells the others of a row, (5, N) fp32; of ignored rows, anything.
TOP = tl.constexpr(0)  # largest logit of the slice
SLICE_REST = tl.constexpr(1)  # sum without the target, on the scale of the slice's own largest logit
ANSWER = tl.constexpr(2)  # 1 where the first maximum of the slice is [MASK], plus 2 where it is the target
TARGET_LOGIT = tl.constexpr(3)  # 0 outside the target's slice; the next one outside that of [MASK]
MASK_LOGIT = tl.constexpr(4)
N_MESSAGE = 5

IGNORED = tl.constexpr(9)  # case of an ignored position; the others are kind * 3 + answer


# Parts that the kernels share.


@triton.jit
def _offsets(REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets in a block, (REPEAT, LANES, VECTOR): a lane's VECTOR neighbours are one 16-byte access."""
    repeat = tl.arange(0, REPEAT)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (repeat * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _row(ptr, row, stride, ALIGNED: tl.constexpr):
    """Pointer to a row's first element."""
    row_ptr = ptr + row * stride
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)
    return row_ptr


@triton.jit
def _head_size(row_ptr, vocab_size, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """How many elements stand before the row's first 16-byte boundary."""
    if ALIGNED:
        return 0
    else:
        element_size: tl.constexpr = 16 // VECTOR
        address = row_ptr.to(tl.int64) // element_size
        return tl.minimum(((VECTOR - address % VECTOR) % VECTOR).to(tl.int32), vocab_size)


@triton.jit
def _block_ptr(row_ptr, head, block, BLOCK: tl.constexpr):
    return tl.multiple_of(row_ptr + head + block * BLOCK, 16)


@triton.jit
def _pointers(block_ptr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block's pointers. The repeat comes last: it is a constant that fits into the instruction."""
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return block_ptr + lane + tl.arange(0, REPEAT)[:, None, None] * (LANES * VECTOR)


@triton.jit
def _load_wide(block_ptr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A full block as (REPEAT, LANES, VECTOR) fp32."""
    if block_ptr.dtype.element_ty == tl.bfloat16:
        # Two neighbours in one word: a shift and an AND, where the compiler's own way takes three.
        words_ptr = block_ptr.to(tl.pointer_type(tl.uint32))
        words = tl.load(_pointers(tl.multiple_of(words_ptr, 16), REPEAT, LANES, VECTOR // 2))
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(REPEAT, LANES, VECTOR)
    else:
        return tl.load(_pointers(block_ptr, REPEAT, LANES, VECTOR)).to(tl.float32)


@triton.jit
def _raise_maximum(values, top, total):
    """Lift each lane's maximum over ``values``; its sum on the new scale, and exp2 of the values."""
    new_top = tl.maximum(top, tl.max(tl.max(values, axis=2), axis=0))
    shift = new_top * LOG2E
    exps = tl.exp2(tl.fma(values, LOG2E, -shift[None, :, None]))
    return new_top, total * tl.exp2(top * LOG2E - shift), exps


@triton.jit
def _scan_blocks(
    row_ptr, head, first, last, top, total, seen,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Blocks [first, last), all full: no mask, nothing crosses lanes."""
    for block in range(first, last):
        values = _load_wide(
            _block_ptr(row_ptr, head, block, REPEAT * LANES * VECTOR), REPEAT, LANES, VECTOR
        )
        new_top, total, exps = _raise_maximum(values, top, total)
        total += tl.sum(tl.sum(exps, axis=2), axis=0)
        seen = tl.where(new_top > top, block, seen)
        top = new_top
    return top, total, seen


@triton.jit
def _scan_edge(
    row_ptr, head, block, target, vocab_size, top, total, seen,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """One block, the row's tail or a full one, whose sum leaves out the target."""
    block_ptr = _block_ptr(row_ptr, head, block, REPEAT * LANES * VECTOR)
    offsets = _offsets(REPEAT, LANES, VECTOR)
    column = head + block * (REPEAT * LANES * VECTOR) + offsets
    if IS_TAIL:
        values = tl.load(block_ptr + offsets, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    else:
        values = _load_wide(block_ptr, REPEAT, LANES, VECTOR)
    new_top, total, exps = _raise_maximum(values, top, total)
    exps = tl.where(column == target, 0.0, exps)
    total += tl.sum(tl.sum(exps, axis=2), axis=0)
    return new_top, total, tl.where(new_top > top, block, seen)


@triton.jit
def _scan_row(
    row_ptr, head, target, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Maximum, its product with LOG2E, the sum without ``target``, and the maximum's first block."""
    BLOCK: tl.constexpr = REPEAT * LANES * VECTOR
    lane = tl.arange(0, LANES)
    top = tl.full([LANES], FLOOR, tl.float32)
    total = tl.full([LANES], 0.0, tl.float32)
    seen = tl.full([LANES], -1, tl.int32)  # the block in which each lane's maximum came first
    if not ALIGNED:
        values = tl.load(row_ptr + lane, mask=lane < head, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, values)
        total = tl.where(lane == target, 0.0, tl.exp2(tl.fma(values, LOG2E, -top * LOG2E)))

    # The target's block stands apart, so that no other block compares columns with the target.
    n_full = (vocab_size - head) // BLOCK
    target_block = tl.minimum(tl.maximum(target - head, 0) // BLOCK, n_full)
    top, total, seen = _scan_blocks(row_ptr, head, 0, target_block, top, total, seen, REPEAT, LANES, VECTOR)
    if target_block < n_full:
        top, total, seen = _scan_edge(
            row_ptr, head, target_block, target, vocab_size, top, total, seen, REPEAT, LANES, VECTOR, False
        )
    top, total, seen = _scan_blocks(
        row_ptr, head, target_block + 1, n_full, top, total, seen, REPEAT, LANES, VECTOR
    )
    if head + n_full * BLOCK < vocab_size:
        top, total, seen = _scan_edge(
            row_ptr, head, n_full, target, vocab_size, top, total, seen, REPEAT, LANES, VECTOR, True
        )

    row_top = tl.max(top, axis=0)
    shift = row_top * LOG2E
    rest = tl.sum(total * tl.exp2(top * LOG2E - shift), axis=0)
    first_block = tl.min(tl.where(top == row_top, seen, n_full), axis=0)
    return row_top, shift, rest, first_block


@triton.jit
def _first_index(
    row_ptr, head, block, value, vocab_size, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """The first column of a block (-1: the head) that holds ``value``; V if none does."""
    column = head + block * (REPEAT * LANES * VECTOR) + _offsets(REPEAT, LANES, VECTOR)
    inside = (column >= 0) & (column < vocab_size)
    values = tl.load(row_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    found = tl.where(inside & (values == value), column, vocab_size)
    return tl.min(tl.min(tl.min(found, axis=2), axis=1), axis=0)


@triton.jit
def _first_maximum(row_ptr, vocab_size, BLOCK: tl.constexpr):
    """torch.argmax and its value for a row with NaN or without a finite maximum; rare, so plain."""
    offsets = tl.arange(0, BLOCK)
    first_nan = vocab_size
    index = 0
    top = float("-inf")
    for start in range(0, vocab_size, BLOCK):
        column = start + offsets
        inside = column < vocab_size
        values = tl.load(row_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        is_nan = values != values
        first_nan = tl.minimum(first_nan, tl.min(tl.where(is_nan, column, vocab_size), axis=0))
        numbers = tl.where(is_nan, float("-inf"), values)
        block_top = tl.max(numbers, axis=0)
        if block_top > top:
            top = block_top
            index = tl.min(tl.where(numbers == block_top, column, vocab_size), axis=0)
    if first_nan < vocab_size:
        index = first_nan
        top = float("nan")
    return index, top


@triton.jit
def _load_penalty(penalty, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        return tl.load(penalty)
    else:
        return penalty


@triton.jit
def _kind_and_weight(x, y, says_mask, mask_id, pk, pm):
    """0 masked, 1 intact, 2 corrupted; and the weight of the position."""
    is_masked = (x == mask_id) & (y != mask_id)
    is_intact = (x == y) & (x != mask_id)
    kind = tl.where(is_masked, 0, tl.where(is_intact, 1, 2))
    weight = tl.where(is_masked & says_mask, pk, 1.0)
    return kind, tl.where(is_intact & says_mask, pm, weight)


@triton.jit
def _store_statistics(
    case_ptr, statistics_ptr, row, n_rows, inside, case, weight, target_logit, mask_logit, top, shift, rest, is_label
):  # fmt: skip
    """All that is kept of one row (or of a block of rows): the case and six numbers."""
    log2_p = tl.fma(target_logit, LOG2E, -shift)
    total = rest + tl.exp2(log2_p)
    is_exact = tl.abs(shift) < LARGEST_SHIFT
    poison = tl.where(is_label & is_exact, 1.0, float("nan"))
    # An empty total: NaN, or every logit below FLOOR. It must not pass for a number.
    nll = tl.where(total > 0, LN2 * (tl.log2(total) - log2_p), float("nan")) * poison
    is_counted = case != IGNORED
    base = statistics_ptr + row
    tl.store(case_ptr + row, case, mask=inside)
    tl.store(base + ROW_LOSS * n_rows, tl.where(is_counted, weight * nll, 0.0), mask=inside)
    tl.store(base + NLL * n_rows, tl.where(is_counted, nll, 0.0), mask=inside)
    tl.store(base + GAP * n_rows, tl.where(is_counted, top - mask_logit, 0.0), mask=inside)
    tl.store(base + SHIFT * n_rows, tl.where(is_counted, shift, 0.0), mask=inside)
    per_total = tl.where(is_counted, weight * poison / total, 0.0)
    tl.store(base + PER_TOTAL * n_rows, per_total, mask=inside)
    tl.store(base + REST * n_rows, tl.where(is_counted, rest, 0.0), mask=inside)
    return per_total


@triton.jit
def _gradient_of(values, shift, factor):
    """softmax * scale, before the target's share; ``factor`` is scale / total."""
    return tl.exp2(tl.fma(values, LOG2E, -shift)) * factor


# Streamed rows.


@triton.jit
def _read_row(
    row_ptr, target, mask_id, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """All that a row's logits say; ``predicted`` only where it may be ``mask_id`` or ``target``, else -1."""
    target_logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    mask_logit = tl.load(row_ptr + mask_id).to(tl.float32)
    head = _head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    top, shift, rest, first_block = _scan_row(
        row_ptr, head, target, vocab_size, REPEAT, LANES, VECTOR, ALIGNED
    )
    # Only a row whose [MASK] or target logit is the maximum needs to know where the maximum came first.
    predicted = -1
    if (mask_logit == top) | (target_logit == top):
        predicted = _first_index(row_ptr, head, first_block, top, vocab_size, REPEAT, LANES, VECTOR)
    # The target is not in rest, so a NaN there shows only in its own logit.
    if not ((rest >= 0) & (target_logit == target_logit) & (top > FLOOR) & (top < float("inf"))):
        predicted, top = _first_maximum(row_ptr, vocab_size, REPEAT * LANES * VECTOR)
    return top, shift, rest, predicted, target_logit, mask_logit


@triton.jit
def _score_row(
    row_ptr, case_ptr, statistics_ptr, row, n_rows, y, x, mask_id, pk, pm, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Statistics of one row that counts."""
    is_label = (y >= 0) & (y < vocab_size)
    target = tl.where(is_label, y, -1).to(tl.int32)
    top, shift, rest, predicted, target_logit, mask_logit = _read_row(
        row_ptr, target, mask_id, vocab_size, REPEAT, LANES, VECTOR, ALIGNED
    )
    says_mask = predicted == mask_id
    kind, weight = _kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    # A label -1 that is not ignored must not pass for the prediction that was not needed.
    case = kind * 3 + tl.where(says_mask, 0, tl.where(is_label & (predicted == y), 1, 2))
    # The total counts the target only where there is one.
    target_logit = tl.where(is_label, target_logit, float("-inf"))
    per_total = _store_statistics(
        case_ptr, statistics_ptr, row, n_rows, True, case, weight, target_logit, mask_logit, top, shift, rest, is_label
    )  # fmt: skip
    return target, shift, rest, per_total


@triton.jit
def _store_ignored(case_ptr, statistics_ptr, row, n_rows):
    tl.store(case_ptr + row, IGNORED)
    for column in tl.static_range(6):
        tl.store(statistics_ptr + row + column * n_rows, 0.0)


@triton.jit
def _write_block(
    row_ptr, gradient_ptr, head, block, vocab_size, shift, factor,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    block_ptr = _block_ptr(row_ptr, head, block, REPEAT * LANES * VECTOR)
    out_ptr = _block_ptr(gradient_ptr, head, block, REPEAT * LANES * VECTOR)
    offsets = _offsets(REPEAT, LANES, VECTOR)
    dtype = gradient_ptr.dtype.element_ty
    if IS_TAIL:
        inside = head + block * (REPEAT * LANES * VECTOR) + offsets < vocab_size
        values = tl.load(block_ptr + offsets, mask=inside).to(tl.float32)
        tl.store(out_ptr + offsets, _gradient_of(values, shift, factor).to(dtype), mask=inside)
    else:
        values = _load_wide(block_ptr, REPEAT, LANES, VECTOR)
        # Streamed out, so that the gradient does not push rows that are still to be read from the cache.
        gradient = _gradient_of(values, shift, factor).to(dtype)
        tl.store(_pointers(out_ptr, REPEAT, LANES, VECTOR), gradient, cache_modifier=".cs")


@triton.jit
def _write_gradient_row(
    row_ptr, gradient_ptr, target, shift, rest, factor, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of the gradient; ``gradient_ptr`` may be the row itself."""
    head = _head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    n_full = (vocab_size - head) // (REPEAT * LANES * VECTOR)
    dtype = gradient_ptr.dtype.element_ty
    # Every thread must have read what another one is about to overwrite.
    tl.debug_barrier()
    if head + n_full * (REPEAT * LANES * VECTOR) < vocab_size:
        _write_block(
            row_ptr, gradient_ptr, head, n_full, vocab_size, shift, factor, REPEAT, LANES, VECTOR, True
        )
    # Backwards: what the scan read last is the likeliest to be in the cache still.
    for block in range(n_full - 1, -1, -1):
        _write_block(
            row_ptr, gradient_ptr, head, block, vocab_size, shift, factor, REPEAT, LANES, VECTOR, False
        )
    if not ALIGNED:
        lane = tl.arange(0, LANES)
        values = tl.load(row_ptr + lane, mask=lane < head).to(tl.float32)
        tl.store(gradient_ptr + lane, _gradient_of(values, shift, factor).to(dtype), mask=lane < head)
    if target >= 0:
        tl.debug_barrier()
        tl.store(gradient_ptr + target, (-rest * factor).to(dtype))


@triton.jit
def _zero_row(
    gradient_ptr, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    head = _head_size(gradient_ptr, vocab_size, VECTOR, ALIGNED)
    n_full = (vocab_size - head) // (REPEAT * LANES * VECTOR)
    offsets = _offsets(REPEAT, LANES, VECTOR)
    zeros = tl.zeros([REPEAT, LANES, VECTOR], gradient_ptr.dtype.element_ty)
    for block in range(0, n_full):
        tl.store(_block_ptr(gradient_ptr, head, block, REPEAT * LANES * VECTOR) + offsets, zeros)
    inside = head + n_full * (REPEAT * LANES * VECTOR) + offsets < vocab_size
    tl.store(_block_ptr(gradient_ptr, head, n_full, REPEAT * LANES * VECTOR) + offsets, zeros, mask=inside)
    if not ALIGNED:
        lane = tl.arange(0, LANES)
        tl.store(gradient_ptr + lane, 0.0, mask=lane < head)


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
        _store_ignored(case_ptr, statistics_ptr, row, n_rows)
    else:
        _score_row(
            _row(logits_ptr, row, logits_stride, ALIGNED), case_ptr, statistics_ptr, row, n_rows,
            y, tl.load(x_ptr + row), mask_id,
            _load_penalty(pk, PENALTIES_ON_DEVICE), _load_penalty(pm, PENALTIES_ON_DEVICE), vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, upstream, divisor,
    mask_id, ignore_index, n_rows, vocab_size, logits_stride, gradient_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = _row(logits_ptr, row, logits_stride, ALIGNED)
    gradient_row_ptr = _row(gradient_ptr, row, gradient_stride, ALIGNED)
    y = tl.load(y_ptr + row).to(tl.int64)
    if y == ignore_index:
        _store_ignored(case_ptr, statistics_ptr, row, n_rows)
        _zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
    else:
        target, shift, rest, per_total = _score_row(
            row_ptr, case_ptr, statistics_ptr, row, n_rows, y, tl.load(x_ptr + row), mask_id,
            _load_penalty(pk, PENALTIES_ON_DEVICE), _load_penalty(pm, PENALTIES_ON_DEVICE), vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip
        _write_gradient_row(
            row_ptr, gradient_row_ptr, target, shift, rest, per_total * upstream / divisor, vocab_size,
            REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, case_ptr, statistics_ptr, upstream_ptr, stated, divisor,
    n_rows, vocab_size, logits_stride, gradient_stride, upstream_stride,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # Few programs that take many rows: where nothing is left to do, a launch costs microseconds.
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        if upstream != stated:  # always, where NaN is stated
            row_ptr = _row(logits_ptr, row, logits_stride, ALIGNED)
            gradient_row_ptr = _row(gradient_ptr, row, gradient_stride, ALIGNED)
            if tl.load(case_ptr + row) == IGNORED:
                _zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
            else:
                y = tl.load(y_ptr + row).to(tl.int64)
                target = tl.where((y >= 0) & (y < vocab_size), y, -1).to(tl.int32)
                base = statistics_ptr + row
                factor = tl.load(base + PER_TOTAL * n_rows) * upstream / divisor
                _write_gradient_row(
                    row_ptr, gradient_row_ptr, target,
                    tl.load(base + SHIFT * n_rows), tl.load(base + REST * n_rows), factor, vocab_size,
                    REPEAT, LANES, VECTOR, ALIGNED,
                )  # fmt: skip


# Small rows.


@triton.jit
def _small_tile(ptr, row, inside, stride, vocab_size, BLOCK_V: tl.constexpr):
    """Pointers of a block of rows, (ROWS, BLOCK_V), which of them exist, and their columns (1, BLOCK_V)."""
    column = tl.arange(0, BLOCK_V)[None, :]
    return (ptr + row * stride)[:, None] + column, inside[:, None] & (column < vocab_size), column


@triton.jit
def _read_small_rows(
    logits_ptr, row, inside, target, mask_id, vocab_size, logits_stride, BLOCK_V: tl.constexpr
):
    """A block of rows, (ROWS, BLOCK_V) fp32, and all that they say; a negative id is none."""
    pointers, exists, column = _small_tile(logits_ptr, row, inside, logits_stride, vocab_size, BLOCK_V)
    values = tl.load(pointers, mask=exists, other=float("-inf")).to(tl.float32)
    row_ptr = logits_ptr + row * logits_stride
    target_logit = tl.load(row_ptr + target, mask=inside & (target >= 0), other=float("-inf")).to(
        tl.float32
    )
    mask_logit = tl.load(row_ptr + mask_id, mask=inside & (mask_id >= 0), other=0.0).to(tl.float32)

    is_nan = values != values
    numbers = tl.where(is_nan, float("-inf"), values)
    top = tl.max(numbers, axis=1)
    shift = tl.maximum(top, FLOOR) * LOG2E
    exps = tl.exp2(tl.fma(values, LOG2E, -shift[:, None]))
    rest = tl.sum(tl.where(column == target[:, None], 0.0, exps), axis=1)
    first_top = tl.min(tl.where(exists & (numbers == top[:, None]), column, BLOCK_V), axis=1)
    first_nan = tl.min(tl.where(is_nan, column, BLOCK_V), axis=1)
    has_nan = first_nan < BLOCK_V
    predicted = tl.where(has_nan, first_nan, first_top)
    top = tl.where(has_nan, float("nan"), top)
    return values, top, shift, rest, predicted, target_logit, mask_logit


@triton.jit
def _score_small_rows(
    logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, is_counted, mask_id, pk, pm,
    vocab_size, logits_stride, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics of a block of rows, and their logits, (ROWS, BLOCK_V) fp32."""
    is_label = (y >= 0) & (y < vocab_size)
    target = tl.where(is_label, y, -1).to(tl.int32)
    values, top, shift, rest, predicted, target_logit, mask_logit = _read_small_rows(
        logits_ptr, row, inside, target, mask_id, vocab_size, logits_stride, BLOCK_V
    )
    says_mask = predicted == mask_id
    kind, weight = _kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    case = kind * 3 + tl.where(says_mask, 0, tl.where(predicted == y, 1, 2))
    case = tl.where(is_counted, case, IGNORED)
    per_total = _store_statistics(
        case_ptr, statistics_ptr, row, n_rows, inside, case, weight, target_logit, mask_logit, top, shift, rest, is_label
    )  # fmt: skip
    return values, target, shift, rest, per_total


@triton.jit
def _write_small_gradient(
    gradient_ptr, row, inside, values, target, shift, rest, factor, is_counted, vocab_size, gradient_stride,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    pointers, exists, column = _small_tile(gradient_ptr, row, inside, gradient_stride, vocab_size, BLOCK_V)
    gradient = _gradient_of(values, shift[:, None], factor[:, None])
    gradient = tl.where(column == target[:, None], (-rest * factor)[:, None], gradient)
    gradient = tl.where(is_counted[:, None], gradient, 0.0)
    tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _small_loss_kernel(
    logits_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, logits_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    _score_small_rows(
        logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, y != ignore_index, mask_id,
        _load_penalty(pk, PENALTIES_ON_DEVICE), _load_penalty(pm, PENALTIES_ON_DEVICE),
        vocab_size, logits_stride, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _small_loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, upstream, divisor,
    mask_id, ignore_index, n_rows, vocab_size, logits_stride, gradient_stride,
    PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    is_counted = y != ignore_index
    values, target, shift, rest, per_total = _score_small_rows(
        logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, is_counted, mask_id,
        _load_penalty(pk, PENALTIES_ON_DEVICE), _load_penalty(pm, PENALTIES_ON_DEVICE),
        vocab_size, logits_stride, BLOCK_V,
    )  # fmt: skip
    # In place, every thread must have read the target's and [MASK]'s logits first.
    tl.debug_barrier()
    _write_small_gradient(
        gradient_ptr, row, inside, values, target, shift, rest, per_total * upstream / divisor,
        is_counted, vocab_size, gradient_stride, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _small_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, case_ptr, statistics_ptr, upstream_ptr, stated, divisor,
    n_rows, vocab_size, logits_stride, gradient_stride, upstream_stride,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = tl.full([], start, tl.int64) + tl.arange(0, ROWS)
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row < n_rows, other=0.0)
        inside = (row < n_rows) & (upstream != stated)
        if tl.max(inside.to(tl.int32), axis=0) > 0:
            y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
            target = tl.where((y >= 0) & (y < vocab_size), y, -1).to(tl.int32)
            is_counted = tl.load(case_ptr + row, mask=inside, other=IGNORED) != IGNORED
            base = statistics_ptr + row
            shift = tl.load(base + SHIFT * n_rows, mask=inside, other=0.0)
            rest = tl.load(base + REST * n_rows, mask=inside, other=0.0)
            factor = tl.load(base + PER_TOTAL * n_rows, mask=inside, other=0.0) * upstream / divisor
            pointers, exists, _ = _small_tile(logits_ptr, row, inside, logits_stride, vocab_size, BLOCK_V)
            values = tl.load(pointers, mask=exists, other=float("-inf")).to(tl.float32)
            _write_small_gradient(
                gradient_ptr, row, inside, values, target, shift, rest, factor,
                is_counted, vocab_size, gradient_stride, BLOCK_V,
            )  # fmt: skip


# A slice of the vocabulary, where several devices hold one row between them.


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
        top, _, rest, predicted, target_logit, mask_logit = _read_row(
            _row(logits_ptr, row, logits_stride, ALIGNED), target, tl.maximum(mask, 0), vocab_size,
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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
    target, mask = _local_id(y, start, vocab_size), _local_id(mask_id, start, vocab_size)
    # Ignored rows are not read.
    _, top, _, rest, predicted, target_logit, mask_logit = _read_small_rows(
        logits_ptr, row, inside & (y != ignore_index), target, mask, vocab_size, logits_stride, BLOCK_V
    )
    _store_message(
        message_ptr, row, n_rows, inside, top, rest, predicted, target, mask, target_logit, mask_logit
    )


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows", "vocab_size", "n_slices"])
def _combine_kernel(
    messages_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, n_slices, PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
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

    is_label = (y >= 0) & (y < vocab_size)
    says_mask = (answer == 1.0) | (answer == 3.0)
    kind, weight = _kind_and_weight(
        x,
        y,
        says_mask,
        mask_id,
        _load_penalty(pk, PENALTIES_ON_DEVICE),
        _load_penalty(pm, PENALTIES_ON_DEVICE),
    )
    case = kind * 3 + tl.where(says_mask, 0, tl.where(answer == 2.0, 1, 2))
    case = tl.where(y == ignore_index, IGNORED, case)
    _store_statistics(
        case_ptr, statistics_ptr, row, n_rows, inside, case, weight, target_logit, mask_logit, top, shift, rest, is_label
    )  # fmt: skip


# After the rows.


@triton.jit(do_not_specialize=["n_rows"])
def _case_sums_kernel(case_ptr, statistics_ptr, counts_ptr, sums_ptr, n_rows, BLOCK: tl.constexpr):
    """Counts and nll of the nine cells and the gap of the three kinds, by one program: no atomics."""
    cell = tl.arange(0, 16)
    counts = tl.zeros([16], tl.int32)
    nll_sums = tl.zeros([16], tl.float32)
    gap_sums = tl.zeros([16], tl.float32)
    for start in range(0, n_rows, BLOCK):
        row = tl.full([], start, tl.int64) + tl.arange(0, BLOCK)
        inside = row < n_rows
        case = tl.load(case_ptr + row, mask=inside, other=IGNORED)
        nll = tl.load(statistics_ptr + row + NLL * n_rows, mask=inside, other=0.0)
        gap = tl.load(statistics_ptr + row + GAP * n_rows, mask=inside, other=0.0)
        in_cell = case[:, None] == cell[None, :]
        counts += tl.sum(in_cell.to(tl.int32), axis=0)
        nll_sums += tl.sum(tl.where(in_cell, nll[:, None], 0.0), axis=0)
        in_kind = (case // 3)[:, None] == cell[None, :]
        gap_sums += tl.sum(tl.where(in_kind, gap[:, None], 0.0), axis=0)
    tl.store(counts_ptr + cell, counts.to(tl.int64), mask=cell < 9)
    tl.store(sums_ptr + cell, nll_sums, mask=cell < 9)
    tl.store(sums_ptr + 9 + cell, gap_sums, mask=cell < 3)


@triton.jit(do_not_specialize=["n_rows"])
def _rescale_kernel(
    gradient_ptr,
    upstream_ptr,
    stated,
    n_rows,
    vocab_size,
    gradient_stride,
    upstream_stride,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        if upstream != stated:
            for start in range(0, vocab_size, BLOCK):
                pointers = gradient_ptr + row * gradient_stride + start + offsets
                inside = start + offsets < vocab_size
                values = tl.load(pointers, mask=inside).to(tl.float32) * (upstream / stated)
                tl.store(pointers, values.to(gradient_ptr.dtype.element_ty), mask=inside)


# Launchers.


class RowStatistics(NamedTuple):
    """What one pass over the logits leaves of each row.

    Attributes:
        case: (N,) int32, kind * 3 + answer as in ``cases.py``, 9 for an ignored position.
        columns: (6, N) fp32: weighted loss, nll, gap, and three that the gradient needs.
    """

    case: Tensor
    columns: Tensor

    @property
    def row_loss(self) -> Tensor:
        return self.columns[0]


@dataclass(frozen=True)
class Tile:
    """How a row is cut. ``rows`` > 0: that many rows of ``block_v`` in one program, else streamed."""

    warps: int
    repeat: int = 1
    rows: int = 0
    block_v: int = 0


SMALL_VOCAB = 4096
SMALL_TILE = 1024  # logits per program of 4 warps; longer rows get up to 16 logits to a thread
# Rows longer than the bound on the left are streamed with this tile. Chosen from the instructions
# and registers that bench_codegen reports for sm_90 (no GPU timing yet): at up to 64 registers,
# 2 programs of 16 warps or 1 of 32 fill a multiprocessor, and rows in flight stay in the L2.
STREAM_TILES = (
    (65536, Tile(warps=32, repeat=2)),
    (16384, Tile(warps=16, repeat=2)),
    (0, Tile(warps=8, repeat=2)),
)
MAX_REGISTERS = 64  # 32 warps to a multiprocessor
MAX_PROGRAMS = 1024  # of the gradient kernels, whose programs take many rows


def choose_tile(vocab_size: int) -> Tile:
    """The tile for rows of this length."""
    if vocab_size <= SMALL_VOCAB:
        block_v = max(16, triton.next_power_of_2(vocab_size))
        return Tile(warps=max(4, block_v // 512), rows=max(1, SMALL_TILE // block_v), block_v=block_v)
    return next(tile for above, tile in STREAM_TILES if vocab_size > above)


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, and the kernels run on CPU tensors."""
    return not isinstance(_loss_kernel, triton.JITFunction)


def _vector(dtype: torch.dtype) -> int:
    """Elements in a 16-byte access."""
    return 16 // dtype.itemsize


def row_phase(rows: Tensor) -> tuple[int, int]:
    """Where rows start relative to 16-byte boundaries: of the first, and by how much it moves per row."""
    vector = _vector(rows.dtype)
    return rows.data_ptr() // rows.dtype.itemsize % vector, rows.stride(0) % vector


def _tile_arguments(logits: Tensor, tile: Tile) -> dict:
    """The compile-time arguments that say how rows are cut."""
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    if tile.rows:
        return {"ROWS": tile.rows, "BLOCK_V": tile.block_v} | options
    lanes = 32 * tile.warps
    if torch.version.hip:
        options["num_warps"] = max(1, tile.warps // 2)  # 64 lanes to a warp
    else:
        options["maxnreg"] = MAX_REGISTERS
    aligned = row_phase(logits) == (0, 0)
    return {
        "REPEAT": tile.repeat,
        "LANES": lanes,
        "VECTOR": _vector(logits.dtype),
        "ALIGNED": aligned,
    } | options


def _on_device(tensor: Tensor):
    """The tensor's device as the current one, as Triton launches where CUDA is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _penalties(pk: float | Tensor, pm: float | Tensor, device: torch.device) -> dict:
    """Both as numbers, or both as fp32 scalars on the device; no wait for the device either way."""
    on_device = isinstance(pk, Tensor) or isinstance(pm, Tensor)
    if on_device:
        pk, pm = (
            p.detach().to(torch.float32) if isinstance(p, Tensor) else torch.full((), p, device=device)
            for p in (pk, pm)
        )
    else:
        pk, pm = float(pk), float(pm)
    return {"pk": pk, "pm": pm, "PENALTIES_ON_DEVICE": on_device}


def _empty_statistics(rows: Tensor) -> RowStatistics:
    n, device = rows.shape[0], rows.device
    return RowStatistics(
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(N_STATISTICS, n, dtype=torch.float32, device=device),
    )


def empty_gradient_like(logits: Tensor, phase: int | None = None) -> Tensor:
    """Uninitialised (N, V) rows that start at the same 16-byte phase as the logits' rows.

    Contiguous where the logits are. Loads and stores of one row can only both be 16 bytes wide
    where the two start alike. ``phase`` is of the first row, for logits that have no address.
    """
    n, vocab_size = logits.shape
    if phase is None:
        phase, _ = row_phase(logits)
    stride = vocab_size + (logits.stride(0) - vocab_size) % _vector(logits.dtype)
    buffer = torch.empty(phase + n * stride, dtype=logits.dtype, device=logits.device)
    return buffer.as_strided((n, vocab_size), (stride, 1), phase)


def launch_loss(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor, pm: float | Tensor,
    ignore_index: int = -1, *, tile: Tile | None = None,
) -> RowStatistics:  # fmt: skip
    """Losses of all rows. Reads the logits once.

    Args:
        logits: (N, V) fp32, bf16 or fp16, last stride 1; not modified. ``y``, ``x``: (N,) integers.
        pk, pm: numbers, or 0-d float tensors on the device.
        tile: how to cut rows; by default the one for V.
    """
    n, vocab_size = logits.shape
    tile = tile or choose_tile(vocab_size)
    statistics = _empty_statistics(logits)
    if n == 0:
        return statistics
    kernel = _small_loss_kernel if tile.rows else _loss_kernel
    with _on_device(logits):
        kernel[(triton.cdiv(n, tile.rows or 1),)](
            logits_ptr=logits, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, logits_stride=logits.stride(0),
            **_penalties(pk, pm, logits.device), **_tile_arguments(logits, tile),
        )  # fmt: skip
    return statistics


def launch_loss_and_gradient(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor, pm: float | Tensor,
    ignore_index: int = -1, *, upstream: float, divisor: float, gradient_out: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[RowStatistics, Tensor]:  # fmt: skip
    """Losses of all rows and the gradient of sum(row losses) * upstream / divisor.

    Args:
        gradient_out: where the gradient goes, (N, V) in the logits' dtype and phase (see
            :func:`empty_gradient_like`); the logits themselves to overwrite them. New by default.

    The other arguments are those of :func:`launch_loss`. Reads the logits once from memory and
    writes the gradient once.
    """
    n, vocab_size = logits.shape
    tile = tile or choose_tile(vocab_size)
    statistics = _empty_statistics(logits)
    gradient = _gradient_buffer(logits, gradient_out)
    if n == 0:
        return statistics, gradient
    kernel = _small_loss_and_gradient_kernel if tile.rows else _loss_and_gradient_kernel
    with _on_device(logits):
        kernel[(triton.cdiv(n, tile.rows or 1),)](
            logits_ptr=logits, gradient_ptr=gradient, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            upstream=float(upstream), divisor=float(divisor),
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, logits_stride=logits.stride(0), gradient_stride=gradient.stride(0),
            **_penalties(pk, pm, logits.device), **_tile_arguments(logits, tile),
        )  # fmt: skip
    return statistics, gradient


def launch_gradient(
    logits: Tensor, y: Tensor, statistics: RowStatistics, upstream: Tensor, *, divisor: float,
    stated: float = float("nan"), gradient_out: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The gradient from saved statistics, bit for bit what the pass with the loss would have made.

    Args:
        logits: as they were when the statistics were made.
        upstream: 0-d, or (N,) with any stride (0 too): the gradient of each row's loss times divisor.
        stated: rows whose upstream equals this are left as ``gradient_out`` has them, and neither
            read nor written. The comparison happens on the device. By default no row.

    Otherwise reads the logits once and writes the gradient once.
    """
    upstream = upstream.to(torch.float32)
    n, vocab_size = logits.shape
    tile = tile or choose_tile(vocab_size)
    gradient = _gradient_buffer(logits, gradient_out)
    if n == 0:
        return gradient
    kernel = _small_gradient_kernel if tile.rows else _gradient_kernel
    with _on_device(logits):
        kernel[(min(triton.cdiv(n, tile.rows or 1), MAX_PROGRAMS),)](
            logits_ptr=logits, gradient_ptr=gradient, y_ptr=y.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            upstream_ptr=upstream, stated=float(stated), divisor=float(divisor),
            n_rows=n, vocab_size=vocab_size, logits_stride=logits.stride(0),
            gradient_stride=gradient.stride(0), upstream_stride=upstream.stride(0) if upstream.dim() else 0,
            **_tile_arguments(logits, tile),
        )  # fmt: skip
    return gradient


def _gradient_buffer(logits: Tensor, gradient_out: Tensor | None) -> Tensor:
    if gradient_out is None:
        return empty_gradient_like(logits)
    if (
        gradient_out.shape != logits.shape
        or gradient_out.dtype != logits.dtype
        or gradient_out.stride(1) != 1
    ):
        raise ValueError(
            f"gradient_out must have shape {tuple(logits.shape)}, dtype {logits.dtype} and last stride 1, "
            f"got {tuple(gradient_out.shape)}, {gradient_out.dtype}, strides {gradient_out.stride()}"
        )
    if row_phase(gradient_out) != row_phase(logits):
        raise ValueError(
            f"gradient_out must start its rows at the 16-byte phase {row_phase(logits)} of the logits, "
            f"got {row_phase(gradient_out)}"
        )
    return gradient_out


def launch_rescale(gradient: Tensor, upstream: Tensor, *, stated: float) -> None:
    """Bring a gradient made for the upstream ``stated`` to ``upstream``, in place.

    For a gradient that lies over its logits, where nothing is left to recompute it from: each
    element is rounded a second time. Rows whose upstream equals ``stated`` are not touched.
    """
    upstream = upstream.to(torch.float32)
    n, vocab_size = gradient.shape
    if n == 0:
        return
    with _on_device(gradient):
        _rescale_kernel[(min(n, MAX_PROGRAMS),)](
            gradient_ptr=gradient, upstream_ptr=upstream, stated=float(stated), n_rows=n,
            vocab_size=vocab_size, gradient_stride=gradient.stride(0),
            upstream_stride=upstream.stride(0) if upstream.dim() else 0,
            BLOCK=min(4096, triton.next_power_of_2(vocab_size)), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


def launch_case_sums(statistics: RowStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (3, 3) int64, nll sums (3, 3) and gap sums (3,) fp32 of the case table; one program."""
    n, device = len(statistics.case), statistics.case.device
    counts = torch.empty(9, dtype=torch.int64, device=device)
    sums = torch.empty(12, dtype=torch.float32, device=device)
    with _on_device(counts):
        _case_sums_kernel[(1,)](
            case_ptr=statistics.case, statistics_ptr=statistics.columns, counts_ptr=counts, sums_ptr=sums,
            n_rows=n, BLOCK=512, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return counts.view(3, 3), sums[:9].view(3, 3), sums[9:]


def launch_slice(
    logits: Tensor, y: Tensor, mask_id: int, ignore_index: int = -1, *, start: int, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """What one slice of the vocabulary tells the others, (5, N) fp32. Reads the logits once.

    Args:
        logits: (N, V_r), columns [start, start + V_r) of the whole rows; V_r >= 1. Not modified.
        y: (N,) targets in the whole vocabulary, like ``mask_id``.
        tile: how to cut rows; by default the one for V_r.
    """
    n, vocab_size = logits.shape
    tile = tile or choose_tile(vocab_size)
    message = torch.empty(N_MESSAGE, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return message
    kernel = _small_slice_kernel if tile.rows else _slice_kernel
    with _on_device(logits):
        kernel[(triton.cdiv(n, tile.rows or 1),)](
            logits_ptr=logits, y_ptr=y.contiguous(), message_ptr=message,
            start=start, mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, logits_stride=logits.stride(0), **_tile_arguments(logits, tile),
        )  # fmt: skip
    return message


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
    statistics = _empty_statistics(y)
    if n == 0:
        return statistics
    rows = 128
    with _on_device(messages):
        _combine_kernel[(triton.cdiv(n, rows),)](
            messages_ptr=messages, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n, vocab_size=vocab_size, n_slices=n_slices,
            ROWS=rows, num_warps=4, enable_fp_fusion=False, **_penalties(pk, pm, messages.device),
        )  # fmt: skip
    return statistics
