"""The loss of hidden states as operators of PyTorch; ``operators.py`` says what these are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from . import small_linear_loss
from .calls import LossCall, Result
from .chunks import ChunkedLoss, gradient_dtype, upstream_of_gradients
from .implementation import forbid_backward, reduce_rows
from .operators import (
    N_TERMS,
    NAMESPACE,
    TERMS,
    as_tensor,
    check_labels_of,
    fake_loss,
    flattened,
    loss_dtype,
    result_of,
    terms_of,
)


def compiled_linear_diffusion_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall, *, uses_triton: bool,
    check_labels: bool, dtype: torch.dtype, chunk_tokens: int | None, workspace_bytes: int, counted: int | None,
) -> Result:  # fmt: skip
    """``fused_linear_diffusion_loss`` in a graph, of arguments that were checked."""
    pk, pm = (as_tensor(p, hidden) for p in (call.pk, call.pm))
    terms = flattened(call.terms, hidden)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, case, columns, *_ = linear_diffusion_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, call.x, pk, pm, check_labels, *needs, *terms,
        call.y, call.mask_id, call.ignore_index, call.reduction, dtype, uses_triton, chunk_tokens,
        workspace_bytes, counted,
    )  # fmt: skip
    return result_of(loss, (case, columns), call, terms, uses_triton)


# What both passes need to cut the batch into chunks; the arguments of ``ChunkedLoss.plan``.
_PLAN = (
    f"{TERMS}, Tensor y, SymInt mask_id, SymInt ignore_index, str reduction, ScalarType dtype, "
    "bool uses_triton, SymInt? chunk_tokens, SymInt workspace_bytes, SymInt? counted"
)
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_WANTS = "bool wants_hidden, bool wants_weight, bool wants_bias"
_N_PLAN = N_TERMS + 9


def _planned(plan: tuple) -> ChunkedLoss:
    return ChunkedLoss.plan(terms_of(*plan[:N_TERMS]), *plan[N_TERMS:])


@custom_op(
    f"{NAMESPACE}::linear_diffusion_loss",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor x, Tensor pk, Tensor pm, bool check_labels, {_WANTS}, {_PLAN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_diffusion_loss(
    hidden, weight, bias, x, pk, pm, check_labels, wants_hidden, wants_weight, wants_bias, *plan
):
    chunked = _planned(plan)
    if check_labels:
        check_labels_of(chunked.y, len(weight), chunked.mask_id, chunked.ignore_index, chunked.terms)
        chunked.check_counted()
    needs = _made_in_forward(chunked.reduction, wants_hidden, wants_weight, wants_bias)
    if small_linear_loss.takes(hidden, weight, bias, chunked):
        loss, statistics, gradients = small_linear_loss.run(
            hidden, weight, bias, chunked, (x, pk, pm), needs
        )
        return loss, *statistics, *_present(hidden, gradients)
    statistics, gradients = chunked.run(hidden, weight, bias, needs, weighting=(x, pk, pm))
    return reduce_rows(statistics[1][0], chunked.reduction), *statistics, *_present(hidden, gradients)


def _made_in_forward(reduction: str, *wanted: bool) -> tuple[bool, ...]:
    return wanted if reduction != "none" else (False,) * 3


def _present(like: Tensor, gradients) -> list[Tensor]:
    """Gradients, an empty tensor for each that was not made."""
    return [like.new_empty(0) if g is None else g for g in gradients]


@linear_diffusion_loss.register_fake
def _(hidden, weight, bias, x, pk, pm, check_labels, wants_hidden, wants_weight, wants_bias, *plan):
    chunked = _planned(plan)
    needs = _made_in_forward(chunked.reduction, wants_hidden, wants_weight, wants_bias)
    dtype = loss_dtype(chunked.dtype)
    return (
        *fake_loss(x.shape[0], dtype, hidden, chunked.reduction, chunked.uses_triton, chunked.terms),
        *_fake_gradients(hidden, weight, chunked, needs),
    )


def _fake_gradients(hidden, weight, chunked, needs):
    narrow = gradient_dtype(chunked.dtype, hidden.device, chunked.uses_triton)
    made = (
        hidden.new_empty(hidden.shape, dtype=narrow),
        weight.new_empty(weight.shape, dtype=chunked.plan_sums(*weight.shape, weight.dtype).dtype),
        weight.new_empty(weight.shape[:1], dtype=loss_dtype(chunked.dtype)),
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
    chunked = _planned(plan)
    if small_linear_loss.takes(hidden, weight, bias, chunked):
        gradients = small_linear_loss.run_again(hidden, weight, bias, chunked, columns, needs)
    else:
        _, gradients = chunked.run(hidden, weight, bias, needs, saved=(case, columns), upstream=upstream)
    return tuple(_present(hidden, gradients))


@linear_diffusion_loss_backward.register_fake
def _(hidden, weight, bias, case, columns, upstream, wants_hidden, wants_weight, wants_bias, *plan):
    needs = (wants_hidden, wants_weight, wants_bias)
    return tuple(_fake_gradients(hidden, weight, _planned(plan), needs))


def _keep_for_linear_backward(ctx, inputs, output):
    hidden, weight, bias = inputs[:3]
    plan = inputs[-_N_PLAN:]
    tensors, ctx.terms = plan[:3], plan[3:N_TERMS]
    y, *ctx.plan = plan[N_TERMS:]
    ctx.made = _made_in_forward(ctx.plan[2], *inputs[-_N_PLAN - 3 : -_N_PLAN])
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
    ctx.save_for_backward(hidden, weight, bias, y, *tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_linear(ctx, upstream, *_):
    hidden, weight, bias, y, *others = ctx.saved_tensors
    tensors, (case, columns, *gradients) = others[:3], others[3:]
    needs = tuple(ctx.needs_input_grad[:3])
    _, _, reduction, dtype, *_ = ctx.plan
    is_per_row = reduction == "none"
    if any(need and not made for need, made in zip(needs, ctx.made, strict=True)):
        gradients = linear_diffusion_loss_backward(
            hidden, weight, bias, case, columns, upstream if is_per_row else None, *needs,
            *tensors, *ctx.terms, y, *ctx.plan,
        )  # fmt: skip
    scale = None if is_per_row else upstream / upstream_of_gradients(y.shape[0], reduction, dtype)
    scaled = (
        _scaled(gradient, scale, dtype) if need else None
        for gradient, need, dtype in zip(gradients, needs, ctx.dtypes, strict=True)
    )
    return *scaled, *(None,) * (7 + _N_PLAN)


def _scaled(made: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In fp32, rounded once: on a GPU a 0-d tensor beside narrow ones is rounded to their dtype first."""
    return made.to(dtype) if scale is None else (made.to(loss_dtype(made.dtype)) * scale).to(dtype)


linear_diffusion_loss.register_autograd(_differentiate_linear, setup_context=_keep_for_linear_backward)
linear_diffusion_loss_backward.register_autograd(forbid_backward)
