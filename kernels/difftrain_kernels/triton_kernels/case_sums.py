"""Sums of the row statistics over the cells of the case table, in two levels: blocks of rows, then the blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, Terms
from . import tiles
from .device import on_device
from .row_statistics import GAP, NLL, RowStatistics
from .term_arguments import table_arguments
from .weights import IGNORED

# Rows whose sums one program adds at once, and blocks that the last program adds at once: fixed, since
# the order of additions hangs on them. 262144 rows are one step of each level.
BLOCK = 512
# Places among the sums of a block.
NLL_SUMS = tl.constexpr(0)  # nine cells
GAP_SUMS = tl.constexpr(9)  # three kinds
WEIGHTED_SUMS = tl.constexpr(12)  # nine cells; this and what follows only where terms change the table
SMOOTHING_SUMS = tl.constexpr(21)  # nine cells
Z_SUM = tl.constexpr(30)
N_SUMS, N_SUMS_WITH_TERMS = 12, 31
# An address more or less aligned must not change how a block is laid out over threads, and so its order.
POINTERS = ["case_ptr", "statistics_ptr", "counts_ptr", "sums_ptr", "total_counts_ptr", "total_sums_ptr"]


@triton.jit(do_not_specialize=["n_rows", "n_blocks"], do_not_specialize_on_alignment=POINTERS[:4])
def _case_sums_kernel(
    case_ptr, statistics_ptr, counts_ptr, sums_ptr, n_rows, n_blocks, terms,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts and sums of each block of rows. A block is added alike whichever program takes it."""
    cell = tl.arange(0, 16)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        row = tl.full([], block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = row < n_rows
        case = tl.load(case_ptr + row, mask=inside, other=IGNORED)
        base = statistics_ptr + row
        nll = tl.load(base + NLL * n_rows, mask=inside, other=0.0)
        gap = tl.load(base + GAP * n_rows, mask=inside, other=0.0)
        in_cell = case[:, None] == cell[None, :]
        in_kind = (case // 3)[:, None] == cell[None, :]
        counts = tl.sum(in_cell.to(tl.int32), axis=0)
        tl.store(counts_ptr + block * 9 + cell, counts.to(tl.int64), mask=cell < 9)
        sums = sums_ptr + block * WIDTH + cell
        tl.store(sums + NLL_SUMS, _sums_of(nll, in_cell), mask=cell < 9)
        tl.store(sums + GAP_SUMS, _sums_of(gap, in_kind), mask=cell < 3)
        if WIDTH > WEIGHTED_SUMS:  # Triton 3.6 cannot ask whether a tuple is None
            _store_term_sums(base, n_rows, inside, case, cell, sums, terms)


@triton.jit
def _sums_of(values, is_here):
    """The sum of each cell, of a value a row."""
    return tl.sum(tl.where(is_here, values[:, None], 0.0), axis=0)


@triton.jit
def _store_term_sums(base, n_rows, inside, case, cell, sums, terms):
    """What terms add to the table: weighted nll and its smoothing by cell, and the z-loss."""
    places = terms.columns
    if terms.PROBABILITY:
        # As the weight is, each row is shared among the answers of its kind.
        p_mask = tl.load(base + places.P_MASK * n_rows, mask=inside, other=0.0)[:, None]
        p_target = tl.load(base + places.P_TARGET * n_rows, mask=inside, other=0.0)[:, None]
        p_other = tl.maximum(1.0 - p_mask - p_target, 0.0)
        answer = (cell % 3)[None, :]
        share = tl.where(answer == 0, p_mask, tl.where(answer == 1, p_target, p_other))
        is_here = (case // 3)[:, None] == (cell // 3)[None, :]
        is_here = is_here & (case != IGNORED)[:, None] & (share != 0.0)  # 0 times an infinite nll is NaN
    else:
        share = 1.0
        is_here = case[:, None] == cell[None, :]
    column = NLL if places.WEIGHTED is None else places.WEIGHTED
    weighted = tl.load(base + column * n_rows, mask=inside, other=0.0)
    tl.store(sums + WEIGHTED_SUMS, _shared_sums_of(weighted, share, is_here), mask=cell < 9)
    smoothing_sums = tl.zeros([16], tl.float32)
    if places.SMOOTHING is not None:
        smoothing = tl.load(base + places.SMOOTHING * n_rows, mask=inside, other=0.0)
        smoothing_sums = _shared_sums_of(smoothing, share, is_here)
    tl.store(sums + SMOOTHING_SUMS, smoothing_sums, mask=cell < 9)
    z_sum = 0.0
    if places.Z is not None:
        z_sum = tl.sum(tl.load(base + places.Z * n_rows, mask=inside, other=0.0), axis=0)
    tl.store(sums + Z_SUM, tl.where(cell == 0, z_sum, 0.0), mask=cell == 0)


@triton.jit
def _shared_sums_of(values, share, is_here):
    """The same where a row is shared among cells."""
    return tl.sum(tl.where(is_here, values[:, None] * share, 0.0), axis=0)


@triton.jit(do_not_specialize=["n_blocks"], do_not_specialize_on_alignment=POINTERS[2:])
def _add_blocks_kernel(
    counts_ptr, sums_ptr, total_counts_ptr, total_sums_ptr, n_blocks,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts and sums of all blocks, in their order, by one program: no atomics."""
    cell, place = tl.arange(0, 16), tl.arange(0, PADDED)
    counts = tl.zeros([16], tl.int64)
    sums = tl.zeros([PADDED], tl.float32)
    for start in range(0, n_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)[:, None]
        inside = block < n_blocks
        block_counts = tl.load(
            counts_ptr + block * 9 + cell[None, :], mask=inside & (cell[None, :] < 9), other=0
        )
        block_sums = tl.load(
            sums_ptr + block * WIDTH + place[None, :], mask=inside & (place[None, :] < WIDTH), other=0.0
        )
        counts += tl.sum(block_counts, axis=0)
        sums += tl.sum(block_sums, axis=0)
    tl.store(total_counts_ptr + cell, counts, mask=cell < 9)
    tl.store(total_sums_ptr + place, sums, mask=place < WIDTH)


def launch_case_sums(
    statistics: RowStatistics, terms: Terms = PLAIN, *, programs: int = tiles.MAX_PROGRAMS
) -> tuple[Tensor, ...]:
    """Counts (3, 3) int64, nll sums (3, 3) and gap sums (3,) fp32 of the case table.

    Where the terms change what the cells weigh, three more: the sums by cell of token weight * smoothed
    nll, (3, 3), and of what smoothing adds to it, (3, 3), both shared among the answers under
    gate="probability"; and the sum of the z-loss, 0-d. Otherwise the first would be the nll sums, and
    the others 0.

    One launch up to ``BLOCK`` rows, two beyond. The order of additions hangs on N alone.

    Args:
        programs: how many add blocks of rows, at most; the sums are the same bits for any.
    """
    n, device = len(statistics.case), statistics.case.device
    arguments = table_arguments(terms)
    width = N_SUMS if arguments is None else N_SUMS_WITH_TERMS
    blocks = max(1, -(-n // BLOCK))
    counts, sums = _empty_sums(blocks, width, device)
    with on_device(counts):
        _case_sums_kernel[(min(blocks, programs),)](
            case_ptr=statistics.case, statistics_ptr=statistics.columns, counts_ptr=counts, sums_ptr=sums,
            n_rows=n, n_blocks=blocks, terms=arguments, WIDTH=width, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        if blocks > 1:
            total_counts, total_sums = _empty_sums(1, width, device)
            _add_blocks_kernel[(1,)](
                counts_ptr=counts, sums_ptr=sums, total_counts_ptr=total_counts, total_sums_ptr=total_sums,
                n_blocks=blocks, WIDTH=width, PADDED=tiles.next_power_of_2(width), BLOCK=BLOCK,
                num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
            counts, sums = total_counts, total_sums
    counts, sums = counts[0], sums[0]
    table = counts.view(3, 3), sums[:9].view(3, 3), sums[9:12]
    return (
        table if arguments is None else (*table, sums[12:21].view(3, 3), sums[21:30].view(3, 3), sums[30])
    )


def _empty_sums(blocks: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised counts and sums, a row a block."""
    counts = torch.empty(blocks, 9, dtype=torch.int64, device=device)
    return counts, torch.empty(blocks, width, dtype=torch.float32, device=device)
