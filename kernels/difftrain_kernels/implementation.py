"""Which implementation of the loss runs, and what the two losses share around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference")


def uses_triton(impl: str, logits: Tensor) -> bool:
    """Whether the Triton kernel runs; raises ValueError where it was asked for and cannot."""
    if impl == "reference" or (impl == "auto" and logits.device.type != "cuda"):
        return False
    obstacle = _obstacle_to_triton(logits)
    if obstacle and impl == "triton":
        raise ValueError(f'impl="triton" needs {obstacle}')
    return not obstacle


def _obstacle_to_triton(logits: Tensor) -> str:
    """What the Triton kernel would need and does not have; empty where it can run."""
    if logits.dtype == torch.float64:
        return "logits in fp32, bf16 or fp16, got torch.float64"
    try:
        from . import triton_kernels
    except ImportError:
        return "the package triton, which is not installed"
    if triton_kernels.is_interpreted():
        return "" if logits.device.type in ("cpu", "cuda") else f"a CPU or CUDA device, got {logits.device}"
    if logits.device.type != "cuda":
        return f"a CUDA device (or TRITON_INTERPRET=1 on the CPU), got {logits.device}"
    if not torch.version.hip and torch.cuda.get_device_capability(logits.device) < (8, 0):
        return f"compute capability 8.0, got {torch.cuda.get_device_capability(logits.device)}"
    return ""


def reduce_rows(row_loss: Tensor, reduction: str) -> Tensor:
    """Row losses (N,) as the reduction wants them; a copy for "none"."""
    return (
        row_loss.clone()
        if reduction == "none"
        else row_loss.sum()
        if reduction == "sum"
        else row_loss.mean()
    )


def forbid_second_derivative(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, of which a derivative raises RuntimeError; for ``backward`` under ``create_graph``.

    ``once_differentiable`` would hand out constants in silence where the upstream needs no gradient.
    """
    made = [g for g in gradients if g is not None]
    marked = iter(_NoSecondDerivative.apply(*(g.requires_grad_() for g in made)))
    return [None if g is None else next(marked) for g in gradients]


class _NoSecondDerivative(torch.autograd.Function):
    """Hands gradients through; a derivative of them raises."""

    @staticmethod
    def forward(ctx, *gradients):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the fused losses have no second derivative; impl='reference' has")
