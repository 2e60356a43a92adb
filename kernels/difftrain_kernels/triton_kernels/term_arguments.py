"""The terms of a loss as kernels take them: what a term lacks is None, and compiles to nothing."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..terms import PLAIN, PROBABILITY, Terms
from .row_statistics import Columns, columns
from .spacing import Spacing, spacing_of


class TermArguments(NamedTuple):
    """One argument of a kernel; capitals are constants of the compiler."""

    columns: Columns
    token_weights: Any = None
    token_spacing: Spacing | None = None
    case_weights: Any = None  # nine numbers, or a pointer to them
    CASES_ON_DEVICE: Any = None
    PROBABILITY: Any = None  # the gate
    logit_scale: Any = None
    SCALE_ON_DEVICE: Any = None
    softcap: Any = None
    label_smoothing: Any = None
    z_loss: Any = None
    FORBID_MASK: Any = None
    ENTROPY: Any = None


_YES = tl.constexpr(True)
_NONE = TermArguments(Columns())


def scoring_arguments(terms: Terms, n_rows: int) -> TermArguments:
    """What the loss of ``n_rows`` positions needs of the terms."""
    if terms is PLAIN:
        return _NONE
    weights, spacing = _token_weights(terms.token_weights, n_rows)
    cases = terms.case_weights
    if isinstance(cases, Tensor):
        cases = cases.detach().to(torch.float32).contiguous()
    elif cases is not None:
        cases = tuple(float(weight) for weight in cases)
    return _logit_arguments(terms)._replace(
        columns=_columns(terms, *Columns._fields),
        token_weights=weights,
        token_spacing=spacing,
        case_weights=cases,
        CASES_ON_DEVICE=_YES if isinstance(cases, Tensor) else None,
        PROBABILITY=_YES if terms.gate == PROBABILITY else None,
        label_smoothing=float(terms.label_smoothing) or None,
        z_loss=float(terms.z_loss) or None,
        ENTROPY=_YES if terms.entropy else None,
    )


def slice_arguments(terms: Terms, n_rows: int) -> TermArguments:
    """What a slice of the vocabulary needs of them: no weight but where it is 0, no column."""
    return scoring_arguments(terms, n_rows)._replace(
        columns=Columns(), case_weights=None, CASES_ON_DEVICE=None, PROBABILITY=None, z_loss=None
    )


def gradient_arguments(terms: Terms) -> TermArguments:
    """What the gradient from statistics needs of them: the rest is in the statistics."""
    if terms is PLAIN:
        return _NONE
    return _logit_arguments(terms)._replace(columns=_columns(terms, "TARGET_TERM", "UNIFORM"))


def table_arguments(terms: Terms) -> TermArguments | None:
    """What the sums of the case table need of them; None where the terms leave it as it is."""
    if terms is PLAIN:
        return None
    places = _columns(terms, "WEIGHTED", "SMOOTHING", "Z", "P_TARGET")
    if not any(places):
        return None
    if terms.gate == PROBABILITY:
        return TermArguments(
            _columns(terms, "WEIGHTED", "SMOOTHING", "Z", "P_MASK", "P_TARGET"), PROBABILITY=_YES
        )
    return TermArguments(places)


def _columns(terms: Terms, *names: str) -> Columns:
    """The places of these columns, as constants; None for those that the terms do not have."""
    return _constants(columns(terms), names)


@cache
def _constants(existing: tuple[str, ...], names: tuple[str, ...]) -> Columns:
    return Columns(**{name: tl.constexpr(existing.index(name)) for name in names if name in existing})


def _logit_arguments(terms: Terms) -> TermArguments:
    """What changes the logits themselves."""
    scale = terms.logit_scale
    if isinstance(scale, Tensor):
        scale = scale.detach().to(torch.float32)
    elif scale is not None:
        scale = None if scale == 1 else float(scale)
    return TermArguments(
        Columns(),
        logit_scale=scale,
        SCALE_ON_DEVICE=_YES if isinstance(scale, Tensor) else None,
        softcap=None if terms.softcap is None else float(terms.softcap),
        FORBID_MASK=_YES if terms.forbid_mask else None,
    )


def _token_weights(weights: Tensor | None, n_rows: int) -> tuple[Tensor | None, Spacing | None]:
    """The weights, read through their strides; only what two strides cannot say is copied."""
    if weights is None:
        return None, None
    if weights.numel() != n_rows:
        raise ValueError(f"token_weights must be one per row, {n_rows}, got shape {tuple(weights.shape)}")
    weights = weights.detach()
    if weights.dtype == torch.bool:
        weights = weights.view(torch.uint8)
    spacing = spacing_of(weights.shape, weights.stride())
    if spacing is None:
        weights = weights.contiguous()
        spacing = Spacing(1)
    return weights, spacing
