"""Streamed rows: one program reads a row in blocks, scores it, and writes its gradient."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import block_offsets, block_pointer, head_size, lane_pointers, load_wide
from .first_maximum import first_index, first_maximum
from .row_statistics import gradient_of, store_statistics, target_gradient_of
from .scores import FAINT, exponents_of, shift_of, units_of
from .weights import kind_and_weight, target_column


class Sums(NamedTuple):
    """What a scan holds of a row, a lane each; the last three only where terms ask for them."""

    top: Any  # largest logit
    total: Any  # sum of exp2 on its scale, without the target
    seen: Any  # the block in which it came first, -1 in the head
    exponents: Any  # sum of all exponents, on the same scale
    words: Any  # how many
    moment: Any  # sum of exp2 times exponent, without the target


@triton.jit
def _move(sums, top, move, terms):
    """The sums on the scale of another maximum, whose shift is ``move`` lower."""
    scale = tl.exp2(move)
    exponents, moment = sums.exponents, sums.moment
    if terms.label_smoothing is not None:
        exponents = tl.fma(sums.words, move, exponents)
    if terms.ENTROPY:
        moment = tl.fma(sums.total, move, moment) * scale
    return Sums(top, sums.total * scale, sums.seen, exponents, sums.words, moment)


@triton.jit
def _add_block(values, takes_part, column, target, block, sums, scaling, terms):
    """One more block in each lane's sums; all of it where ``takes_part`` is None."""
    before = sums.top
    top = tl.maximum(sums.top, tl.max(tl.max(values, axis=2), axis=0))
    shift = shift_of(top, scaling)
    exponents = exponents_of(units_of(values, scaling), shift[None, :, None], scaling)
    exps = tl.exp2(exponents)
    sums = _move(sums, top, shift_of(sums.top, scaling) - shift, terms)
    if takes_part is not None:
        if scaling.inner is not None:
            exps = tl.where(takes_part, exps, 0.0)  # a cap makes a number of -inf
        exps = tl.where(column == target, 0.0, exps)
    total = sums.total + tl.sum(tl.sum(exps, axis=2), axis=0)
    exponent_sum, words, moment = sums.exponents, sums.words, sums.moment
    if terms.label_smoothing is not None:
        if takes_part is None:
            exponent_sum += tl.sum(tl.sum(exponents, axis=2), axis=0)
            words += values.numel // sums.top.numel
        else:
            exponent_sum += tl.sum(tl.sum(tl.where(takes_part, exponents, 0.0), axis=2), axis=0)
            words += tl.sum(tl.sum(takes_part.to(tl.float32), axis=2), axis=0)
    if terms.ENTROPY:
        moment += tl.sum(tl.sum(exps * tl.maximum(exponents, FAINT), axis=2), axis=0)
    seen = tl.where(top > before, block, sums.seen)
    return Sums(top, total, seen, exponent_sum, words, moment)


