"""Checks of the loss's arguments. Every message says what was expected and what came.

Shapes, dtypes and devices are checked always: they cost no look at the device. What the tensors
hold is checked only where the caller asks for it (``check_labels``), since that waits for a GPU.

A check gives back what it has checked in the one form that every implementation sees: a number as
float or int, a tensor as one whose memory holds its numbers.
"""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter, is_lazy

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
FP32 = torch.finfo(torch.float32)
REDUCTIONS = ("mean", "sum", "none")
Penalty = float | Tensor


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A plain tensor of ``dtypes``; raises TypeError for no tensor, ValueError for any other."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    value = check_plain(name, value)
    if value.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name} must have dtype {expected}, got {value.dtype}")
    return value


def check_plain(name: str, value: Tensor) -> Tensor:
    """The tensor, its pending negation carried out; ValueError unless a kernel can read it through strides.

    A tensor without contents (fake, meta) is as good: nothing is launched for it.
    """
    if type(value) not in (Tensor, Parameter):
        value = _unwrapped(name, value)
    if torch.compiler.is_compiling():  # the dispatch of operators does the rest
        return value
    if value.is_nested:
        raise ValueError(f"{name} must be a plain tensor, got a nested one: pass its rows as one tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}: pass .to_dense()")
    return value.resolve_neg() if value.is_neg() else value


def _unwrapped(name: str, value: Tensor) -> Tensor:
    """A tensor of a subclass, or of what it waits for; ValueError where its numbers are not in its memory."""
    if is_dtensor(value):
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor: under fully_shard call the loss inside forward, "
            "where parameters are whole; for a vocabulary split over processes take "
            "vocab_parallel_diffusion_loss; else pass .full_tensor()"
        )
    if torch.compiler.is_compiling() or isinstance(value, FakeTensor):
        return value
    if is_lazy(value):
        raise ValueError(f"{name} must be initialised, got an {type(value).__name__}")
    if hasattr(value, "trigger_wait"):  # what a collective gives back before it has ended
        return value.wait()
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ValueError(f"{name} must be a plain tensor, got a {type(value).__name__}")
    return value


def is_dtensor(value: object) -> bool:
    """Whether this is a DTensor, told without importing that class, which takes a second."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor has a shape, a dtype and a device, but no contents: on meta, or a fake one."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def active_transform() -> str:
    """The transform around this call for which a kernel has no rule, in words; empty where there is none."""
    if torch.compiler.is_compiling():
        return ""
    if torch._C._are_functorch_transforms_active():
        return "torch.func's transforms (vmap, grad, ...)"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else ""


def check_untransformed(name: str) -> None:
    """Raise ValueError inside a transform, for a function whose every implementation is a kernel of ours."""
    if transform := active_transform():
        raise ValueError(
            f"{name} must be called outside {transform}; inside, take fused_diffusion_loss with "
            'impl="reference"'
        )


def check_upstream(upstream: Tensor) -> Tensor:
    """The gradient that a backward of ours is given, as a plain tensor; raises where it is none."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor(upstream)  # is_grads_batched makes these
    if is_batched or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the fused losses take one upstream gradient at a time, got a batch of them; "
            "fused_diffusion_loss with impl='reference' takes it"
        )
    return check_plain("the upstream gradient", upstream)


def check_labels_like(name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """An integer tensor of this shape on this device; raises for anything else."""
    value = check_tensor(name, value, LABEL_DTYPES)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on device {device}, got {value.device}")
    if not torch.compiler.is_compiling() and value.is_inference() and torch.is_grad_enabled():
        return value.clone()  # autograd keeps no tensor of inference mode
    return value


def check_number(name: str, value: object, expected: str = "a number") -> float:
    """A real number as float, NaN where fp64 cannot hold it; TypeError for anything else.

    Real numbers are int, float, Fraction, Decimal and what numpy calls a real scalar, 0-d arrays
    among them; True and False count as 1 and 0, as in Python.
    """
    if type(value) is float:
        return value
    if type(value) is not int:
        # By numpy's letters for its dtypes, as numpy itself need not be installed.
        letter = getattr(getattr(value, "dtype", None), "kind", None)
        is_scalar = letter in ("b", "i", "u", "f") and getattr(value, "ndim", None) == 0
        if not (is_scalar or isinstance(value, (Real, Decimal))):
            raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except (OverflowError, ValueError):  # 10**400; a signaling NaN
        return math.nan


def shown(value: object) -> str:
    """A value in one line of a message."""
    try:
        text = str(value)
    except ValueError:  # an int of more digits than Python prints
        return f"a {type(value).__name__} of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_penalty(name: str, value: object, device: torch.device) -> Penalty:
    """A finite number >= 0 as float, or a 0-d float tensor on ``device`` without gradient; raises for others."""
    if isinstance(value, Tensor):
        value = check_plain(name, value)
        if value.dim() or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a 0-d floating-point tensor, "
                f"got shape {tuple(value.shape)} and dtype {value.dtype}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on device {device}, got {value.device}")
        return value.detach()
    number = check_number(name, value, "a number or a 0-d tensor")
    if not 0 <= number <= FP32.max:
        raise ValueError(f"{name} must be finite and >= 0, got {shown(value)}")
    return number


