"""Blocks of a streamed row: ``REPEAT * LANES * VECTOR`` logits, in accesses of 16 bytes.

A row is vectors of 16 bytes between two ends: what stands before its first 16-byte boundary, the head,
and what is left behind the last whole vector. Vectors that do not fill a block are taken in pieces, a
vector to a lane; the two ends together in one access, a logit to a lane.
"""

import triton
import triton.language as tl

from .spacing import row_offset


@triton.jit
def block_offsets(REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets in a block, (REPEAT, LANES, VECTOR): a lane's VECTOR neighbours are one 16-byte access."""
    repeat = tl.arange(0, REPEAT)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (repeat * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def vectors_of(block, REPEAT: tl.constexpr, LANES: tl.constexpr):
    """The numbers of a block's vectors, (REPEAT, LANES, 1). A mask of this shape is the same for all of a
    vector, so that a masked access stays 16 bytes wide."""
    vector = block * (REPEAT * LANES) + tl.arange(0, REPEAT)[:, None, None] * LANES
    return vector + tl.arange(0, LANES)[None, :, None]


@triton.jit
def vector_with(column, head, n_vectors, VECTOR: tl.constexpr):
    """The number of the vector that holds a column, ``n_vectors`` where none does."""
    vector = (column - head) // VECTOR
    return tl.where((column >= head) & (vector < n_vectors), vector, n_vectors)


@triton.jit
def end_columns(place, head, n_vectors, vocab_size, VECTOR: tl.constexpr):
    """Columns of a row's two ends by their place in them, from 0, and which places there are."""
    column = tl.where(place < head, place, place + n_vectors * VECTOR)
    return column, column < vocab_size


@triton.jit
def row_pointer(ptr, row, spacing, ALIGNED: tl.constexpr):
    """Pointer to a row's first element."""
    row_ptr = ptr + row_offset(row, spacing)
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)
    return row_ptr


@triton.jit
def head_size(row_ptr, vocab_size, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """How many elements stand before the row's first 16-byte boundary."""
    if ALIGNED:
        return 0
    else:
        element_size: tl.constexpr = 16 // VECTOR
        address = row_ptr.to(tl.int64) // element_size
        return tl.minimum(((VECTOR - address % VECTOR) % VECTOR).to(tl.int32), vocab_size)


@triton.jit
def block_pointer(row_ptr, head, block, BLOCK: tl.constexpr):
    """Pointer to a block's first element, which stands on a 16-byte boundary."""
    return tl.multiple_of(row_ptr + head + block * BLOCK, 16)


@triton.jit
def lane_pointers(block_ptr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block's pointers. The repeat comes last: it is a constant that fits into the instruction."""
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return block_ptr + lane + tl.arange(0, REPEAT)[:, None, None] * (LANES * VECTOR)


@triton.jit
def flat_pointers(block_ptr, REPEAT: tl.constexpr, WIDTH: tl.constexpr):
    """The same in two dimensions, (REPEAT, WIDTH): of three, Triton 3.6 gives the first to a warp's lanes, which
    then share their sums by shuffles."""
    return block_ptr + tl.arange(0, WIDTH)[None, :] + tl.arange(0, REPEAT)[:, None] * WIDTH


@triton.jit
def load_wide(block_ptr, exist, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block as (REPEAT, LANES, VECTOR) fp32; -inf where vectors do not exist, None: all do."""
    if block_ptr.dtype.element_ty == tl.bfloat16:
        # Two neighbours in one word: a shift and an AND, where the compiler's own way takes three.
        words_ptr = tl.multiple_of(block_ptr.to(tl.pointer_type(tl.uint32)), 16)
        words = _load_block(words_ptr, exist, 0xFF80FF80, REPEAT, LANES, VECTOR // 2)
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(REPEAT, LANES, VECTOR)
    else:
        return _load_block(block_ptr, exist, float("-inf"), REPEAT, LANES, VECTOR).to(tl.float32)


@triton.jit
def _load_block(block_ptr, exist, other, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    if exist is None:
        return tl.load(flat_pointers(block_ptr, REPEAT, LANES * VECTOR)).reshape(REPEAT, LANES, VECTOR)
    else:
        return tl.load(lane_pointers(block_ptr, REPEAT, LANES, VECTOR), mask=exist, other=other)


@triton.jit
def store_wide(block_ptr, exist, values, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block of (REPEAT, LANES, VECTOR), as :func:`load_wide` reads it."""
    # Streamed out, so that the gradient does not push rows that are still to be read from the cache.
    values = values.to(block_ptr.dtype.element_ty)
    if exist is None:
        pointers = flat_pointers(block_ptr, REPEAT, LANES * VECTOR)
        tl.store(pointers, values.reshape(REPEAT, LANES * VECTOR), cache_modifier=".cs")
    else:
        pointers = lane_pointers(block_ptr, REPEAT, LANES, VECTOR)
        tl.store(pointers, values, mask=exist, cache_modifier=".cs")