@triton.jit
def _scan_blocks(
    row_ptr,
    head,
    first,
    last,
    sums,
    scaling,
    terms,
    REPEAT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Blocks [first, last), all full: no mask, nothing crosses lanes."""
    for block in range(first, last):
        values = load_wide(
            block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR), REPEAT, LANES, VECTOR
        )
        sums = _add_block(values, None, None, None, block, sums, scaling, terms)
    return sums


@triton.jit
def _scan_edge(
    row_ptr, head, block, target, forbidden, vocab_size, sums, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """One block, the row's tail or a full one, whose sum leaves out the target and the forbidden word."""
    block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
    offsets = block_offsets(REPEAT, LANES, VECTOR)
    column = head + block * (REPEAT * LANES * VECTOR) + offsets
    takes_part = column < vocab_size
    if IS_TAIL:
        values = tl.load(block_ptr + offsets, mask=takes_part, other=float("-inf")).to(tl.float32)
    else:
        values = load_wide(block_ptr, REPEAT, LANES, VECTOR)
    if terms.FORBID_MASK:
        takes_part = takes_part & (column != forbidden)
        values = tl.where(takes_part, values, float("-inf"))
    return _add_block(values, takes_part, column, target, block, sums, scaling, terms)


@triton.jit
def _scan_head(row_ptr, head, target, forbidden, sums, scaling, terms, LANES: tl.constexpr):
    """What stands before the first 16-byte boundary, at most one logit to a lane."""
    lane = tl.arange(0, LANES)
    takes_part = lane < head
    values = tl.load(row_ptr + lane, mask=takes_part, other=float("-inf")).to(tl.float32)
    if terms.FORBID_MASK:
        takes_part = takes_part & (lane != forbidden)
        values = tl.where(takes_part, values, float("-inf"))
    top = tl.maximum(sums.top, values)
    exponents = exponents_of(units_of(values, scaling), shift_of(top, scaling), scaling)
    exps = tl.exp2(exponents)
    if scaling.inner is not None:
        exps = tl.where(takes_part, exps, 0.0)
    exps = tl.where(lane == target, 0.0, exps)
    moment = exps * tl.maximum(exponents, FAINT)
    exponents = tl.where(takes_part, exponents, 0.0)
    return Sums(top, exps, sums.seen, exponents, takes_part.to(tl.float32), moment)


@triton.jit
def scan_row(
    row_ptr, head, target, forbidden, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Maximum, its shift, the sum without ``target``, and the maximum's first block; then, where the terms
    ask for them, the sum of all exponents, and of exp2 times exponent without the target."""
    BLOCK: tl.constexpr = REPEAT * LANES * VECTOR
    zeros = tl.full([LANES], 0.0, tl.float32)
    top = tl.full([LANES], scaling.floor, tl.float32)
    sums = Sums(top, zeros, tl.full([LANES], -1, tl.int32), zeros, zeros, zeros)
    if not ALIGNED:
        sums = _scan_head(row_ptr, head, target, forbidden, sums, scaling, terms, LANES)

    # The target's block stands apart, so that no other block compares columns with the target; so does
    # that of a forbidden word.
    n_full = (vocab_size - head) // BLOCK
    apart = tl.minimum(tl.maximum(target - head, 0) // BLOCK, n_full)
    last_apart = apart
    if terms.FORBID_MASK:
        other = tl.minimum(tl.maximum(forbidden - head, 0) // BLOCK, n_full)
        last_apart = tl.maximum(apart, other)
        apart = tl.minimum(apart, other)
    sums = _scan_blocks(row_ptr, head, 0, apart, sums, scaling, terms, REPEAT, LANES, VECTOR)
    if apart < n_full:
        sums = _scan_edge(
            row_ptr,
            head,
            apart,
            target,
            forbidden,
            vocab_size,
            sums,
            scaling,
            terms,
            REPEAT,
            LANES,
            VECTOR,
            False,
        )
    if terms.FORBID_MASK:
        sums = _scan_blocks(
            row_ptr, head, apart + 1, last_apart, sums, scaling, terms, REPEAT, LANES, VECTOR
        )
        if (last_apart > apart) & (last_apart < n_full):
            sums = _scan_edge(
                row_ptr, head, last_apart, target, forbidden, vocab_size, sums, scaling, terms,
                REPEAT, LANES, VECTOR, False,
            )  # fmt: skip
    sums = _scan_blocks(row_ptr, head, last_apart + 1, n_full, sums, scaling, terms, REPEAT, LANES, VECTOR)
    if head + n_full * BLOCK < vocab_size:
        sums = _scan_edge(
            row_ptr,
            head,
            n_full,
            target,
            forbidden,
            vocab_size,
            sums,
            scaling,
            terms,
            REPEAT,
            LANES,
            VECTOR,
            True,
        )

    row_top = tl.max(sums.top, axis=0)
    shift = shift_of(row_top, scaling)
    moved = _move(sums, row_top, shift_of(sums.top, scaling) - shift, terms)
    rest = tl.sum(moved.total, axis=0)
    first_block = tl.min(tl.where(sums.top == row_top, sums.seen, n_full), axis=0)
    return row_top, shift, rest, first_block, tl.sum(moved.exponents, axis=0), tl.sum(moved.moment, axis=0)


@triton.jit
def read_row(
    row_ptr, target, mask_id, forbidden, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """All that a row's logits say; ``predicted`` only where it may be ``mask_id`` or ``target``, else -1."""
    target_logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    mask_logit = tl.load(row_ptr + mask_id).to(tl.float32)
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    top, shift, rest, first_block, exponent_sum, moment = scan_row(
        row_ptr, head, target, forbidden, vocab_size, scaling, terms, REPEAT, LANES, VECTOR, ALIGNED
    )
    # Only a row whose [MASK] or target logit is the maximum needs to know where the maximum came first.
    predicted = -1
    if (mask_logit == top) | (target_logit == top):
        predicted = first_index(
            row_ptr, head, first_block, top, forbidden, vocab_size, terms, REPEAT, LANES, VECTOR
        )
    # The target is not in rest, so a NaN there shows only in its own logit.
    if not ((rest >= 0) & (target_logit == target_logit) & (top > scaling.floor) & (top < float("inf"))):
        predicted, top = first_maximum(row_ptr, forbidden, vocab_size, terms, REPEAT * LANES * VECTOR)
    return top, shift, rest, exponent_sum, moment, predicted, target_logit, mask_logit


@triton.jit
def score_row(
    row_ptr, case_ptr, statistics_ptr, row, n_rows, y, x, mask_id, token_weight, pk, pm, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Statistics of one row that counts."""
    target, is_label = target_column(y, vocab_size, mask_id, terms)
    top, shift, rest, exponent_sum, moment, predicted, target_logit, mask_logit = read_row(
        row_ptr, target, mask_id, mask_id, vocab_size, scaling, terms, REPEAT, LANES, VECTOR, ALIGNED
    )
    says_mask = predicted == mask_id
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    # A label -1 that is not ignored must not pass for the prediction that was not needed.
    case = kind * 3 + tl.where(says_mask, 0, tl.where(is_label & (predicted == y), 1, 2))
    # The total counts the target only where there is one.
    target_unit = tl.where(is_label, units_of(target_logit, scaling), float("-inf"))
    mask_unit = units_of(mask_logit, scaling)
    if terms.FORBID_MASK:
        mask_unit = float("-inf")
    per_total, target_term, uniform = store_statistics(
        case_ptr, statistics_ptr, row, n_rows, True, kind, case, weight, y, is_label, mask_id, token_weight, pk, pm,
        target_unit, mask_unit, units_of(top, scaling), shift, rest, exponent_sum, moment, vocab_size, scaling, terms,
    )  # fmt: skip
    return target, shift, rest, per_total, target_term, uniform


@triton.jit
def _write_block(
    row_ptr, gradient_ptr, head, block, vocab_size, shift, factor, uniform, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
    out_ptr = block_pointer(gradient_ptr, head, block, REPEAT * LANES * VECTOR)
    offsets = block_offsets(REPEAT, LANES, VECTOR)
    dtype = gradient_ptr.dtype.element_ty
    if IS_TAIL:
        inside = head + block * (REPEAT * LANES * VECTOR) + offsets < vocab_size
        values = tl.load(block_ptr + offsets, mask=inside).to(tl.float32)
        tl.store(
            out_ptr + offsets,
            gradient_of(values, shift, factor, uniform, scaling, terms).to(dtype),
            mask=inside,
        )
    else:
        values = load_wide(block_ptr, REPEAT, LANES, VECTOR)
        # Streamed out, so that the gradient does not push rows that are still to be read from the cache.
        gradient = gradient_of(values, shift, factor, uniform, scaling, terms).to(dtype)
        tl.store(lane_pointers(out_ptr, REPEAT, LANES, VECTOR), gradient, cache_modifier=".cs")


@triton.jit
def write_gradient_row(
    row_ptr, gradient_ptr, target, forbidden, shift, rest, factor, target_term, uniform, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of the gradient; ``gradient_ptr`` may be the row itself."""
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    n_full = (vocab_size - head) // (REPEAT * LANES * VECTOR)
    dtype = gradient_ptr.dtype.element_ty
    target_logit = 0.0
    if scaling.inner is not None:
        target_logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    # Every thread must have read what another one is about to overwrite.
    tl.debug_barrier()
    if head + n_full * (REPEAT * LANES * VECTOR) < vocab_size:
        _write_block(
            row_ptr, gradient_ptr, head, n_full, vocab_size, shift, factor, uniform, scaling, terms,
            REPEAT, LANES, VECTOR, True,
        )  # fmt: skip
    # Backwards: what the scan read last is the likeliest to be in the cache still.
    for block in range(n_full - 1, -1, -1):
        _write_block(
            row_ptr, gradient_ptr, head, block, vocab_size, shift, factor, uniform, scaling, terms,
            REPEAT, LANES, VECTOR, False,
        )  # fmt: skip
    if not ALIGNED:
        lane = tl.arange(0, LANES)
        values = tl.load(row_ptr + lane, mask=lane < head).to(tl.float32)
        tl.store(
            gradient_ptr + lane,
            gradient_of(values, shift, factor, uniform, scaling, terms).to(dtype),
            mask=lane < head,
        )
    if target >= 0:
        tl.debug_barrier()
        tl.store(
            gradient_ptr + target,
            target_gradient_of(target_logit, rest, factor, target_term, scaling, terms).to(dtype),
        )
    if terms.FORBID_MASK:
        tl.debug_barrier()
        tl.store(gradient_ptr + forbidden, 0.0, mask=(forbidden >= 0) & (forbidden < vocab_size))


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
