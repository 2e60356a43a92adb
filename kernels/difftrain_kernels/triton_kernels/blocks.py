"""Blocks of a streamed row: ``REPEAT * LANES * VECTOR`` logits, in accesses of 16 bytes.

The bulk of a row begins at its first 16-byte boundary. What stands before it is the head, what
does not fill the last block the tail.
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
def load_wide(block_ptr, REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A full block as (REPEAT, LANES, VECTOR) fp32."""
    if block_ptr.dtype.element_ty == tl.bfloat16:
        # Two neighbours in one word: a shift and an AND, where the compiler's own way takes three.
        words_ptr = block_ptr.to(tl.pointer_type(tl.uint32))
        words = tl.load(lane_pointers(tl.multiple_of(words_ptr, 16), REPEAT, LANES, VECTOR // 2))
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(REPEAT, LANES, VECTOR)
    else:
        return tl.load(lane_pointers(block_ptr, REPEAT, LANES, VECTOR)).to(tl.float32)
