"""Checks of the loss's arguments. Every message says what was expected and what came.

Shapes, dtypes and devices are checked always: they cost no look at the device. What the tensors
hold is checked only where the caller asks for it (``check_labels``), since that waits for a GPU.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
FP32 = torch.finfo(torch.float32)
REDUCTIONS = ("mean", "sum", "none")
Penalty = float | Tensor


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``value`` is a tensor, ValueError unless it is a plain one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor: under fully_shard call the loss inside forward, "
            "where parameters are whole; for a vocabulary split over processes take "
            "vocab_parallel_diffusion_loss; else pass .full_tensor()"
        )
    if value.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name} must have dtype {expected}, got {value.dtype}")


def is_dtensor(value: object) -> bool:
    """Whether this is a DTensor, told without importing that class, which takes a second."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def check_labels_like(name: str, value: object, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``value`` is an integer tensor of this shape on this device."""
    check_tensor(name, value, LABEL_DTYPES)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on device {device}, got {value.device}")


def check_penalty(name: str, value: object, device: torch.device) -> None:
    """Raise unless ``value`` is a finite number >= 0 or a 0-d float tensor on ``device``."""
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a 0-d floating-point tensor, "
                f"got shape {tuple(value.shape)} and dtype {value.dtype}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on device {device}, got {value.device}")
    elif not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    elif not 0 <= value <= FP32.max:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an integer (a bool is none)."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer, got {value}")


def check_upstream_scale(value: object) -> None:
    """Raise unless ``value`` is None or a finite number other than 0."""
    if value is None:
        return
    if not isinstance(value, Real):
        raise TypeError(f"upstream_scale must be a number or None, got {type(value).__name__}")
    if not FP32.tiny <= abs(value) <= FP32.max:
        raise ValueError(f"upstream_scale must be finite, not 0 and within fp32, got {value}")


def check_overwritable(logits: Tensor) -> None:
    """Raise ValueError unless the logits are separate rows that a gradient can be written over."""
    if logits.numel() == 0:
        return
    # Dimensions joined where they are evenly spaced, outermost last: rows, and batches of them.
    spaced = [(1, 1, logits.shape[-1])]  # (size, stride, elements that one of it spans)
    for size, stride in zip(logits.shape[-2::-1], logits.stride()[-2::-1], strict=True):
        inner, step, span = spaced[-1]
        if size == 1:
            continue
        if len(spaced) > 1 and stride == inner * step:
            spaced[-1] = (size * inner, step, span + (size - 1) * stride)
        else:
            spaced.append((size, stride, span + (size - 1) * stride))
    apart = all(step >= before for (_, step, _), (_, _, before) in zip(spaced[1:], spaced, strict=False))
    if not (apart and len(spaced) <= 3 and (logits.shape[-1] == 1 or logits.stride(-1) == 1)):
        raise ValueError(
            "logits must be separate rows, evenly spaced or in batches, to be overwritten, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_logits(logits: Tensor) -> None:
    """Raise unless ``logits`` is a tensor (..., V) of a dtype that the losses take."""
    check_tensor("logits", logits, LOGITS_DTYPES)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")


def check_targets(
    shape: torch.Size,
    vocab_size: int,
    device: torch.device,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty,
    pm: Penalty,
    ignore_index: int,
    reduction: str,
) -> None:
    """Check what does not depend on how the logits are given."""
    check_labels_like("y", y, shape, device)
    check_labels_like("x", x, shape, device)
    check_integer("mask_id", mask_id)
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id must be in [0, {vocab_size}), got {mask_id}")
    check_integer("ignore_index", ignore_index)
    check_penalty("pk", pk, device)
    check_penalty("pm", pm, device)
    check_choice("reduction", reduction, REDUCTIONS)


def check_linear_arguments(hidden: Tensor, weight: Tensor, bias: Tensor | None, is_autocast: bool) -> None:
    """Check hidden (..., D), weight (V, D) and bias (V,), which autocast alone lets differ in dtype."""
    check_tensor("hidden", hidden, LOGITS_DTYPES)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    check_tensor("weight", weight, LOGITS_DTYPES)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}) with V >= 1, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias, LOGITS_DTYPES)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on device {hidden.device}, got {value.device}")
        is_castable = is_autocast and torch.float64 not in (value.dtype, hidden.dtype)
        if value.dtype != hidden.dtype and not is_castable:
            raise ValueError(f"{name} must have hidden's dtype {hidden.dtype}, got {value.dtype}")


