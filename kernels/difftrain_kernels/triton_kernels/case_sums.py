"""Sums of the row statistics over the cells of the case table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device
from .row_statistics import GAP, NLL, RowStatistics
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


def launch_case_sums(statistics: RowStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (3, 3) int64, nll sums (3, 3) and gap sums (3,) fp32 of the case table; one program."""
    n, device = len(statistics.case), statistics.case.device
    counts = torch.empty(9, dtype=torch.int64, device=device)
    sums = torch.empty(12, dtype=torch.float32, device=device)
    with on_device(counts):
        _case_sums_kernel[(1,)](
            case_ptr=statistics.case, statistics_ptr=statistics.columns, counts_ptr=counts, sums_ptr=sums,
            n_rows=n, BLOCK=512, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return counts.view(3, 3), sums[:9].view(3, 3), sums[9:]
