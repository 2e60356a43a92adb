"""Streamed rows: one program reads a row in blocks, scores it, and writes its gradient."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import (
    are_taken,
    block_pointer,
    end_columns,
    head_size,
    load_block,
    load_some,
    store_block,
    store_some,
    vector_with,
    vectors_of,
)
from .first_maximum import first_index, first_maximum
from .row_statistics import gradient_of, store_statistics, target_gradient_of
from .scores import FAINT, exponents_of, shift_of, units_of
from .weights import kind_and_weight, target_column


class Sums(NamedTuple):
    """What a scan holds of a row, a lane each; the last three only where terms ask for them."""

    top: Any  # largest logit
    total: Any  # sum of exp2 on its scale, without the target
    seen: Any  # the block in which it came first: -1 the head, all behind the last full block counts as one
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
def _add_block(values, takes_part, block, sums, scaling, terms):
    """One more block in each lane's sums; all of it where ``takes_part`` is None."""
    before = sums.top
    top = tl.maximum(sums.top, tl.max(tl.max(values, axis=2), axis=0))
    shift = shift_of(top, scaling, terms)
    exponents = exponents_of(units_of(values, scaling, terms), shift[None, :, None], scaling)
    exps = tl.exp2(exponents)
    sums = _move(sums, top, shift_of(sums.top, scaling, terms) - shift, terms)
    if (takes_part is not None) and (terms.softcap is not None):
        exps = tl.where(takes_part, exps, 0.0)  # a cap makes a number of -inf
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
    row_ptr, head, first, last, sums, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Blocks [first, last), all full: no mask, nothing crosses lanes."""
    for block in range(first, last):
        block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
        values = load_block(block_ptr, REPEAT, LANES, VECTOR)
        sums = _add_block(values, None, block, sums, scaling, terms)
    return sums


@triton.jit
def _scan_some(
    row_ptr, head, block, n_vectors, without, and_without, seen, sums, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Those vectors of one block that the row has, without two that are taken one by one."""
    block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
    values = load_some(block_ptr, block, n_vectors, without, and_without, REPEAT, LANES, VECTOR)
    taken = are_taken(vectors_of(block, REPEAT, LANES), n_vectors, without, and_without)
    return _add_block(values, tl.broadcast_to(taken, values.shape), seen, sums, scaling, terms)


