"""Where the maximum of a streamed row came first; asked only of rows whose answer hangs on it."""

import triton
import triton.language as tl

from .blocks import block_offsets, block_pointer, end_columns, load_some


@triton.jit
def _first_of(values, column, value, forbidden, vocab_size, terms):
    """Columns that hold ``value``; V where others are."""
    found = values == value
    if terms.FORBID_MASK:
        found = found & (column != forbidden)
    return tl.where(found, column, vocab_size)


@triton.jit
def _first_of_ends(
    row_ptr, head, n_vectors, value, forbidden, vocab_size, terms, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """The same of the row's ends, a lane each."""
    column, exists = end_columns(tl.arange(0, LANES), head, n_vectors, vocab_size, VECTOR)
    values = tl.load(row_ptr + column, mask=exists, other=float("-inf")).to(tl.float32)
    return _first_of(values, column, value, forbidden, vocab_size, terms)


@triton.jit
def first_index(
    row_ptr, head, n_vectors, block, value, forbidden, vocab_size, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The first column that holds ``value``, of a block (-1: the head; behind the last full one: all that is
    left) and the row's ends; V if none does."""
    first = tl.full([LANES], vocab_size, tl.int32)
    # Piece by piece: few registers, where a whole block would need as many as the scan and its columns.
    pieces = tl.minimum(block * REPEAT + REPEAT, tl.cdiv(n_vectors, LANES))
    for piece in range(tl.maximum(block, 0) * REPEAT, pieces):
        block_ptr = block_pointer(row_ptr, head, piece, LANES * VECTOR)
        values = load_some(block_ptr, piece, n_vectors, n_vectors, n_vectors, 1, LANES, VECTOR)
        column = head + piece * (LANES * VECTOR) + block_offsets(1, LANES, VECTOR)
        columns = _first_of(values, column, value, forbidden, vocab_size, terms)
        first = tl.minimum(first, tl.min(tl.min(columns, axis=2), axis=0))
    if n_vectors * VECTOR < vocab_size:
        ends = _first_of_ends(row_ptr, head, n_vectors, value, forbidden, vocab_size, terms, LANES, VECTOR)
        first = tl.minimum(first, ends)
    return tl.min(first, axis=0)


@triton.jit
def first_maximum(row_ptr, forbidden, vocab_size, terms, BLOCK: tl.constexpr):
    """torch.argmax and its value for a row with NaN or without a finite maximum; rare, so plain."""
    offsets = tl.arange(0, BLOCK)
    first_nan = vocab_size
    index = 0
    top = float("-inf")
    for start in range(0, vocab_size, BLOCK):
        column = start + offsets
        inside = column < vocab_size
        if terms.FORBID_MASK:
            inside = inside & (column != forbidden)
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
