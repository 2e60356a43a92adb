"""The arguments of one call in the form that implementations take them, and the form of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cases import CaseTable, divided
from .rows import move_back, row_outputs
from .term_validation import check_no_penalties, check_normalizer
from .terms import Terms, make_terms
from .validation import Penalty, check_integer, check_label_values, check_targets

# A tensor, or a tuple that begins with it where tables or rows are asked for. Any: type checkers take either, since
# what is asked for is known when the program runs.
Result = Tensor | Any


@dataclass
class LossCall:
    """One call's checked arguments.

    Attributes:
        y, x: (N,) labels of the rows of logits: shifted, where the call has a shift.
        reduction: of the rows, before a normaliser divides.
        shape: of y as the user gave it.
    """

    y: Tensor
    x: Tensor
    mask_id: int
    pk: Penalty
    pm: Penalty
    ignore_index: int
    reduction: str
    terms: Terms
    shape: torch.Size
    vocab_size: int
    shift: int
    normalizer: float | Tensor | None
    return_cases: bool
    return_rows: bool

    @property
    def labels(self) -> tuple:
        """What the weights follow from."""
        return self.y, self.x, self.mask_id, self.pk, self.pm, self.ignore_index

    def check_label_values(self) -> None:
        """Raise ValueError naming the first label that a position which counts must not have; waits for a GPU."""
        check_label_values(
            self.y.view(self.shape),
            self.vocab_size,
            self.ignore_index,
            forbidden=self.mask_id if self.terms.forbid_mask else None,
            token_weights=self.terms.token_weights,
            shift=self.shift,
        )

    def stated(self, upstream_scale: float | None) -> float | None:
        """The gradient that will reach the rows' sum, where the user states the one that reaches the loss."""
        if upstream_scale is None or self.normalizer is None:
            return upstream_scale
        if isinstance(self.normalizer, Tensor) or self.normalizer == 0:
            return None
        # Divided in fp32, as autograd will.
        scale, normalizer = torch.tensor(
            [upstream_scale, self.normalizer], dtype=torch.float32, device="cpu"
        )
        return (scale / normalizer).item() or None

    def result(
        self, loss: Tensor, tabulate: Callable[[], CaseTable], row_values: Callable[[], tuple[Tensor, dict]]
    ) -> Result:
        """What the user gets, from the reduced rows (N,) or 0-d.

        Args:
            tabulate: makes the table.
            row_values: gives the case (N,) and the fields of :class:`RowOutputs` (N,) by name.
        """
        if self.normalizer is not None:
            loss = divided(loss, self.normalizer)
        if self.reduction == "none":
            loss = move_back(loss.view(self.shape), self.shift)
        results = [loss]
        if self.return_cases:
            results.append(tabulate())
        if self.return_rows:
            results.append(row_outputs(*row_values(), self.shape, self.shift))
        return tuple(results) if len(results) > 1 else loss


def prepare_call(
    shape: torch.Size,
    vocab_size: int,
    like: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty | None,
    pm: Penalty | None,
    *,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    shift: int,
    return_cases: bool,
    return_rows: bool,
    entropy: bool,
    **terms,
) -> LossCall:
    """Check what the losses share; see their Raises.

    Args:
        like: on the loss's device; a penalty that becomes a tensor gets its dtype, fp32 at least.
        terms: the other options of :func:`make_terms`.
    """
    if terms["case_weights"] is not None:
        check_no_penalties(pk, pm)
    pk, pm = (1.0 if p is None else p for p in (pk, pm))
    y, x, mask_id, pk, pm, ignore_index = check_targets(
        shape, vocab_size, like, y, x, mask_id, pk, pm, ignore_index, reduction
    )
    if entropy and not return_rows:
        raise ValueError("entropy must come with return_rows, which shows it, got return_rows False")
    normalizer = check_normalizer(normalizer, reduction, like.device)
    shift = check_integer("shift", shift)
    if shift < 0 or (shift and not shape):
        raise ValueError(f"shift must be >= 0, and 0 where y has no dimension, got {shift}")
    made = make_terms(shape, like.device, rows=bool(return_rows), entropy=bool(entropy), **terms)
    if shift:
        y, x = _moved(y, shift, ignore_index), _moved(x, shift, 0)
        if made.token_weights is not None:
            made = replace(made, token_weights=_moved(made.token_weights, shift, 1))
    if y.dim() != 1:
        y, x = y.reshape(-1), x.reshape(-1)
    return LossCall(
        y, x, mask_id, pk, pm, ignore_index,
        "sum" if normalizer is not None else reduction, made, shape, vocab_size, shift, normalizer,
        bool(return_cases), bool(return_rows),
    )  # fmt: skip


def _moved(labels: Tensor, shift: int, fill: float) -> Tensor:
    """Labels (..., T) at the rows of logits that they are read against; ``fill`` where a row has none."""
    kept = labels[..., min(shift, labels.shape[-1]) :]
    return torch.nn.functional.pad(kept, (0, labels.shape[-1] - kept.shape[-1]), value=fill)