@triton.jit
def _scan_singly(
    row_ptr, head, n_vectors, first, second, behind, target, forbidden, vocab_size, sums, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Logit by logit, at most one to a lane: two vectors and the row's ends, where columns are compared.
    What is not before the last full block counts as seen in ``behind``."""
    lane = tl.arange(0, LANES)
    vector = tl.where(lane < VECTOR, first, second)
    place = lane - 2 * VECTOR  # in the ends
    column, takes_part = end_columns(place, head, n_vectors, vocab_size, VECTOR)
    block = tl.where(place < head, -1, behind)
    is_end = place >= 0
    column = tl.where(is_end, column, head + vector * VECTOR + lane % VECTOR)
    takes_part = tl.where(is_end, takes_part, vector < n_vectors)
    block = tl.where(is_end, block, tl.minimum(vector // (REPEAT * LANES), behind))
    values = tl.load(row_ptr + column, mask=takes_part, other=float("-inf")).to(tl.float32)
    if terms.FORBID_MASK:
        takes_part = takes_part & (column != forbidden)
        values = tl.where(takes_part, values, float("-inf"))
    # Of equal maxima the one that stands first in the row counts.
    seen = tl.where(values == sums.top, tl.minimum(block, sums.seen), sums.seen)
    seen = tl.where(values > sums.top, block, seen)
    top = tl.maximum(sums.top, values)
    shift = shift_of(top, scaling, terms)
    exponents = exponents_of(units_of(values, scaling, terms), shift, scaling)
    exps = tl.exp2(exponents)
    if terms.softcap is not None:
        exps = tl.where(takes_part, exps, 0.0)
    exps = tl.where(column == target, 0.0, exps)
    sums = _move(sums, top, shift_of(sums.top, scaling, terms) - shift, terms)
    exponent_sum, words, moment = sums.exponents, sums.words, sums.moment
    if terms.label_smoothing is not None:
        exponent_sum += tl.where(takes_part, exponents, 0.0)
        words += takes_part.to(tl.float32)
    if terms.ENTROPY:
        moment += exps * tl.maximum(exponents, FAINT)
    return Sums(top, sums.total + exps, seen, exponent_sum, words, moment)


@triton.jit
def scan_row(
    row_ptr, head, n_vectors, n_full, target, forbidden, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Each lane's sums."""
    zeros = tl.full([LANES], 0.0, tl.float32)
    top = tl.full([LANES], scaling.floor, tl.float32)
    sums = Sums(top, zeros, tl.full([LANES], -1, tl.int32), zeros, zeros, zeros)

    # The vectors of the target and of a forbidden word are left out of their blocks, so that no block
    # compares columns.
    first = vector_with(target, head, n_vectors, VECTOR)
    second = n_vectors
    apart = first // (REPEAT * LANES)
    last_apart = apart
    if terms.FORBID_MASK:
        second = vector_with(forbidden, head, n_vectors, VECTOR)
        other = second // (REPEAT * LANES)
        last_apart = tl.maximum(apart, other)
        apart = tl.minimum(apart, other)
    sums = _scan_blocks(row_ptr, head, 0, apart, sums, scaling, terms, REPEAT, LANES, VECTOR)
    if apart < n_full:
        sums = _scan_some(
            row_ptr, head, apart, n_vectors, first, second, apart, sums, scaling, terms, REPEAT, LANES, VECTOR
        )  # fmt: skip
    if terms.FORBID_MASK:
        sums = _scan_blocks(
            row_ptr, head, apart + 1, last_apart, sums, scaling, terms, REPEAT, LANES, VECTOR
        )
        if (last_apart > apart) & (last_apart < n_full):
            sums = _scan_some(
                row_ptr, head, last_apart, n_vectors, first, second, last_apart, sums, scaling, terms,
                REPEAT, LANES, VECTOR,
            )  # fmt: skip
        second = tl.where(second == first, n_vectors, second)
    sums = _scan_blocks(row_ptr, head, last_apart + 1, n_full, sums, scaling, terms, REPEAT, LANES, VECTOR)
    for piece in range(n_full * REPEAT, tl.cdiv(n_vectors, LANES)):
        sums = _scan_some(
            row_ptr, head, piece, n_vectors, first, second, n_full, sums, scaling, terms, 1, LANES, VECTOR
        )
    return _scan_singly(
        row_ptr, head, n_vectors, first, second, n_full, target, forbidden, vocab_size, sums, scaling, terms,
        REPEAT, LANES, VECTOR,
    )  # fmt: skip


@triton.jit
def on_one_scale(sums, scaling, terms):
    """The row's maximum, its shift, and all lanes' sums relative to it."""
    top = tl.max(sums.top, axis=0)
    shift = shift_of(top, scaling, terms)
    return top, shift, _move(sums, top, shift_of(sums.top, scaling, terms) - shift, terms)


@triton.jit
def read_row(
    row_ptr, target, mask_id, forbidden, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """All that a row's logits say: the maximum, its shift, the sum without ``target``; where the terms ask for
    them, the sum of all exponents, and of exp2 times exponent without the target; the first maximum's
    column, only where it may be ``mask_id`` or ``target``, else -1; and their two logits."""
    target_logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    mask_logit = tl.load(row_ptr + mask_id).to(tl.float32)
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    n_vectors = (vocab_size - head) // VECTOR
    n_full = n_vectors // (REPEAT * LANES)
    sums = scan_row(
        row_ptr,
        head,
        n_vectors,
        n_full,
        target,
        forbidden,
        vocab_size,
        scaling,
        terms,
        REPEAT,
        LANES,
        VECTOR,
    )
    top, shift, moved = on_one_scale(sums, scaling, terms)
    rest = tl.sum(moved.total, axis=0)
    # Only a row whose [MASK] or target logit is the maximum needs to know where the maximum came first.
    predicted = -1
    if (mask_logit == top) | (target_logit == top):
        first_block = tl.min(tl.where(sums.top == top, sums.seen, n_full), axis=0)
        predicted = first_index(
            row_ptr, head, n_vectors, first_block, top, forbidden, vocab_size, terms, REPEAT, LANES, VECTOR
        )
    # The target is not in rest, so a NaN there shows only in its own logit.
    if not ((rest >= 0) & (target_logit == target_logit) & (top > scaling.floor) & (top < float("inf"))):
        predicted, top = first_maximum(row_ptr, forbidden, vocab_size, terms, LANES * VECTOR)
    exponent_sum, moment = tl.sum(moved.exponents, axis=0), tl.sum(moved.moment, axis=0)
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
    target_unit = tl.where(is_label, units_of(target_logit, scaling, terms), float("-inf"))
    mask_unit = units_of(mask_logit, scaling, terms)
    if terms.FORBID_MASK:
        mask_unit = float("-inf")
    per_total, target_term, uniform = store_statistics(
        case_ptr, statistics_ptr, row, n_rows, True, kind, case, weight, y, is_label, mask_id, token_weight, pk, pm,
        target_unit, mask_unit, units_of(top, scaling, terms), shift, rest, exponent_sum, moment, vocab_size, scaling, terms,
    )  # fmt: skip
    return target, shift, rest, per_total, target_term, uniform


@triton.jit
def _write_block(
    row_ptr, gradient_ptr, head, block, n_vectors, shift, factor, uniform, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
    block_ptr = block_pointer(row_ptr, head, block, REPEAT * LANES * VECTOR)
    out_ptr = block_pointer(gradient_ptr, head, block, REPEAT * LANES * VECTOR)
    if IS_FULL:
        values = load_block(block_ptr, REPEAT, LANES, VECTOR)
        gradient = gradient_of(values, shift, factor, uniform, scaling, terms)
        store_block(out_ptr, gradient, REPEAT, LANES, VECTOR)
    else:
        values = load_some(block_ptr, block, n_vectors, n_vectors, n_vectors, REPEAT, LANES, VECTOR)
        gradient = gradient_of(values, shift, factor, uniform, scaling, terms)
        store_some(out_ptr, block, n_vectors, gradient, REPEAT, LANES, VECTOR)


@triton.jit
def write_gradient_row(
    row_ptr, gradient_ptr, target, forbidden, shift, rest, factor, target_term, uniform, vocab_size, scaling, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of the gradient; ``gradient_ptr`` may be the row itself."""
    head = head_size(row_ptr, vocab_size, VECTOR, ALIGNED)
    n_vectors = (vocab_size - head) // VECTOR
    n_full = n_vectors // (REPEAT * LANES)
    dtype = gradient_ptr.dtype.element_ty
    target_logit = 0.0
    if terms.softcap is not None:
        target_logit = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
    # Every thread must have read what another one is about to overwrite.
    tl.debug_barrier()
    # Backwards: what the scan read last is the likeliest to be in the cache still.
    if n_vectors * VECTOR < vocab_size:
        column, exists = end_columns(tl.arange(0, LANES), head, n_vectors, vocab_size, VECTOR)
        values = tl.load(row_ptr + column, mask=exists).to(tl.float32)
        ends = gradient_of(values, shift, factor, uniform, scaling, terms).to(dtype)
        tl.store(gradient_ptr + column, ends, mask=exists)
    for piece in range(n_full * REPEAT, tl.cdiv(n_vectors, LANES)):
        _write_block(
            row_ptr, gradient_ptr, head, piece, n_vectors, shift, factor, uniform, scaling, terms,
            1, LANES, VECTOR, False,
        )  # fmt: skip
    for block in range(n_full - 1, -1, -1):
        _write_block(
            row_ptr, gradient_ptr, head, block, n_vectors, shift, factor, uniform, scaling, terms,
            REPEAT, LANES, VECTOR, True,
        )  # fmt: skip
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
    n_vectors = (vocab_size - head) // VECTOR
    n_full = n_vectors // (REPEAT * LANES)
    for block in range(0, n_full):
        out_ptr = block_pointer(gradient_ptr, head, block, REPEAT * LANES * VECTOR)
        store_block(out_ptr, tl.zeros([REPEAT, LANES, VECTOR], tl.float32), REPEAT, LANES, VECTOR)
    for piece in range(n_full * REPEAT, tl.cdiv(n_vectors, LANES)):
        out_ptr = block_pointer(gradient_ptr, head, piece, LANES * VECTOR)
        zeros = tl.zeros([1, LANES, VECTOR], tl.float32)
        store_some(out_ptr, piece, n_vectors, zeros, 1, LANES, VECTOR)
    if n_vectors * VECTOR < vocab_size:
        column, exists = end_columns(tl.arange(0, LANES), head, n_vectors, vocab_size, VECTOR)
        tl.store(gradient_ptr + column, 0.0, mask=exists)
