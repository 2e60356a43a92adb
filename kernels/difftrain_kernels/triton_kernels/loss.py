"""The losses of all rows, and with them their gradient in the same pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, Terms
from . import tiles
from .blocks import row_pointer
from .device import on_device
from .gradient import gradient_buffer
from .row_statistics import RowStatistics, empty_statistics, store_ignored
from .scores import scaling_of
from .small_rows import rows_of_program, score_small_rows, write_small_gradient
from .spacing import spacing_of_rows
from .streamed_rows import score_row, write_gradient_row, zero_row
from .term_arguments import scoring_arguments
from .upstream import upstream_of_rows
from .weights import is_left_out, load_penalty, load_token_weight, penalty_arguments


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _loss_kernel(
    logits_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, spacing, terms,
    N_COLUMNS: tl.constexpr, PENALTIES_ON_DEVICE: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + row).to(tl.int64)
    token_weight = load_token_weight(row, True, terms)
    if is_left_out(y, token_weight, ignore_index, terms):
        store_ignored(case_ptr, statistics_ptr, row, n_rows, N_COLUMNS)
    else:
        score_row(
            row_pointer(logits_ptr, row, spacing, ALIGNED), case_ptr, statistics_ptr, row, n_rows,
            y, tl.load(x_ptr + row), mask_id, token_weight,
            load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE),
            vocab_size, scaling_of(terms), terms, REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _small_loss_kernel(
    logits_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, pk, pm, mask_id, ignore_index, n_rows,
    vocab_size, spacing, terms,
    PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    token_weight = load_token_weight(row, inside, terms)
    score_small_rows(
        logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x,
        is_left_out(y, token_weight, ignore_index, terms), mask_id, token_weight,
        load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE),
        vocab_size, spacing, scaling_of(terms), terms, BLOCK_V,
    )  # fmt: skip


def launch_loss(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor = 1.0, pm: float | Tensor = 1.0,
    ignore_index: int = -1, *, terms: Terms = PLAIN, tile: tiles.Tile | None = None,
) -> RowStatistics:  # fmt: skip
    """Losses of all rows. Reads the logits once.

    Args:
        logits: (N, V) fp32, bf16 or fp16, last stride 1, or (B, T, V) with B * T = N, where rows need not
            be evenly spaced; not modified. ``y``, ``x``: (N,) integers.
        pk, pm: numbers, or 0-d float tensors on the device.
        terms: what the loss has beyond them; the token weights are N, of any shape.
        tile: how to cut rows; by default the one for V.
    """
    n, vocab_size = y.shape[0], logits.shape[-1]
    tile = tile or tiles.choose_tile(logits)
    statistics = empty_statistics(n, logits.device, terms)
    if n == 0:
        return statistics
    kernel = _small_loss_kernel if tile.rows else _loss_kernel
    with on_device(logits):
        kernel[(-(-n // (tile.rows or 1)),)](
            logits_ptr=logits, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            mask_id=mask_id, ignore_index=ignore_index, n_rows=n,
            vocab_size=vocab_size, spacing=spacing_of_rows(logits), terms=scoring_arguments(terms, n),
            **_columns_argument(statistics, tile),
            **penalty_arguments(pk, pm, logits.device), **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return statistics


def _columns_argument(statistics: RowStatistics, tile: tiles.Tile) -> dict:
    """How many columns a program fills whose one row does not count."""
    return {} if tile.rows else {"N_COLUMNS": len(statistics.columns)}


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, made_for_ptr, pk, pm, upstream, divisor,
    mask_id, ignore_index, n_rows, vocab_size, spacing, gradient_spacing, terms,
    N_COLUMNS: tl.constexpr, PENALTIES_ON_DEVICE: tl.constexpr,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = row_pointer(logits_ptr, row, spacing, ALIGNED)
    gradient_row_ptr = row_pointer(gradient_ptr, row, gradient_spacing, ALIGNED)
    upstream, is_made = upstream_of_rows(upstream, made_for_ptr, row, True)
    y = tl.load(y_ptr + row).to(tl.int64)
    token_weight = load_token_weight(row, True, terms)
    if is_left_out(y, token_weight, ignore_index, terms):
        store_ignored(case_ptr, statistics_ptr, row, n_rows, N_COLUMNS)
        if is_made:
            zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
    else:
        scaling = scaling_of(terms)
        target, shift, rest, per_total, target_term, uniform = score_row(
            row_ptr, case_ptr, statistics_ptr, row, n_rows, y, tl.load(x_ptr + row), mask_id, token_weight,
            load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE),
            vocab_size, scaling, terms, REPEAT, LANES, VECTOR, ALIGNED,
        )  # fmt: skip
        if is_made:
            write_gradient_row(
                row_ptr, gradient_row_ptr, target, mask_id, shift, rest, per_total * upstream / divisor,
                target_term * upstream / divisor, uniform * upstream / divisor, vocab_size, scaling, terms,
                REPEAT, LANES, VECTOR, ALIGNED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "ignore_index", "n_rows"])
def _small_loss_and_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, x_ptr, case_ptr, statistics_ptr, made_for_ptr, pk, pm, upstream, divisor,
    mask_id, ignore_index, n_rows, vocab_size, spacing, gradient_spacing, terms,
    PENALTIES_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, inside, y = rows_of_program(y_ptr, n_rows, ROWS)
    x = tl.load(x_ptr + row, mask=inside, other=0)
    token_weight = load_token_weight(row, inside, terms)
    left_out = is_left_out(y, token_weight, ignore_index, terms)
    scaling = scaling_of(terms)
    values, target, target_logit, shift, rest, per_total, target_term, uniform = score_small_rows(
        logits_ptr, case_ptr, statistics_ptr, row, inside, n_rows, y, x, left_out, mask_id, token_weight,
        load_penalty(pk, PENALTIES_ON_DEVICE), load_penalty(pm, PENALTIES_ON_DEVICE),
        vocab_size, spacing, scaling, terms, BLOCK_V,
    )  # fmt: skip
    upstream, is_made = upstream_of_rows(upstream, made_for_ptr, row, inside)
    if is_made:
        # In place, every thread must have read the target's and [MASK]'s logits first.
        tl.debug_barrier()
        write_small_gradient(
            gradient_ptr, row, inside, values, target, target_logit, mask_id, shift, rest,
            per_total * upstream / divisor, target_term * upstream / divisor, uniform * upstream / divisor,
            left_out, vocab_size, gradient_spacing, scaling, terms, BLOCK_V,
        )  # fmt: skip


def launch_loss_and_gradient(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: float | Tensor = 1.0, pm: float | Tensor = 1.0,
    ignore_index: int = -1, *, upstream: float | Tensor, divisor: float, terms: Terms = PLAIN,
    made_for_out: Tensor | None = None, gradient_out: Tensor | None = None, tile: tiles.Tile | None = None,
) -> tuple[RowStatistics, Tensor]:  # fmt: skip
    """Losses of all rows and the gradient of sum(row losses) * upstream / divisor.

    Args:
        upstream: a number; or the state of a prediction, (5,) fp32 as ``upstream.py`` has it. Where that
            expects nothing, no gradient is written.
        made_for_out: with a prediction, (N,) fp32: what each row's gradient was made for, NaN for none.
        gradient_out: where the gradient goes, of the logits' shape, dtype and phase (see
            :func:`empty_gradient_like`); the logits themselves to overwrite them. New by default.

    The other arguments are those of :func:`launch_loss`. Reads the logits once from memory and
    writes the gradient once.
    """
    n, vocab_size = y.shape[0], logits.shape[-1]
    tile = tile or tiles.choose_tile(logits)
    statistics = empty_statistics(n, logits.device, terms)
    gradient = gradient_buffer(logits, gradient_out)
    if n == 0:
        return statistics, gradient
    kernel = _small_loss_and_gradient_kernel if tile.rows else _loss_and_gradient_kernel
    with on_device(logits):
        kernel[(-(-n // (tile.rows or 1)),)](
            logits_ptr=logits, gradient_ptr=gradient, y_ptr=y.contiguous(), x_ptr=x.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            made_for_ptr=made_for_out, upstream=upstream if made_for_out is not None else float(upstream),
            divisor=float(divisor), mask_id=mask_id, ignore_index=ignore_index, n_rows=n, vocab_size=vocab_size,
            spacing=spacing_of_rows(logits), gradient_spacing=spacing_of_rows(gradient),
            terms=scoring_arguments(terms, n), **_columns_argument(statistics, tile),
            **penalty_arguments(pk, pm, logits.device), **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return statistics, gradient