def check_positive(name: str, value: object, *, integer: bool = False) -> None:
    """Raise unless ``value`` is a finite number above 0, and an integer where that is asked for."""
    if integer:
        check_integer(name, value)
    elif not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")


def check_label_values(
    y: Tensor,
    vocab_size: int,
    ignore_index: int,
    *,
    forbidden: int | None = None,
    token_weights: Tensor | None = None,
    shift: int = 0,
) -> None:
    """Raise ValueError naming the first label outside [0, V) of a position that counts.

    Reads the labels back to the host, so it waits for a GPU; meant for debugging.

    Args:
        forbidden: a word that no position may have for its label either.
        token_weights: of y's shape; a position of weight 0 does not count.
        shift: how far y was moved before, which the position named does not show.
    """
    bad = (y < 0) | (y >= vocab_size)
    bad = (bad if forbidden is None else bad | (y == forbidden)) & (y != ignore_index)
    if token_weights is not None:
        bad &= token_weights != 0
    if bad.any():
        first = bad.nonzero()[0]
        *before, last = first.tolist() if y.dim() else (None,)
        position = () if last is None else (*before, last + shift)
        without = "" if forbidden is None else f" without {forbidden}, which is forbidden,"
        raise ValueError(
            f"y must be in [0, {vocab_size}){without} or ignore_index {ignore_index}, "
            f"got {int(y[tuple(first)])} at position {position} ({int(bad.sum())} bad in all)"
        )


# Options beyond the two penalties.


def check_number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number within fp32 and the bounds, as a float; raises otherwise."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = float(value)
    bounds = [
        text
        for bound, text in ((low, f">= {low}"), (above, f"> {above}"), (below, f"< {below}"))
        if bound is not None
    ]
    fits = (
        (low is None or value >= low)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits or not abs(value) <= FP32.max:
        raise ValueError(f"{name} must be finite{''.join(f' and {text}' for text in bounds)}, got {value}")
    return value


def check_constant(name: str, value: Tensor, device: torch.device, shape: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless ``value`` is a floating-point tensor of this shape on ``device``, and a constant."""
    if tuple(value.shape) != shape or not value.is_floating_point():
        what = f"of shape {shape}" if shape else "of no dimension"
        raise ValueError(
            f"{name} must be a floating-point tensor {what}, got shape {tuple(value.shape)} and dtype {value.dtype}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on device {device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient: it is a constant of the loss; pass {name}.detach()"
        )


def check_token_weights(value: object, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``value`` is a real tensor on ``device`` that broadcasts to ``shape``, and a constant."""
    if not isinstance(value, Tensor):
        raise TypeError(f"token_weights must be a torch.Tensor, got {type(value).__name__}")
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
    if value.requires_grad:
        raise ValueError(
            "token_weights must not require a gradient: they are constants of the loss; pass token_weights.detach()"
        )


def check_case_weights(value: object, device: torch.device) -> tuple[float, ...] | Tensor:
    """The nine weights, row by row, as floats; or the (3, 3) tensor that holds them. Raises otherwise."""
    if isinstance(value, Tensor):
        check_constant("case_weights", value, device, (3, 3))
        return value.detach()
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
        check_number(f"case_weights[{i}][{j}]", weight, low=0.0)
        for i, row in enumerate(rows)
        for j, weight in enumerate(row)
    )


def check_normalizer(value: object, reduction: str, device: torch.device) -> None:
    """Raise unless ``value`` is None, a number >= 0, or a 0-d real tensor on ``device``; and there is a sum to divide."""
    if value is None:
        return
    if reduction == "none":
        raise ValueError('normalizer must be None for reduction "none", which has no sum to divide')
    if not isinstance(value, Tensor):
        check_number("normalizer", value, low=0.0)
    elif value.dim() or value.is_complex():
        raise ValueError(
            f"normalizer must be a 0-d real tensor, got shape {tuple(value.shape)} and dtype {value.dtype}"
        )
    elif value.device != device:
        raise ValueError(f"normalizer must be on device {device}, got {value.device}")
