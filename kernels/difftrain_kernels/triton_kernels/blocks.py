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
    """The numbers of a block's vectors, (REPEAT, LANES, 1)."""
    vector = block * (REPEAT * LANES) + tl.arange(0, REPEAT)[:, None, None] * LANES
    return vector + tl.arange(0, LANES)[None, :, None]


@triton.jit
def are_taken(vector, n_vectors, without, and_without):
    """Whether the row has these vectors, and they are not one of two that are left out; ``n_vectors``: none is."""
    return (vector < n_vectors) & (vector != without) & (vector != and_without)


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
def _pointers(block_ptr, REPEAT: tl.constexpr, WIDTH: tl.constexpr):
    """A block's pointers, (REPEAT, WIDTH): of three dimensions, Triton 3.6 gives the first to a warp's lanes, which
    then share their sums by shuffles. The repeat comes last: it is a constant that fits into the instruction."""
    return block_ptr + tl.arange(0, WIDTH)[None, :] + tl.arange(0, REPEAT)[:, None] * WIDTH


@triton.jit
def _taken(
    block, n_vectors, without, and_without, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """The mask of these pointers, with WIDTH elements to a vector: one division, by which the compiler sees that
    all elements of a vector share it, so that a masked access stays 16 bytes wide."""
    vector = block * (REPEAT * LANES) + tl.arange(0, REPEAT)[:, None] * LANES
    vector += tl.arange(0, LANES * WIDTH)[None, :] // WIDTH
    return are_taken(vector, n_vectors, without, and_without)


@triton.jit
def _as_words(block_ptr):
    """Two neighbours of bf16 in one word: a shift and an AND, where the compiler's own way takes three."""
    return tl.multiple_of(block_ptr.to(tl.pointer_type(tl.uint32)), 16)


@triton.jit
def _from_words(words, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    words = words.reshape(REPEAT, LANES, VECTOR // 2)
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.join(low, high).reshape(REPEAT, LANES, VECTOR)


@triton.jit
def load_block(block_ptr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A full block as (REPEAT, LANES, VECTOR) fp32."""
    if block_ptr.dtype.element_ty == tl.bfloat16:
        words = tl.load(_pointers(_as_words(block_ptr), REPEAT, LANES * VECTOR // 2))
        return _from_words(words, REPEAT, LANES, VECTOR)
    else:
        values = tl.load(_pointers(block_ptr, REPEAT, LANES * VECTOR))
        return values.reshape(REPEAT, LANES, VECTOR).to(tl.float32)


@triton.jit
def load_some(
    block_ptr, block, n_vectors, without, and_without,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same of the vectors that :func:`are_taken`; -inf in place of the others."""
    if block_ptr.dtype.element_ty == tl.bfloat16:
        mask = _taken(block, n_vectors, without, and_without, REPEAT, LANES, VECTOR // 2)
        pointers = _pointers(_as_words(block_ptr), REPEAT, LANES * VECTOR // 2)
        return _from_words(tl.load(pointers, mask=mask, other=0xFF80FF80), REPEAT, LANES, VECTOR)
    else:
        mask = _taken(block, n_vectors, without, and_without, REPEAT, LANES, VECTOR)
        values = tl.load(_pointers(block_ptr, REPEAT, LANES * VECTOR), mask=mask, other=float("-inf"))
        return values.reshape(REPEAT, LANES, VECTOR).to(tl.float32)


# Streamed out, so that the gradient does not push rows that are still to be read from the cache.


@triton.jit
def store_block(block_ptr, values, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A full block of (REPEAT, LANES, VECTOR)."""
    values = values.to(block_ptr.dtype.element_ty).reshape(REPEAT, LANES * VECTOR)
    tl.store(_pointers(block_ptr, REPEAT, LANES * VECTOR), values, cache_modifier=".cs")


@triton.jit
def store_some(
    block_ptr, block, n_vectors, values, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Its vectors that the row has."""
    values = values.to(block_ptr.dtype.element_ty).reshape(REPEAT, LANES * VECTOR)
    mask = _taken(block, n_vectors, n_vectors, n_vectors, REPEAT, LANES, VECTOR)
    tl.store(_pointers(block_ptr, REPEAT, LANES * VECTOR), values, mask=mask, cache_modifier=".cs")
