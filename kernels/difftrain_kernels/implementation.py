"""Which implementation of the loss runs, and what the two losses share around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference, stepwise_reference
from .cases import CaseTable
from .terms import PLAIN, Terms
from .validation import active_transform, is_traced

IMPLEMENTATIONS = ("auto", "triton", "reference")


@cache
def load_kernels() -> ModuleType:
    """The kernels, imported at the first call; ImportError where Triton is not installed."""
    from . import triton_kernels

    return triton_kernels


def uses_triton(impl: str, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel runs; raises ValueError where it was asked for and cannot.

    Args:
        like: on the device of the logits, and with or without contents as they are.
        dtype: of the logits.
    """
    if impl == "reference" or (impl == "auto" and like.device.type != "cuda"):
        return False
    transform = active_transform()
    obstacle = (
        f"a call outside {transform}"
        if transform
        else _obstacle_to_triton(dtype, like.device, launches=not is_traced(like))
    )
    if obstacle and impl == "triton":
        raise ValueError(f'impl="triton" needs {obstacle}')
    return not obstacle


# Under torch.compile the answer is found once, while tracing, and not traced itself.
@torch.compiler.assume_constant_result
def _obstacle_to_triton(dtype: torch.dtype, device: torch.device, *, launches: bool) -> str:
    """What the Triton kernel would need and does not have; empty where it can run."""
    if dtype == torch.float64:
        return "logits in fp32, bf16 or fp16, got torch.float64"
    try:
        kernels = load_kernels()
    except ImportError:
        return "the package triton, which is not installed"
    if not launches and device.type in ("meta", "cuda"):
        return ""  # the machine need not have the device
    if kernels.is_interpreted():
        return "" if device.type in ("cpu", "cuda") else f"a CPU or CUDA device, got {device}"
    if device.type != "cuda":
        return f"a CUDA device (or TRITON_INTERPRET=1 on the CPU), got {device}"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability 8.0, got {torch.cuda.get_device_capability(device)}"
    return ""


_NO_CHANGE = nullcontext()


def no_grad():
    """``torch.no_grad()``; where gradients are off already, what costs the host less."""
    return torch.no_grad() if torch.is_grad_enabled() else _NO_CHANGE


def as_rows(logits: Tensor, *, uneven: bool = False) -> Tensor:
    """(N, V) with last stride 1; a view wherever the rows are evenly spaced, else a copy.

    With ``uneven``, (B, T, V) where they are contiguous, or where the rows of a slice of sequences are spaced
    evenly but for the gaps between these: a view too, or the logits themselves.
    """
    size = logits.shape[-1]
    if torch.is_grad_enabled():
        logits = logits.detach()
    if size > 1 and logits.dim() == 2 and logits.stride(1) == 1:
        return logits
    if uneven and size > 1 and logits.dim() == 3 and logits.stride() == (logits.shape[1] * size, size, 1):
        return logits
    # Not -1, which has no answer where a slice of a vocabulary holds no column.
    n = math.prod(logits.shape[:-1])
    if size == 1:
        rows = logits.reshape(n, size)
        return rows.as_strided(rows.shape, (rows.stride(0), 1))  # any stride does for one column
    shapes = [(n, size)]
    if uneven and logits.dim() > 2:
        shapes.append((math.prod(logits.shape[:-2]), *logits.shape[-2:]))
    for shape in shapes:
        try:
            rows = logits.view(shape)
        except RuntimeError:
            continue
        return rows if rows.stride(-1) == 1 else rows.contiguous()
    return logits.reshape(n, size).contiguous()


# Row statistics, a pair (case (N,), columns (n, N)): what one pass over logits (N, V) leaves of each
# row, for the case table and for the gradient. The first column is the row's loss; the number and
# the sense of the others are each implementation's own, and follow from the terms.


