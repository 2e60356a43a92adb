"""The gradient from saved statistics, and the rows it is written to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import row_pointer
from .device import on_device
from .row_statistics import PER_TOTAL, REST, SHIFT, RowStatistics
from .small_rows import small_tile, write_small_gradient
from .streamed_rows import write_gradient_row, zero_row
from .weights import IGNORED, target_column


@triton.jit(do_not_specialize=["n_rows"])
def _gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, case_ptr, statistics_ptr, upstream_ptr, stated, divisor,
    n_rows, vocab_size, logits_stride, gradient_stride, upstream_stride,
    REPEAT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # Few programs that take many rows: where nothing is left to do, a launch costs microseconds.
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        if upstream != stated:  # always, where NaN is stated
            row_ptr = row_pointer(logits_ptr, row, logits_stride, ALIGNED)
            gradient_row_ptr = row_pointer(gradient_ptr, row, gradient_stride, ALIGNED)
            if tl.load(case_ptr + row) == IGNORED:
                zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)
            else:
                y = tl.load(y_ptr + row).to(tl.int64)
                target, _ = target_column(y, vocab_size)
                base = statistics_ptr + row
                factor = tl.load(base + PER_TOTAL * n_rows) * upstream / divisor
                write_gradient_row(
                    row_ptr, gradient_row_ptr, target,
                    tl.load(base + SHIFT * n_rows), tl.load(base + REST * n_rows), factor, vocab_size,
                    REPEAT, LANES, VECTOR, ALIGNED,
                )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _small_gradient_kernel(
    logits_ptr, gradient_ptr, y_ptr, case_ptr, statistics_ptr, upstream_ptr, stated, divisor,
    n_rows, vocab_size, logits_stride, gradient_stride, upstream_stride,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = tl.full([], start, tl.int64) + tl.arange(0, ROWS)
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row < n_rows, other=0.0)
        inside = (row < n_rows) & (upstream != stated)
        if tl.max(inside.to(tl.int32), axis=0) > 0:
            y = tl.load(y_ptr + row, mask=inside, other=0).to(tl.int64)
            target, _ = target_column(y, vocab_size)
            is_counted = tl.load(case_ptr + row, mask=inside, other=IGNORED) != IGNORED
            base = statistics_ptr + row
            shift = tl.load(base + SHIFT * n_rows, mask=inside, other=0.0)
            rest = tl.load(base + REST * n_rows, mask=inside, other=0.0)
            factor = tl.load(base + PER_TOTAL * n_rows, mask=inside, other=0.0) * upstream / divisor
            pointers, exists, _ = small_tile(logits_ptr, row, inside, logits_stride, vocab_size, BLOCK_V)
            values = tl.load(pointers, mask=exists, other=float("-inf")).to(tl.float32)
            write_small_gradient(
                gradient_ptr, row, inside, values, target, shift, rest, factor,
                is_counted, vocab_size, gradient_stride, BLOCK_V,
            )  # fmt: skip


def launch_gradient(
    logits: Tensor, y: Tensor, statistics: RowStatistics, upstream: Tensor, *, divisor: float,
    stated: float = float("nan"), gradient_out: Tensor | None = None, tile: tiles.Tile | None = None,
) -> Tensor:  # fmt: skip
    """The gradient from saved statistics, bit for bit what the pass with the loss would have made.

    Args:
        logits: as they were when the statistics were made.
        upstream: 0-d, or (N,) with any stride (0 too): the gradient of each row's loss times divisor.
        stated: rows whose upstream equals this are left as ``gradient_out`` has them, and neither
            read nor written. The comparison happens on the device. By default no row.

    Otherwise reads the logits once and writes the gradient once.
    """
    upstream = upstream.to(torch.float32)
    n, vocab_size = logits.shape
    tile = tile or tiles.choose_tile(vocab_size)
    gradient = gradient_buffer(logits, gradient_out)
    if n == 0:
        return gradient
    kernel = _small_gradient_kernel if tile.rows else _gradient_kernel
    with on_device(logits):
        kernel[(min(triton.cdiv(n, tile.rows or 1), tiles.MAX_PROGRAMS),)](
            logits_ptr=logits, gradient_ptr=gradient, y_ptr=y.contiguous(),
            case_ptr=statistics.case, statistics_ptr=statistics.columns,
            upstream_ptr=upstream, stated=float(stated), divisor=float(divisor),
            n_rows=n, vocab_size=vocab_size, logits_stride=logits.stride(0),
            gradient_stride=gradient.stride(0), upstream_stride=upstream.stride(0) if upstream.dim() else 0,
            **tiles.tile_arguments(logits, tile),
        )  # fmt: skip
    return gradient


def gradient_buffer(logits: Tensor, gradient_out: Tensor | None) -> Tensor:
    """``gradient_out``, checked, or else new rows."""
    if gradient_out is None:
        return empty_gradient_like(logits)
    if (
        gradient_out.shape != logits.shape
        or gradient_out.dtype != logits.dtype
        or gradient_out.stride(1) != 1
    ):
        raise ValueError(
            f"gradient_out must have shape {tuple(logits.shape)}, dtype {logits.dtype} and last stride 1, "
            f"got {tuple(gradient_out.shape)}, {gradient_out.dtype}, strides {gradient_out.stride()}"
        )
    if tiles.row_phase(gradient_out) != tiles.row_phase(logits):
        raise ValueError(
            f"gradient_out must start its rows at the 16-byte phase {tiles.row_phase(logits)} of the logits, "
            f"got {tiles.row_phase(gradient_out)}"
        )
    return gradient_out


def empty_gradient_like(logits: Tensor, phase: int | None = None) -> Tensor:
    """Uninitialised (N, V) rows that start at the same 16-byte phase as the logits' rows.

    Contiguous where the logits are. Loads and stores of one row can only both be 16 bytes wide
    where the two start alike. ``phase`` is of the first row, for logits that have no address.
    """
    n, vocab_size = logits.shape
    if phase is None:
        phase, _ = tiles.row_phase(logits)
    stride = vocab_size + (logits.stride(0) - vocab_size) % tiles.vector_size(logits.dtype)
    buffer = torch.empty(phase + n * stride, dtype=logits.dtype, device=logits.device)
    return buffer.as_strided((n, vocab_size), (stride, 1), phase)
