"""Small rows: one program holds several in registers, scores them, and writes their gradient."""

import triton
import triton.language as tl

from .row_statistics import FLOOR, LOG2E, gradient_of, store_statistics
from .weights import IGNORED, kind_and_weight, target_column


@triton.jit
def rows_of_program(y_ptr, n_rows, ROWS: tl.constexpr):
    """The rows of this program, which of them exist, and their targets."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    return row, inside, tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)


@triton.jit
def small_tile(ptr, row, inside, stride, vocab_size, BLOCK_V: tl.constexpr):
    """Pointers of a block of rows, (ROWS, BLOCK_V), which of them exist, and their columns (1, BLOCK_V)."""
    column = tl.arange(0, BLOCK_V)[None, :]
    return (ptr + row * stride)[:, None] + column, inside[:, None] & (column < vocab_size), column


@triton.jit
def read_small_rows(
    logits_ptr, row, inside, target, mask_id, vocab_size, logits_stride, BLOCK_V: tl.constexpr
):
    """A block of rows, (ROWS, BLOCK_V) fp32, and all that they say; a negative id is none."""
    pointers, exists, column = small_tile(logits_ptr, row, inside, logits_stride, vocab_size, BLOCK_V)
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
def score_small_rows(
    logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, is_counted, mask_id, pk, pm,
    vocab_size, logits_stride, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics of a block of rows, and their logits, (ROWS, BLOCK_V) fp32."""
    target, is_label = target_column(y, vocab_size)
    values, top, shift, rest, predicted, target_logit, mask_logit = read_small_rows(
        logits_ptr, row, inside, target, mask_id, vocab_size, logits_stride, BLOCK_V
    )
    says_mask = predicted == mask_id
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    case = kind * 3 + tl.where(says_mask, 0, tl.where(predicted == y, 1, 2))
    case = tl.where(is_counted, case, IGNORED)
    per_total = store_statistics(
        case_ptr, statistics_ptr, row, n_rows, inside, case, weight, target_logit, mask_logit, top, shift, rest, is_label
    )  # fmt: skip
    return values, target, shift, rest, per_total


@triton.jit
def write_small_gradient(
    gradient_ptr, row, inside, values, target, shift, rest, factor, is_counted, vocab_size, gradient_stride,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of rows of the gradient, from the logits that the program holds."""
    pointers, exists, column = small_tile(gradient_ptr, row, inside, gradient_stride, vocab_size, BLOCK_V)
    gradient = gradient_of(values, shift[:, None], factor[:, None])
    gradient = tl.where(column == target[:, None], (-rest * factor)[:, None], gradient)
    gradient = tl.where(is_counted[:, None], gradient, 0.0)
    tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)
