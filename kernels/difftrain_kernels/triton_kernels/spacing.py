"""Where rows lie: evenly spaced, or evenly within a batch and the batches evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Spacing(NamedTuple):
    """Row i lies (i // per_batch) * batch_stride + (i % per_batch) * stride elements from the first."""

    stride: Any
    per_batch: Any = None  # None: the rows are evenly spaced, and there are no batches
    batch_stride: Any = None


@triton.jit
def row_offset(row, spacing):
    """Elements from the first row to this one, of an int64 row."""
    if spacing.per_batch is None:
        return row * spacing.stride
    else:
        within = row.to(tl.int32)  # a row's number is one of a grid's, its offset is not
        batch = within // spacing.per_batch
        within -= batch * spacing.per_batch
        return batch.to(tl.int64) * spacing.batch_stride + within.to(tl.int64) * spacing.stride


def spacing_of(shape: Sequence[int], strides: Sequence[int]) -> Spacing | None:
    """The spacing of rows of any leading shape; None where one batch stride and one stride do not say it."""
    dims: list[tuple[int, int]] = []  # (size, stride), dimensions joined where they are evenly spaced
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            size *= dims.pop()[0]
        dims.append((size, stride))
    if len(dims) > 2:
        return None
    if len(dims) == 2:
        return Spacing(dims[1][1], per_batch=dims[1][0], batch_stride=dims[0][1])
    return Spacing(dims[0][1] if dims else 0)


def spacing_of_rows(rows: Tensor) -> Spacing:
    """The spacing of (N, V) rows, or of (B, T, V)."""
    if rows.is_contiguous():
        return Spacing(rows.shape[-1])
    if rows.dim() == 2:
        return Spacing(rows.stride(0))
    spacing = spacing_of(rows.shape[:-1], rows.stride()[:-1])
    if spacing is None:
        raise ValueError(
            f"logits must be (N, V) or (B, T, V), got {tuple(rows.shape)} of strides {rows.stride()}"
        )
    return spacing
