"""A gradient made for one upstream gradient, brought to another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device
from .spacing import row_offset, spacing_of_rows
from .tiles import MAX_PROGRAMS, next_power_of_2

WARPS = 8


@triton.jit(do_not_specialize=["n_rows"])
def _rescale_kernel(
    gradient_ptr,
    upstream_ptr,
    stated,
    n_rows,
    vocab_size,
    spacing,
    upstream_stride,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.full([], index, tl.int64)
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        if upstream != stated:
            for start in range(0, vocab_size, BLOCK):
                pointers = gradient_ptr + row_offset(row, spacing) + start + offsets
                inside = start + offsets < vocab_size
                values = tl.load(pointers, mask=inside).to(tl.float32) * (upstream / stated)
                tl.store(pointers, values.to(gradient_ptr.dtype.element_ty), mask=inside)


def launch_rescale(gradient: Tensor, upstream: Tensor, *, stated: float) -> None:
    """Bring a gradient made for the upstream ``stated`` to ``upstream``, in place.

    For a gradient that lies over its logits, where nothing is left to recompute it from: each
    element is rounded a second time. Rows whose upstream equals ``stated`` are not touched.
    """
    if upstream.dtype != torch.float32:
        upstream = upstream.to(torch.float32)
    n, vocab_size = gradient.shape[:-1].numel(), gradient.shape[-1]
    if n == 0:
        return
    # At least one element to a thread: in place, threads that hold copies of one would read what another wrote.
    block = min(4096, max(32 * WARPS, next_power_of_2(vocab_size)))
    with on_device(gradient):
        _rescale_kernel[(min(n, MAX_PROGRAMS),)](
            gradient_ptr=gradient, upstream_ptr=upstream, stated=float(stated), n_rows=n,
            vocab_size=vocab_size, spacing=spacing_of_rows(gradient),
            upstream_stride=upstream.stride(0) if upstream.dim() else 0,
            BLOCK=block, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
