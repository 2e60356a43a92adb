"""Where the maximum of a streamed row came first; asked only of rows whose answer hangs on it."""

import triton
import triton.language as tl

from .blocks import block_offsets


@triton.jit
def first_index(
    row_ptr, head, block, value, forbidden, vocab_size, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The first column of a block (-1: the head) that holds ``value``; V if none does."""
    column = head + block * (REPEAT * LANES * VECTOR) + block_offsets(REPEAT, LANES, VECTOR)
    inside = (column >= 0) & (column < vocab_size)
    if terms.FORBID_MASK:
        inside = inside & (column != forbidden)
    values = tl.load(row_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    found = tl.where(inside & (values == value), column, vocab_size)
    return tl.min(tl.min(tl.min(found, axis=2), axis=1), axis=0)


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
