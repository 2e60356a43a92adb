"""Sums of the row statistics over the cells of the case table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, Terms
from .device import on_device
from .row_statistics import GAP, NLL, RowStatistics
from .term_arguments import table_arguments
from .weights import IGNORED


@triton.jit(do_not_specialize=["n_rows"])
def _case_sums_kernel(case_ptr, statistics_ptr, counts_ptr, sums_ptr, n_rows, BLOCK: tl.constexpr):
    """Counts and nll of the nine cells and the gap of the three kinds, by one program: no atomics."""
    cell = tl.arange(0, 16)
    counts = tl.zeros([16], tl.int32)
    nll_sums = tl.zeros([16], tl.float32)
    gap_sums = tl.zeros([16], tl.float32)
    for start in range(0, n_rows, BLOCK):
        row = tl.full([], start, tl.int64) + tl.arange(0, BLOCK)
        inside = row < n_rows
        case = tl.load(case_ptr + row, mask=inside, other=IGNORED)
        nll = tl.load(statistics_ptr + row + NLL * n_rows, mask=inside, other=0.0)
        gap = tl.load(statistics_ptr + row + GAP * n_rows, mask=inside, other=0.0)
        in_cell = case[:, None] == cell[None, :]
        counts += tl.sum(in_cell.to(tl.int32), axis=0)
        nll_sums += tl.sum(tl.where(in_cell, nll[:, None], 0.0), axis=0)
        in_kind = (case // 3)[:, None] == cell[None, :]
        gap_sums += tl.sum(tl.where(in_kind, gap[:, None], 0.0), axis=0)
    tl.store(counts_ptr + cell, counts.to(tl.int64), mask=cell < 9)
    tl.store(sums_ptr + cell, nll_sums, mask=cell < 9)
    tl.store(sums_ptr + 9 + cell, gap_sums, mask=cell < 3)


@triton.jit(do_not_specialize=["n_rows"])
def _term_sums_kernel(case_ptr, statistics_ptr, sums_ptr, n_rows, terms, BLOCK: tl.constexpr):
    """What terms add to the table: weighted nll and its smoothing by cell, and the z-loss; by one program."""
    places = terms.columns
    cell = tl.arange(0, 16)
    weighted_sums = tl.zeros([16], tl.float32)
    smoothing_sums = tl.zeros([16], tl.float32)
    z_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_rows, BLOCK):
        row = tl.full([], start, tl.int64) + tl.arange(0, BLOCK)
        inside = row < n_rows
        case = tl.load(case_ptr + row, mask=inside, other=IGNORED)
        base = statistics_ptr + row
        if terms.PROBABILITY:
            # As the weight is, each row is shared among the answers of its kind.
            p_mask = tl.load(base + places.P_MASK * n_rows, mask=inside, other=0.0)[:, None]
            p_target = tl.load(base + places.P_TARGET * n_rows, mask=inside, other=0.0)[:, None]
            p_other = tl.maximum(1.0 - p_mask - p_target, 0.0)
            answer = (cell % 3)[None, :]
            share = tl.where(answer == 0, p_mask, tl.where(answer == 1, p_target, p_other))
            is_here = (case // 3)[:, None] == (cell // 3)[None, :]
            is_here = (
                is_here & (case != IGNORED)[:, None] & (share != 0.0)
            )  # 0 times an infinite nll is NaN
        else:
            share = 1.0
            is_here = case[:, None] == cell[None, :]
        weighted = tl.load(
            base + (NLL if places.WEIGHTED is None else places.WEIGHTED) * n_rows, mask=inside, other=0.0
        )
        weighted_sums += tl.sum(tl.where(is_here, weighted[:, None] * share, 0.0), axis=0)
        if places.SMOOTHING is not None:
            smoothing = tl.load(base + places.SMOOTHING * n_rows, mask=inside, other=0.0)
            smoothing_sums += tl.sum(tl.where(is_here, smoothing[:, None] * share, 0.0), axis=0)
        if places.Z is not None:
            z_sums += tl.load(base + places.Z * n_rows, mask=inside, other=0.0)
    tl.store(sums_ptr + cell, weighted_sums, mask=cell < 9)
    tl.store(sums_ptr + 9 + cell, smoothing_sums, mask=cell < 9)
    tl.store(sums_ptr + 18, tl.sum(z_sums, axis=0))


def launch_case_sums(statistics: RowStatistics, terms: Terms = PLAIN) -> tuple[Tensor, ...]:
    """Counts (3, 3) int64, nll sums (3, 3) and gap sums (3,) fp32 of the case table; one program.

    Where the terms change what the cells weigh, three more: the sums by cell of token weight * smoothed
    nll, (3, 3), and of what smoothing adds to it, (3, 3), both shared among the answers under
    gate="probability"; and the sum of the z-loss, 0-d. One more program. Otherwise the first would be
    the nll sums, and the others 0.
    """
    n, device = len(statistics.case), statistics.case.device
    counts = torch.empty(9, dtype=torch.int64, device=device)
    sums = torch.empty(12, dtype=torch.float32, device=device)
    with on_device(counts):
        _case_sums_kernel[(1,)](
            case_ptr=statistics.case, statistics_ptr=statistics.columns, counts_ptr=counts, sums_ptr=sums,
            n_rows=n, BLOCK=512, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    table = counts.view(3, 3), sums[:9].view(3, 3), sums[9:]
    arguments = table_arguments(terms)
    if arguments is None:
        return table
    sums = torch.empty(19, dtype=torch.float32, device=device)
    with on_device(sums):
        _term_sums_kernel[(1,)](
            case_ptr=statistics.case, statistics_ptr=statistics.columns, sums_ptr=sums,
            n_rows=n, terms=arguments, BLOCK=512, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return *table, sums[:9].view(3, 3), sums[9:18].view(3, 3), sums[18]