def check_integer(name: str, value: object) -> int:
    """An integer of 64 bits as int; TypeError unless it is one (a bool is none)."""
    if type(value) is not int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer, got {shown(value)}")
    return value


def check_upstream_scale(value: object) -> float | None:
    """None, or a finite number other than 0 as float; raises for anything else."""
    if value is None:
        return None
    number = check_number("upstream_scale", value, "a number or None")
    if not FP32.tiny <= abs(number) <= FP32.max:
        raise ValueError(f"upstream_scale must be finite, not 0 and within fp32, got {shown(value)}")
    return number


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
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(repr(value))}")


def check_logits(logits: object) -> Tensor:
    """A plain tensor (..., V) of a dtype that the losses take; raises for anything else."""
    logits = check_tensor("logits", logits, LOGITS_DTYPES)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    return logits


def check_targets(
    shape: torch.Size,
    vocab_size: int,
    like: Tensor,
    y: object,
    x: object,
    mask_id: object,
    pk: object,
    pm: object,
    ignore_index: object,
    reduction: object,
) -> tuple[Tensor, Tensor, int, Penalty, Penalty, int]:
    """What does not depend on how the logits are given, the penalties both numbers or both tensors.

    ``like`` is of the loss's device, and a penalty that becomes a tensor gets its dtype, fp32 at least.
    """
    y = check_labels_like("y", y, shape, like.device)
    x = check_labels_like("x", x, shape, like.device)
    if vocab_size >= 2**31:  # kernels count a row's columns in 32 bits
        raise ValueError(f"the vocabulary must have fewer than 2**31 words, got {vocab_size}")
    mask_id = check_integer("mask_id", mask_id)
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id must be in [0, {vocab_size}), got {mask_id}")
    ignore_index = check_integer("ignore_index", ignore_index)
    if y.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index must fit y's dtype {y.dtype}, got {ignore_index}")
    pk, pm = check_penalty("pk", pk, like.device), check_penalty("pm", pm, like.device)
    if isinstance(pk, Tensor) != isinstance(pm, Tensor) and not torch.compiler.is_compiling():
        dtype = torch.promote_types(like.dtype, torch.float32)
        pk, pm = (p if isinstance(p, Tensor) else like.new_full((), p, dtype=dtype) for p in (pk, pm))
    check_choice("reduction", reduction, REDUCTIONS)
    return y, x, mask_id, pk, pm, ignore_index


def check_linear_arguments(
    hidden: object, weight: object, bias: object, is_autocast: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (..., D), weight (V, D) and bias (V,), which autocast alone lets differ in dtype."""
    hidden = check_tensor("hidden", hidden, LOGITS_DTYPES)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    weight = check_tensor("weight", weight, LOGITS_DTYPES)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}) with V >= 1, got {tuple(weight.shape)}"
        )
    if bias is not None:
        bias = check_tensor("bias", bias, LOGITS_DTYPES)
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
    return hidden, weight, bias


def check_positive(name: str, value: object, *, integer: bool = False) -> float:
    """A finite number above 0, as an int where that is asked for, else as float; raises for others."""
    if integer:
        number = check_integer(name, value)
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got bool")
    else:
        number = check_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and > 0, got {shown(value)}")
    return number


def check_count(name: str, value: object) -> int:
    """An int >= 0; raises for others."""
    number = check_integer(name, value)
    if number < 0:
        raise ValueError(f"{name} must be >= 0, got {shown(value)}")
    return number


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
