"""The losses as operators of PyTorch: what torch.compile puts into its graphs.

An operator is opaque to the compiler, so what runs is what runs eagerly, bit for bit. Its schema
holds no float: Dynamo would make a graph for each value. Penalties are 0-d tensors on the device.
Eager calls do not come here; they may pass numbers straight to the kernel, and write the gradient
over the logits or give a buffer away, which an operator may not: its results must be new.

| operator | of | gives |
|---|---|---|
| ``difftrain::diffusion_loss`` | logits (N, V) | the loss, row statistics |
| ``difftrain::diffusion_loss_backward`` | logits, row statistics | the gradient |
| ``difftrain::linear_diffusion_loss`` | hidden (N, D), weight (V, D), bias | the loss, row statistics, gradients |
| ``difftrain::linear_diffusion_loss_backward`` | the same, row statistics | the gradients again |
| ``difftrain::case_sums`` | row statistics | counts and sums of the case table |
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference
from .cases import CaseTable
from .chunks import ChunkedLoss, gradient_dtype, upstream_of_gradients
from .implementation import as_rows, forbid_backward, reduce_rows, row_gradients, score_rows, sum_cases
from .validation import Penalty, check_label_values

# Names of operators are global: a second copy of this package, such as Hugging Face's kernels loads
# under a name of its own, must not take those of the first.
NAMESPACE = "difftrain" if __package__ == "difftrain_kernels" else re.sub(r"\W", "_", __package__)

# For the losses' public functions.


def compiled_diffusion_loss(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty,
    *, ignore_index: int, reduction: str, uses_triton: bool, return_cases: bool, check_labels: bool,
) -> Tensor | tuple[Tensor, CaseTable]:  # fmt: skip
    """``fused_diffusion_loss`` in a graph, of arguments that were checked."""
    pk, pm = (_as_tensor(p, logits) for p in (pk, pm))
    loss, *statistics = diffusion_loss(
        logits.reshape(-1, logits.shape[-1]), y.reshape(-1), x.reshape(-1), pk, pm,
        mask_id, ignore_index, reduction, uses_triton, check_labels,
    )  # fmt: skip
    return _shaped(loss, statistics, y, reduction, uses_triton, return_cases)


def compiled_linear_diffusion_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, x: Tensor, mask_id: int,
    pk: Penalty, pm: Penalty, *, ignore_index: int, reduction: str, uses_triton: bool,
    return_cases: bool, check_labels: bool, dtype: torch.dtype, chunk_tokens: int | None, workspace_bytes: int,
) -> Tensor | tuple[Tensor, CaseTable]:  # fmt: skip
    """``fused_linear_diffusion_loss`` in a graph, of arguments that were checked."""
    pk, pm = (_as_tensor(p, hidden) for p in (pk, pm))
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, case, columns, *_ = linear_diffusion_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, x.reshape(-1), mask_id, pk, pm, check_labels, *needs,
        y.reshape(-1), ignore_index, reduction, dtype, uses_triton, chunk_tokens, workspace_bytes,
    )  # fmt: skip
    return _shaped(loss, (case, columns), y, reduction, uses_triton, return_cases)


def _as_tensor(penalty: Penalty, like: Tensor) -> Tensor:
    """A penalty as a 0-d tensor. A number that Dynamo traces as variable stays one in a product."""
    if isinstance(penalty, Tensor):
        return penalty
    return like.new_ones((), dtype=_loss_dtype(like.dtype)) * penalty


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _shaped(loss, statistics, y, reduction, uses_triton, return_cases):
    loss = loss.view(y.shape) if reduction == "none" else loss
    if not return_cases:
        return loss
    return loss, CaseTable(*case_sums(*statistics, uses_triton), y.numel())


# From logits.


@custom_op(f"{NAMESPACE}::diffusion_loss", mutates_args=())
def diffusion_loss(
    logits: Tensor, y: Tensor, x: Tensor, pk: Tensor, pm: Tensor, mask_id: int, ignore_index: int,
    reduction: str, uses_triton: bool, check_labels: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if check_labels:
        check_label_values(y, logits.shape[1], ignore_index)
    case, columns = score_rows(uses_triton, as_rows(logits), y, x, mask_id, pk, pm, ignore_index)
    return reduce_rows(columns[0], reduction), case, columns


@diffusion_loss.register_fake
def _(logits, y, x, pk, pm, mask_id, ignore_index, reduction, uses_triton, check_labels):
    return _fake_loss(y.shape[0], _loss_dtype(logits.dtype), logits, reduction, uses_triton)


def _fake_loss(n, dtype, like, reduction, uses_triton):
    loss = like.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    return (
        loss,
        like.new_empty((n,), dtype=torch.int32),
        like.new_empty(_n_columns(uses_triton), n, dtype=dtype),
    )


def _n_columns(uses_triton: bool) -> int:
    if not uses_triton:
        return reference.N_STATISTICS
    from . import triton_kernels

    return triton_kernels.N_STATISTICS


@custom_op(f"{NAMESPACE}::diffusion_loss_backward", mutates_args=())
def diffusion_loss_backward(
    upstream: Tensor,
    logits: Tensor,
    y: Tensor,
    case: Tensor,
    columns: Tensor,
    reduction: str,
    uses_triton: bool,
) -> Tensor:
    rows = as_rows(logits)
    divisor = max(1, len(rows)) if reduction == "mean" else 1
    return row_gradients(uses_triton, rows, y, (case, columns), upstream, divisor=divisor)


@diffusion_loss_backward.register_fake
def _(upstream, logits, y, case, columns, reduction, uses_triton):
    if not uses_triton:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    from . import triton_kernels

    rows = as_rows(logits)
    return triton_kernels.empty_gradient_like(rows, rows.storage_offset() % (16 // rows.dtype.itemsize))


def _keep_for_backward(ctx, inputs, output):
    logits, y = inputs[:2]
    _, case, columns = output
    ctx.reduction, ctx.uses_triton = inputs[7:9]
    ctx.save_for_backward(logits, y, case, columns)
    ctx.mark_non_differentiable(case, columns)


def _differentiate(ctx, upstream, *_):
    gradient = diffusion_loss_backward(upstream, *ctx.saved_tensors, ctx.reduction, ctx.uses_triton)
    return gradient, *(None,) * 9


diffusion_loss.register_autograd(_differentiate, setup_context=_keep_for_backward)
diffusion_loss_backward.register_autograd(forbid_backward)


# From hidden states.

# What both passes need to cut the batch into chunks; the arguments of ``ChunkedLoss.plan``.
_PLAN = (
    "Tensor y, SymInt ignore_index, str reduction, ScalarType dtype, bool uses_triton, "
    "SymInt? chunk_tokens, SymInt workspace_bytes"
)
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_WANTS = "bool wants_hidden, bool wants_weight, bool wants_bias"
_N_PLAN = 7


@custom_op(
    f"{NAMESPACE}::linear_diffusion_loss",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor x, SymInt mask_id, Tensor pk, Tensor pm, bool check_labels, {_WANTS}, {_PLAN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_diffusion_loss(
    hidden, weight, bias, x, mask_id, pk, pm, check_labels, wants_hidden, wants_weight, wants_bias, *plan
):
    chunked = ChunkedLoss.plan(len(weight), *plan)
    if check_labels:
        check_label_values(chunked.y, len(weight), chunked.ignore_index)
    needs = _made_in_forward(chunked.reduction, wants_hidden, wants_weight, wants_bias)
    statistics, gradients = chunked.run(hidden, weight, bias, needs, weighting=(x, mask_id, pk, pm))
    return reduce_rows(statistics[1][0], chunked.reduction), *statistics, *_present(hidden, gradients)


def _made_in_forward(reduction: str, *wanted: bool) -> tuple[bool, ...]:
    return wanted if reduction != "none" else (False,) * 3


def _present(like: Tensor, gradients) -> list[Tensor]:
    """Gradients, an empty tensor for each that was not made."""
    return [like.new_empty(0) if g is None else g for g in gradients]


@linear_diffusion_loss.register_fake
def _(
    hidden, weight, bias, x, mask_id, pk, pm, check_labels, wants_hidden, wants_weight, wants_bias, *plan
):
    _, _, reduction, dtype, uses_triton, *_ = plan
    needs = _made_in_forward(reduction, wants_hidden, wants_weight, wants_bias)
    return (
        *_fake_loss(x.shape[0], _loss_dtype(dtype), hidden, reduction, uses_triton),
        *_fake_gradients(hidden, weight, dtype, uses_triton, needs),
    )


def _fake_gradients(hidden, weight, dtype, uses_triton, needs):
    wide = _loss_dtype(dtype)
    narrow = gradient_dtype(dtype, hidden.device, uses_triton)
    made = (
        hidden.new_empty(hidden.shape, dtype=narrow),
        weight.new_empty(weight.shape, dtype=wide),
        weight.new_empty(weight.shape[:1], dtype=wide),
    )
    return _present(hidden, (g if need else None for g, need in zip(made, needs, strict=True)))


@custom_op(
    f"{NAMESPACE}::linear_diffusion_loss_backward",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor case, Tensor columns, Tensor? upstream, {_WANTS}, {_PLAN}) "
    "-> (Tensor, Tensor, Tensor)",
)
def linear_diffusion_loss_backward(
    hidden, weight, bias, case, columns, upstream, wants_hidden, wants_weight, wants_bias, *plan
):
    needs = (wants_hidden, wants_weight, wants_bias)
    _, gradients = ChunkedLoss.plan(len(weight), *plan).run(
        hidden, weight, bias, needs, saved=(case, columns), upstream=upstream
    )
    return tuple(_present(hidden, gradients))


@linear_diffusion_loss_backward.register_fake
def _(hidden, weight, bias, case, columns, upstream, wants_hidden, wants_weight, wants_bias, *plan):
    _, _, _, dtype, uses_triton, *_ = plan
    needs = (wants_hidden, wants_weight, wants_bias)
    return tuple(_fake_gradients(hidden, weight, dtype, uses_triton, needs))


def _keep_for_linear_backward(ctx, inputs, output):
    hidden, weight, bias = inputs[:3]
    y, *ctx.plan = inputs[-_N_PLAN:]
    ctx.made = _made_in_forward(ctx.plan[1], *inputs[-_N_PLAN - 3 : -_N_PLAN])
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
    ctx.save_for_backward(hidden, weight, bias, y, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_linear(ctx, upstream, *_):
    hidden, weight, bias, y, case, columns, *gradients = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    _, reduction, dtype, *_ = ctx.plan
    is_per_row = reduction == "none"
    if any(need and not made for need, made in zip(needs, ctx.made, strict=True)):
        gradients = linear_diffusion_loss_backward(
            hidden, weight, bias, case, columns, upstream if is_per_row else None, *needs, y, *ctx.plan
        )
    scale = None if is_per_row else upstream / upstream_of_gradients(y.shape[0], reduction, dtype)
    scaled = (
        _scaled(gradient, scale, dtype) if need else None
        for gradient, need, dtype in zip(gradients, needs, ctx.dtypes, strict=True)
    )
    return *scaled, *(None,) * (8 + _N_PLAN)


def _scaled(made: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In fp32, rounded once: on a GPU a 0-d tensor beside narrow ones is rounded to their dtype first."""
    return made.to(dtype) if scale is None else (made.to(_loss_dtype(made.dtype)) * scale).to(dtype)


linear_diffusion_loss.register_autograd(_differentiate_linear, setup_context=_keep_for_linear_backward)
linear_diffusion_loss_backward.register_autograd(forbid_backward)


# The case table of either.


@custom_op(f"{NAMESPACE}::case_sums", mutates_args=())
def case_sums(case: Tensor, columns: Tensor, uses_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel's results are views of one buffer, which an operator may not return.
    return tuple(part.clone() for part in sum_cases(uses_triton, (case, columns)))


@case_sums.register_fake
def _(case, columns, uses_triton):
    return case.new_empty(3, 3, dtype=torch.int64), columns.new_empty(3, 3), columns.new_empty(3)
