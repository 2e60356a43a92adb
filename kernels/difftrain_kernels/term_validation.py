"""Checks of the options beyond the two penalties; ``validation.py`` says how checks are made."""

from __future__ import annotations

import torch
from torch import Tensor

from .validation import FP32, check_number, check_plain, shown


def check_bounded(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number within fp32 and the bounds, as a float; raises for others."""
    number = check_number(name, value)
    bounds = [
        text
        for bound, text in ((low, f">= {low}"), (above, f"> {above}"), (below, f"< {below}"))
        if bound is not None
    ]
    is_inside = (
        (low is None or number >= low)
        and (above is None or number > above)
        and (below is None or number < below)
    )
    if not (is_inside and abs(number) <= FP32.max):
        raise ValueError(
            f"{name} must be finite{''.join(f' and {text}' for text in bounds)}, got {shown(value)}"
        )
    return number


def check_constant(name: str, value: Tensor, device: torch.device, shape: tuple[int, ...] = ()) -> Tensor:
    """A plain floating-point tensor of this shape on ``device``, without gradient; ValueError for any other."""
    value = check_plain(name, value)
    if tuple(value.shape) != shape or not value.is_floating_point():
        what = f"of shape {shape}" if shape else "of no dimension"
        raise ValueError(
            f"{name} must be a floating-point tensor {what}, got shape {tuple(value.shape)} and dtype {value.dtype}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on device {device}, got {value.device}")
    return _without_gradient(name, value)


def _without_gradient(name: str, value: Tensor) -> Tensor:
    if value.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient, since it is a constant of the loss: pass {name}.detach()"
        )
    return value


def check_token_weights(value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """A plain real tensor on ``device``, without gradient, expanded to ``shape``; raises for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(f"token_weights must be a torch.Tensor, got {type(value).__name__}")
    value = check_plain("token_weights", value)
    if value.is_complex():
        raise ValueError(f"token_weights must have a real dtype, got {value.dtype}")
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"token_weights must broadcast to y's shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"token_weights must be on device {device}, got {value.device}")
    return _without_gradient("token_weights", value).expand(shape)


def check_case_weights(value: object, device: torch.device) -> tuple[float, ...] | Tensor:
    """The nine weights, row by row, as floats; or the (3, 3) tensor that holds them. Raises otherwise."""
    if isinstance(value, Tensor):
        return check_constant("case_weights", value, device, (3, 3))
    try:
        rows = [list(row) for row in value]
    except TypeError:
        raise TypeError(
            f"case_weights must be three rows of three numbers or a (3, 3) tensor, got {type(value).__name__}"
        ) from None
    if [len(row) for row in rows] != [3, 3, 3]:
        raise ValueError(
            f"case_weights must have shape (3, 3), got rows of {[len(row) for row in rows]} numbers"
        )
    return tuple(
        check_bounded(f"case_weights[{i}][{j}]", weight, low=0.0)
        for i, row in enumerate(rows)
        for j, weight in enumerate(row)
    )


def check_normalizer(value: object, reduction: str, device: torch.device) -> float | Tensor | None:
    """None, a number >= 0 as float, or a plain 0-d real tensor on ``device``; raises where there is no sum to divide."""
    if value is None:
        return None
    if reduction == "none":
        raise ValueError('normalizer must be None for reduction "none", which has no sum to divide')
    if not isinstance(value, Tensor):
        return check_bounded("normalizer", value, low=0.0)
    value = check_plain("normalizer", value)
    if value.dim() or value.is_complex():
        raise ValueError(
            f"normalizer must be a 0-d real tensor, got shape {tuple(value.shape)} and dtype {value.dtype}"
        )
    if value.device != device:
        raise ValueError(f"normalizer must be on device {device}, got {value.device}")
    return value.detach()
