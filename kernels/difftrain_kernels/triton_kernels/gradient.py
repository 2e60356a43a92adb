"""The gradient from saved statistics, and the rows it is written to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, Terms
from . import tiles
from .blocks import row_pointer
from .device import on_device
from .row_statistics import PER_TOTAL, REST, SHIFT, RowStatistics
from .scores import scaling_of
from .small_rows import small_tile, write_small_gradient
from .spacing import row_offset, spacing_of_rows
from .streamed_rows import write_gradient_row, zero_row
from .term_arguments import gradient_arguments
from .upstream import learn_upstream, made_for_of_rows
from .weights import IGNORED, target_column


@triton.jit(do_not_specialize=["forbidden", "n_rows"])
def _gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, case_ptr, statistics_ptr, upstream_ptr, made_for_ptr, state_ptr, stated, divisor,
    forbidden, n_rows, vocab_size, spacing, gradient_spacing, upstream_stride, terms,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    if state_ptr is not None:
        learn_upstream(state_ptr, made_for_ptr, upstream_ptr, upstream_stride)
    # Few programs that take many rows: where nothing is left to do, a launch costs microseconds.
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        if upstream != made_for_of_rows(stated, made_for_ptr, row, True):  # always, where that is NaN
            row_ptr = row_pointer(logits_ptr, row, spacing, ALIGNED)
            gradient_row_ptr = row_pointer(gradient_ptr, row, gradient_spacing, ALIGNED)
            if tl.load(case_ptr + row) == IGNORED:
                zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
            else:
                y = tl.load(y_ptr + row).to(tl.int64)
                target, _ = target_column(y, vocab_size, forbidden, terms)
                base = statistics_ptr + row
                factor = tl.load(base + PER_TOTAL * n_rows) * upstream / divisor
                target_term, uniform = 0.0, 0.0
                if terms.columns.TARGET_TERM is not None:
                    target_term = tl.load(base + terms.columns.TARGET_TERM * n_rows) * upstream / divisor
                if terms.columns.UNIFORM is not None:
                    uniform = tl.load(base + terms.columns.UNIFORM * n_rows) * upstream / divisor
                write_gradient_row(
                    row_ptr, gradient_row_ptr, target, forbidden,
                    tl.load(base + SHIFT * n_rows), tl.load(base + REST * n_rows), factor, target_term, uniform,
                    vocab_size, scaling_of(terms), terms, REPEAT, LANES, VECTOR, ALIGNED,
                )  # fmt: skip


@triton.jit(do_not_specialize=["forbidden", "n_rows"])
def _small_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, case_ptr, statistics_ptr, upstream_ptr, made_for_ptr, state_ptr, stated, divisor,
    forbidden, n_rows, vocab_size, spacing, gradient_spacing, upstream_stride, terms,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    if state_ptr is not None:
        learn_upstream(state_ptr, made_for_ptr, upstream_ptr, upstream_stride)
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = tl.full([], start, tl.int64) + tl.arange(0, ROWS)
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row < n_rows, other=0.0)
        inside = row < n_rows
        inside = inside & (upstream != made_for_of_rows(stated, made_for_ptr, row, inside))
        if tl.max(inside.to(tl.int32), axis=0) > 0:
            y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
            target, _ = target_column(y, vocab_size, forbidden, terms)
            left_out = tl.load(case_ptr + row, mask=inside, other=IGNORED) == IGNORED
            base = statistics_ptr + row
            shift = tl.load(base + SHIFT * n_rows, mask=inside, other=0.0)
            rest = tl.load(base + REST * n_rows, mask=inside, other=0.0)
            factor = tl.load(base + PER_TOTAL * n_rows, mask=inside, other=0.0) * upstream / divisor
            target_term, uniform = 0.0, 0.0
            if terms.columns.TARGET_TERM is not None:
                target_term = tl.load(base + terms.columns.TARGET_TERM * n_rows, mask=inside, other=0.0)
                target_term = target_term * upstream / divisor
            if terms.columns.UNIFORM is not None:
                uniform = tl.load(base + terms.columns.UNIFORM * n_rows, mask=inside, other=0.0)
                uniform = uniform * upstream / divisor
            pointers, exists, _ = small_tile(logits_ptr, row, inside, spacing, vocab_size, BLOCK_V)
            values = tl.load(pointers, mask=exists, other=float("-inf")).to(tl.float32)
            scaling = scaling_of(terms)
            target_logit = 0.0
            if terms.softcap is not None:
                row_ptr = logits_ptr + row_offset(row, spacing)
                target_logit = tl.load(row_ptr + target, mask=inside & (target >= 0), other=0.0).to(
                    tl.float32
                )
                # In place, every thread must have read it first.
                tl.debug_barrier()
            write_small_gradient(
                gradient_ptr, row, inside, values, target, target_logit, forbidden, shift, rest, factor, target_term,
                uniform, left_out, vocab_size, gradient_spacing, scaling, terms, BLOCK_V,
            )  # fmt: skip


def launch_gradient(
    logits: Tensor, y: Tensor, statistics: RowStatistics, upstream: Tensor, *, divisor: float,
    stated: float | Tensor = float("nan"), state: Tensor | None = None, terms: Terms = PLAIN, mask_id: int = -1, gradient_out: Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:  # fmt: skip
    """The gradient from saved statistics, bit for bit what the pass with the loss would have made.

    Args:
        logits: as they were when the statistics were made.
        upstream: 0-d, or (N,) with any stride (0 too): the gradient of each row's loss times divisor.
        stated: rows whose upstream equals this, a number or (N,) fp32, are left as ``gradient_out`` has
            them, and neither read nor written. The comparison happens on the device. By default no row.
        state: the prediction that ``stated`` (N,) came from; learns what arrived.
        terms: those the statistics were made with.
        mask_id: the column that they may forbid; of a slice, relative to its first, and outside of it
            where another slice has [MASK].

    Otherwise reads the logits once and writes the gradient once.
    """
    if upstream.dtype != torch.float32:
        upstream = upstream.to(torch.float32)
    made_for, stated = (stated, float("nan")) if isinstance(stated, Tensor) else (None, float(stated))
    n, vocab_size = y.shape[0], logits.shape[-1]
    tile = tile or tiles.choose_tile(logits)
    gradient = gradient_buffer(logits, gradient_out)
    if n == 0:
        return gradient
    kernel = _small_gradient_kernel if tile.rows else _gradient_kernel
    with on_device(logits):
        kernel[(min(-(-n // (tile.rows or 1)), tiles.max_programs(tile)),)](
            logits_ptr=logits, gradient_ptr=gradient, y_ptr=y.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            upstream_ptr=upstream, made_for_ptr=made_for, state_ptr=state, stated=stated, divisor=float(divisor),
            forbidden=mask_id if terms.forbid_mask else None, n_rows=n, vocab_size=vocab_size,
            spacing=spacing_of_rows(logits), gradient_spacing=spacing_of_rows(gradient),
            upstream_stride=upstream.stride(0) if upstream.dim() else 0,
            terms=gradient_arguments(terms), **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return gradient


def have_one_phase(rows: Tensor, others: Tensor) -> bool:
    """Whether rows of one dtype start at the same 16-byte phase, each as its counterpart."""
    if rows.stride() == others.stride():
        return (rows.data_ptr() - others.data_ptr()) % 16 == 0
    return tiles.row_phase(rows) == tiles.row_phase(others)


def gradient_buffer(logits: Tensor, gradient_out: Tensor | None) -> Tensor:
    """``gradient_out``, checked, or else new rows."""
    if gradient_out is None:
        return empty_gradient_like(logits)
    if (
        gradient_out.shape != logits.shape
        or gradient_out.dtype != logits.dtype
        or gradient_out.stride(-1) != 1
    ):
        raise ValueError(
            f"gradient_out must have shape {tuple(logits.shape)}, dtype {logits.dtype} and last stride 1, "
            f"got {tuple(gradient_out.shape)}, {gradient_out.dtype}, strides {gradient_out.stride()}"
        )
    if not have_one_phase(gradient_out, logits):
        raise ValueError(
            f"gradient_out must start its rows at the 16-byte phase {tiles.row_phase(logits)} of the logits, "
            f"got {tiles.row_phase(gradient_out)}"
        )
    return gradient_out


def empty_gradient_like(logits: Tensor, phase: int | None = None) -> Tensor:
    """Uninitialised rows like the logits', (N, V) or (B, T, V), that start at the same 16-byte phase.

    Contiguous where the logits are. Loads and stores of one row can only both be 16 bytes wide
    where the two start alike. ``phase`` is of the first row, for logits that have no address.
    """
    if phase is None:
        if logits.is_contiguous() and logits.data_ptr() % 16 == 0:
            buffer = torch.empty_like(logits)
            if buffer.stride() == logits.stride():  # of dimensions of size 1 it may not be
                return buffer
        phase = tiles.row_phase(logits)[0]
    strides, size = [1], logits.shape[-1]
    for length, stride in zip(logits.shape[-2::-1], logits.stride()[-2::-1], strict=True):
        # The least that keeps rows apart and moves as far along 16 bytes as the logits' does.
        strides.insert(0, size + (stride - size) % tiles.vector_size(logits.dtype))
        size = length * strides[0]
    buffer = torch.empty(phase + size, dtype=logits.dtype, device=logits.device)
    return buffer.as_strided(logits.shape, strides, phase)
