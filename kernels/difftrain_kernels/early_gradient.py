"""The gradient that forward makes with the loss, for an upstream gradient that it was told or expects.

Backward takes it once: the kernel compares on the device what arrived, and makes anew the rows for which that differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .implementation import load_kernels
from .terms import Terms
from .upstream_prediction import Expectation


@dataclass
class EarlyGradient:
    """What forward leaves for backward.

    Attributes:
        gradient: of the rows' shape; None where forward made none, and once it is taken.
        made_for: the upstream gradient that each row was made for: a number, or (N,) fp32, NaN for none.
        expectation: what foretold it; None where the user stated it.
    """

    gradient: Tensor | None = None
    made_for: float | Tensor | None = None
    expectation: Expectation | None = None


def score_rows_early(
    rows: Tensor, labels: tuple, *, terms: Terms, divisor: float, expectation: Expectation
) -> tuple[tuple[Tensor, Tensor], EarlyGradient]:
    """The statistics of rows, and their gradient as far as it is expected; one launch.

    Args:
        labels: as for :func:`implementation.score_rows`.
    """
    kernels = load_kernels()
    if not expectation.may_open:
        return kernels.launch_loss(rows, *labels, terms=terms), EarlyGradient(expectation=expectation)
    made_for = torch.empty(labels[0].shape[0], dtype=torch.float32, device=rows.device)
    statistics, gradient = kernels.launch_loss_and_gradient(
        rows, *labels, terms=terms, upstream=expectation.state, made_for_out=made_for, divisor=divisor
    )
    expectation.open(gradient)
    return statistics, EarlyGradient(gradient, made_for, expectation)


def finish_gradient(
    early: EarlyGradient, rows: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor,
    *, divisor: float, mask_id: int, terms: Terms,
) -> Tensor:  # fmt: skip
    """The gradient for the upstream gradient that came, in the buffer from forward if there is one. One launch.

    That buffer is given away once: a second backward makes its own.
    """
    kernels, made, early.gradient = load_kernels(), early.gradient, None
    if early.expectation is not None:
        early.expectation.close(made)
    expected = {}
    # Hooks on saved tensors may give the logits back at another address, which other kernels read.
    if made is not None and kernels.have_one_phase(made, rows):
        state = None if early.expectation is None else early.expectation.state
        expected = {"gradient_out": made, "stated": early.made_for, "state": state}
    return kernels.launch_gradient(
        rows, y, kernels.RowStatistics(*statistics), upstream,
        divisor=divisor, mask_id=mask_id, terms=terms, **expected,
    )  # fmt: skip


# Of an operator. It may not give back what it was given, so the gradient cannot go through the graph: it
# hangs on the memory of the statistics, which the graph brings to backward, and ends with it.


def leave_with(columns: Tensor, early: EarlyGradient) -> None:
    """Hang it on the memory of row statistics."""
    columns.untyped_storage()._difftrain_early_gradient = early


def left_with(columns: Tensor) -> EarlyGradient:
    """What hangs on the memory of row statistics; an empty one where nothing does."""
    return getattr(columns.untyped_storage(), "_difftrain_early_gradient", EarlyGradient())
