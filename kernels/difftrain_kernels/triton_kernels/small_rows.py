"""Small rows: one program holds several in registers, scores them, and writes their gradient."""

import triton
import triton.language as tl

from .row_statistics import gradient_of, store_statistics, target_gradient_of
from .scores import FAINT, exponents_of, shift_of, units_of
from .spacing import row_offset
from .weights import IGNORED, kind_and_weight, target_column


@triton.jit
def rows_of_program(y_ptr, n_rows, ROWS: tl.constexpr):
    """The rows of this program, which of them exist, and their targets."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    return row, inside, tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)


@triton.jit
def small_tile(ptr, row, inside, spacing, vocab_size, BLOCK_V: tl.constexpr):
    """Pointers of a block of rows, (ROWS, BLOCK_V), which of them exist, and their columns (1, BLOCK_V)."""
    column = tl.arange(0, BLOCK_V)[None, :]
    return (
        (ptr + row_offset(row, spacing))[:, None] + column,
        inside[:, None] & (column < vocab_size),
        column,
    )


@triton.jit
def read_small_rows(
    logits_ptr, row, inside, target, mask_id, forbidden, vocab_size, spacing, scaling, terms, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A block of rows, (ROWS, BLOCK_V) fp32, and all that they say; a negative id is none."""
    pointers, exists, column = small_tile(logits_ptr, row, inside, spacing, vocab_size, BLOCK_V)
    values = tl.load(pointers, mask=exists, other=float("-inf")).to(tl.float32)
    row_ptr = logits_ptr + row_offset(row, spacing)
    target_logit = tl.load(row_ptr + target, mask=inside & (target >= 0), other=float("-inf")).to(
        tl.float32
    )
    # A block, since the interpreter of Triton 3.9 makes no mask of a block and one bool.
    mask_column = tl.zeros_like(target) + mask_id
    mask_logit = tl.load(row_ptr + mask_column, mask=inside & (mask_column >= 0), other=0.0).to(tl.float32)
    takes_part = exists
    if terms.FORBID_MASK:
        takes_part = takes_part & (column != forbidden)
        values = tl.where(takes_part, values, float("-inf"))

    is_nan = values != values
    numbers = tl.where(is_nan, float("-inf"), values)
    top = tl.max(numbers, axis=1)
    shift = shift_of(tl.maximum(top, scaling.floor), scaling, terms)
    exponents = exponents_of(units_of(values, scaling, terms), shift[:, None], scaling)
    exps = tl.exp2(exponents)
    if terms.softcap is not None:
        exps = tl.where(takes_part, exps, 0.0)  # a cap makes a number of -inf
    exps = tl.where(column == target[:, None], 0.0, exps)
    rest = tl.sum(exps, axis=1)
    exponent_sum, moment = 0.0, 0.0
    if terms.label_smoothing is not None:
        exponent_sum = tl.sum(tl.where(takes_part, exponents, 0.0), axis=1)
    if terms.ENTROPY:
        moment = tl.sum(exps * tl.maximum(exponents, FAINT), axis=1)
    first_top = tl.min(tl.where(exists & (numbers == top[:, None]), column, BLOCK_V), axis=1)
    first_nan = tl.min(tl.where(is_nan, column, BLOCK_V), axis=1)
    has_nan = first_nan < BLOCK_V
    predicted = tl.where(has_nan, first_nan, first_top)
    top = tl.where(has_nan, float("nan"), top)
    return values, top, shift, rest, exponent_sum, moment, predicted, target_logit, mask_logit


@triton.jit
def score_small_rows(
    logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, left_out, mask_id, token_weight, pk, pm,
    vocab_size, spacing, scaling, terms, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics of a block of rows, and their logits, (ROWS, BLOCK_V) fp32."""
    target, is_label = target_column(y, vocab_size, mask_id, terms)
    is_read = inside
    if terms.token_weights is not None:
        is_read = tl.where(left_out, False, inside)
    values, top, shift, rest, exponent_sum, moment, predicted, target_logit, mask_logit = read_small_rows(
        logits_ptr, row, is_read, target, mask_id, mask_id, vocab_size, spacing, scaling, terms, BLOCK_V
    )
    says_mask = predicted == mask_id
    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)
    case = kind * 3 + tl.where(says_mask, 0, tl.where(predicted == y, 1, 2))
    case = tl.where(left_out, IGNORED, case)
    target_unit = target_logit  # -inf where there is no target
    mask_unit = units_of(mask_logit, scaling, terms)
    if terms.softcap is not None:
        target_unit = tl.where(is_label, units_of(target_logit, scaling, terms), float("-inf"))
    if terms.FORBID_MASK:
        mask_unit = float("-inf")
    per_total, target_term, uniform = store_statistics(
        case_ptr, statistics_ptr, row, n_rows, inside, kind, case, weight, y, is_label, mask_id, token_weight, pk, pm,
        target_unit, mask_unit, units_of(top, scaling, terms), shift, rest, exponent_sum, moment, vocab_size, scaling, terms,
    )  # fmt: skip
    return values, target, target_logit, shift, rest, per_total, target_term, uniform


@triton.jit
def write_small_gradient(
    gradient_ptr, row, inside, values, target, target_logit, forbidden, shift, rest, factor, target_term, uniform,
    left_out, vocab_size, spacing, scaling, terms, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of rows of the gradient, from the logits that the program holds."""
    pointers, exists, column = small_tile(gradient_ptr, row, inside, spacing, vocab_size, BLOCK_V)
    if terms.columns.UNIFORM is not None:
        uniform = uniform[:, None]
    gradient = gradient_of(values, shift[:, None], factor[:, None], uniform, scaling, terms)
    of_target = target_gradient_of(target_logit, rest, factor, target_term, scaling, terms)
    gradient = tl.where(column == target[:, None], of_target[:, None], gradient)
    if terms.FORBID_MASK:
        gradient = tl.where(column == forbidden, 0.0, gradient)
    gradient = tl.where(left_out[:, None], 0.0, gradient)
    tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)
