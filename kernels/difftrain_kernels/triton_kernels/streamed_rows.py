"""Streamed rows: one program reads a row in blocks, scores it, and writes its gradient."""

import triton
import triton.language as tl

from .blocks import block_offsets, block_pointer, head_size, lane_pointers, load_wide
from .row_statistics import FLOOR, LOG2E, gradient_of, store_statistics
from .weights import kind_and_weight, target_column


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
        values = load_wide(
            block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR), REPEAT, LANES, VECTOR
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
    block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
    offsets = block_offsets(REPEAT, LANES, VECTOR)
    column = head + block * (REPEAT * LANES * VECTOR) + offsets
    if IS_TAIL:
        values = tl.load(block_ptr + offsets, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    else:
        values = load_wide(block_ptr, REPEAT, LANES, VECTOR)
    new_top, total, exps = _raise_maximum(values, top, total)
    exps = tl.where(column == target, 0.0, exps)
    total += tl.sum(tl.sum(exps, axis=2), axis=0)
    return new_top, total, tl.where(new_top > top, block, seen)


@triton.jit
def scan_row(
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
    column = head + block * (REPEAT * LANES * VECTOR) + block_offsets(REPEAT, LANES, VECTOR)
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
def read_row(
    row_ptr, target, mask_id, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """All that a row's logits say; ``predicted`` only where it may be ``mask_id`` or ``target``, else -1."""
    target_logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    mask_logit = tl.load(row_ptr + mask_id).to(tl.float32)
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    top, shift, rest, first_block = scan_row(
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
def score_row(
    row_ptr, case_ptr, statistics_ptr, row, n_rows, y, x, mask_id, pk, pm, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Statistics of one row that counts."""
    target, is_label = target_column(y, vocab_size)
    top, shift, rest, predicted, target_logit, mask_logit = read_row(
        row_ptr, target, mask_id, vocab_size, REPEAT, LANES, VECTOR, ALIGNED
    )
    says_mask = predicted == mask_id
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    # A label -1 that is not ignored must not pass for the prediction that was not needed.
    case = kind * 3 + tl.where(says_mask, 0, tl.where(is_label & (predicted == y), 1, 2))
    # The total counts the target only where there is one.
    target_logit = tl.where(is_label, target_logit, float("-inf"))
    per_total = store_statistics(
        case_ptr, statistics_ptr, row, n_rows, True, case, weight, target_logit, mask_logit, top, shift, rest, is_label
    )  # fmt: skip
    return target, shift, rest, per_total


@triton.jit
def _write_block(
    row_ptr, gradient_ptr, head, block, vocab_size, shift, factor,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
    out_ptr = block_pointer(gradient_ptr, head, block, REPEAT * LANES * VECTOR)
    offsets = block_offsets(REPEAT, LANES, VECTOR)
    dtype = gradient_ptr.dtype.element_ty
    if IS_TAIL:
        inside = head + block * (REPEAT * LANES * VECTOR) + offsets < vocab_size
        values = tl.load(block_ptr + offsets, mask=inside).to(tl.float32)
        tl.store(out_ptr + offsets, gradient_of(values, shift, factor).to(dtype), mask=inside)
    else:
        values = load_wide(block_ptr, REPEAT, LANES, VECTOR)
        # Streamed out, so that the gradient does not push rows that are still to be read from the cache.
        gradient = gradient_of(values, shift, factor).to(dtype)
        tl.store(lane_pointers(out_ptr, REPEAT, LANES, VECTOR), gradient, cache_modifier=".cs")


@triton.jit
def write_gradient_row(
    row_ptr, gradient_ptr, target, shift, rest, factor, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of the gradient; ``gradient_ptr`` may be the row itself."""
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
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
        tl.store(gradient_ptr + lane, gradient_of(values, shift, factor).to(dtype), mask=lane < head)
    if target >= 0:
        tl.debug_barrier()
        tl.store(gradient_ptr + target, (-rest * factor).to(dtype))


@triton.jit
def zero_row(
    gradient_ptr, vocab_size,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of the gradient where the position does not count."""
    head = head_size(gradient_ptr, vocab_size, VECTOR, ALIGNED)
    n_full = (vocab_size - head) // (REPEAT * LANES * VECTOR)
    offsets = block_offsets(REPEAT, LANES, VECTOR)
    zeros = tl.zeros([REPEAT, LANES, VECTOR], gradient_ptr.dtype.element_ty)
    for block in range(0, n_full):
        tl.store(block_pointer(gradient_ptr, head, block, REPEAT * LANES * VECTOR) + offsets, zeros)
    inside = head + n_full * (REPEAT * LANES * VECTOR) + offsets < vocab_size
    tail_ptr = block_pointer(gradient_ptr, head, n_full, REPEAT * LANES * VECTOR)
    tl.store(tail_ptr + offsets, zeros, mask=inside)
    if not ALIGNED:
        lane = tl.arange(0, LANES)
        tl.store(gradient_ptr + lane, 0.0, mask=lane < head)