def score_rows(uses_triton: bool, logits: Tensor, *labels, terms: Terms = PLAIN) -> tuple[Tensor, Tensor]:
    """The statistics of rows; ``labels`` are y (N,), x (N,), mask_id, pk, pm, ignore_index."""
    if not uses_triton:
        return stepwise_reference.score_rows(logits, *labels, terms)
    return load_kernels().launch_loss(logits, *labels, terms=terms)


def row_gradients(
    uses_triton: bool, logits: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor,
    *, divisor: float, mask_id: int, terms: Terms = PLAIN, overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """The gradient of sum(row losses * upstream) / divisor; where Triton runs, over the logits if asked."""
    if not uses_triton:
        return stepwise_reference.row_gradients(
            logits, y, statistics, upstream, divisor, mask_id=mask_id, terms=terms
        )
    kernels = load_kernels()
    return kernels.launch_gradient(
        logits, y, kernels.RowStatistics(*statistics), upstream, divisor=divisor, mask_id=mask_id, terms=terms,
        gradient_out=logits if overwrite else None,
    )  # fmt: skip


def sum_cases(uses_triton: bool, statistics: tuple[Tensor, Tensor], terms: Terms = PLAIN) -> tuple:
    """What :class:`CaseTable` holds but ``n_positions``, in its order; None for what the terms do not have."""
    if uses_triton:
        kernels = load_kernels()
        sums = kernels.launch_case_sums(kernels.RowStatistics(*statistics), terms)
        has = (terms.has_own_sums, terms.label_smoothing > 0, terms.z_loss > 0)
        return *sums[:3], *(part if wanted else None for part, wanted in zip(sums[3:], has, strict=False))
    return stepwise_reference.sum_cases(statistics, terms)


def make_table(sums: tuple, n_positions: int) -> CaseTable:
    """The table of what :func:`sum_cases` returned."""
    counts, nll, gap, *others = sums
    return CaseTable(counts, nll, gap, n_positions, *others)


def row_values(
    uses_triton: bool, statistics: tuple[Tensor, Tensor], terms: Terms
) -> tuple[Tensor, dict[str, Tensor]]:
    """The case of each row, and the fields of :class:`RowOutputs` by name, (N,) each."""
    if uses_triton:
        statistics = load_kernels().RowStatistics(*statistics)
        names = ["nll", "lse", "p_mask", "confidence", *(["entropy"] if terms.entropy else [])]
        return statistics.case, {name: statistics.column(name.upper(), terms) for name in names}
    return reference.row_values(stepwise_reference.scores_of(statistics, terms), terms)


def divisor_of(reduction: str, n: int) -> int:
    """What the sum of n row losses is divided by."""
    return max(1, n) if reduction == "mean" else 1


def reduce_rows(row_loss: Tensor, reduction: str) -> Tensor:
    """Row losses (N,) as the reduction wants them; a copy for "none"."""
    return (
        row_loss.clone()
        if reduction == "none"
        else row_loss.sum()
        if reduction == "sum"
        else row_loss.mean()
    )


def forbid_second_derivative(
    gradients: Sequence[Tensor | None], *sources: Tensor | None
) -> list[Tensor | None]:
    """The gradients, of which a derivative raises RuntimeError; for ``backward`` under ``create_graph``.

    Args:
        sources: what they were made of: a derivative with respect to any of these raises.

    ``once_differentiable`` would hand out constants in silence where the upstream needs no gradient.
    """
    made = [g for g in gradients if g is not None]
    marked = iter(_NoSecondDerivative.apply(len(made), *made, *sources))
    return [None if g is None else next(marked) for g in gradients]


class _NoSecondDerivative(torch.autograd.Function):
    """Hands gradients through; a derivative of them raises."""

    @staticmethod
    def forward(ctx, n_gradients, *tensors):
        return tuple(g.view_as(g) for g in tensors[:n_gradients])

    @staticmethod
    def backward(ctx, *_):
        forbid_backward(ctx)


def forbid_backward(ctx, *_):
    """The backward of a gradient."""
    raise RuntimeError("the fused losses have no second derivative; impl='reference' has")
