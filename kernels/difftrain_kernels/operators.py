"""The loss of logits as operators of PyTorch: what torch.compile puts into its graphs.

An operator is opaque to the compiler, so what runs is what runs eagerly, bit for bit. Its schema
holds no float: Dynamo would make a graph for each value. Penalties are 0-d tensors on the device.
Eager calls do not come here; they may pass numbers straight to the kernel, and write the gradient
over the logits, which an operator may not. A gradient that is made in forward because its upstream gradient
is expected goes beside the graph (``early_gradient.py``).

| operator | of | gives |
|---|---|---|
| ``difftrain::diffusion_loss`` | logits (N, V) | the loss, row statistics |
| ``difftrain::diffusion_loss_backward`` | logits, row statistics | the gradient |
| ``difftrain::linear_diffusion_loss`` | hidden (N, D), weight (V, D), bias | the loss, row statistics, gradients |
| ``difftrain::linear_diffusion_loss_backward`` | the same, row statistics | the gradients again |
| ``difftrain::case_sums`` | row statistics | counts and sums of the case table |
| ``difftrain::shown_rows`` | row statistics | what is shown of each row |
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference, sliced_reference, small_vocabulary, stepwise_reference
from .calls import LossCall, Result
from .cases import CaseTable
from .early_gradient import EarlyGradient, finish_gradient, leave_with, left_with, score_rows_early
from .implementation import (
    as_rows,
    divisor_of,
    forbid_backward,
    load_kernels,
    make_table,
    reduce_rows,
    row_gradients,
    row_values,
    score_rows,
    sum_cases,
)
from .terms import PLAIN, Terms
from .upstream_prediction import find_expectation, replays_graphs
from .validation import check_label_values

# Names of operators are global: a second copy of this package, such as Hugging Face's kernels loads
# under a name of its own, must not take those of the first.
NAMESPACE = "difftrain" if __package__ == "difftrain_kernels" else re.sub(r"\W", "_", __package__)

# The terms in a schema: what they change is constant in a training (a float in a schema is compiled anew
# for each value), but for weights and the logits' scale, which are tensors.
TERMS = (
    "Tensor? token_weights, Tensor? case_weights, Tensor? logit_scale, str gate, float? softcap, "
    "float label_smoothing, float z_loss, bool forbid_mask, bool rows, bool entropy"
)
N_TERMS = 10


def flattened(terms: Terms, like: Tensor) -> tuple:
    """The terms as a schema has them."""
    token_weights, case_weights, scale = terms.token_weights, terms.case_weights, terms.logit_scale
    if isinstance(case_weights, tuple):
        case_weights = torch.stack([as_tensor(weight, like) for weight in case_weights]).view(3, 3)
    return (
        None if token_weights is None else token_weights.reshape(-1),
        case_weights,
        None if scale is None else as_tensor(scale, like),
        terms.gate, terms.softcap, terms.label_smoothing, terms.z_loss, terms.forbid_mask, terms.rows, terms.entropy,
    )  # fmt: skip


def terms_of(
    token_weights, case_weights, logit_scale, gate, softcap, label_smoothing, z_loss, forbid, rows, entropy
):
    return Terms(
        case_weights,
        gate,
        token_weights,
        softcap,
        label_smoothing,
        z_loss,
        forbid,
        logit_scale,
        rows,
        entropy,
    )


# For the losses' public functions.


def compiled_diffusion_loss(
    logits: Tensor, call: LossCall, *, uses_triton: bool, predicts: bool, check_labels: bool
) -> Result:
    """``fused_diffusion_loss`` in a graph, of arguments that were checked."""
    # An exported program keeps the answer, and may run where no gradient is wanted.
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad and not _is_exporting()
    predicts = predicts and uses_triton and wants_gradient
    pk, pm = (as_tensor(p, logits) for p in (call.pk, call.pm))
    terms = flattened(call.terms, logits)
    loss, *statistics = diffusion_loss(
        logits.reshape(-1, logits.shape[-1]), call.y, call.x, pk, pm, call.mask_id, call.ignore_index,
        call.reduction, uses_triton, predicts, check_labels, *terms,
    )  # fmt: skip
    return result_of(loss, statistics, call, terms, uses_triton)


# Not traced: torch 2.11 would take the answer for yes.
@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def as_tensor(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a 0-d tensor. One that Dynamo traces as variable stays one in a product."""
    if isinstance(number, Tensor):
        return number
    return like.new_ones((), dtype=loss_dtype(like.dtype)) * number


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def result_of(loss, statistics, call: LossCall, terms: tuple, uses_triton: bool) -> Result:
    return call.result(
        loss,
        lambda: _table(statistics, call, terms, uses_triton),
        lambda: _rows(statistics, call, terms, uses_triton),
    )


def _table(statistics, call: LossCall, terms: tuple, uses_triton: bool) -> CaseTable:
    sums = case_sums(*statistics, uses_triton, *terms)
    # What these terms do not have is empty.
    return make_table(tuple(part if part.numel() else None for part in sums), call.y.numel())


def _rows(statistics, call: LossCall, terms: tuple, uses_triton: bool) -> tuple[Tensor, dict[str, Tensor]]:
    shown = shown_rows(*statistics, uses_triton, *terms)
    names = ["nll", "lse", "p_mask", "confidence", *(["entropy"] if call.terms.entropy else [])]
    return statistics[0], dict(zip(names, shown.unbind(0), strict=True))


def traced_table(statistics, call: LossCall, uses_triton: bool) -> CaseTable:
    """The table of statistics without contents."""
    return _table(statistics, call, flattened(call.terms, statistics[1]), uses_triton)


def traced_rows(statistics, call: LossCall, uses_triton: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """What is shown of rows without contents."""
    return _rows(statistics, call, flattened(call.terms, statistics[1]), uses_triton)


# From logits.


@custom_op(
    f"{NAMESPACE}::diffusion_loss",
    mutates_args=(),
    schema="(Tensor logits, Tensor y, Tensor x, Tensor pk, Tensor pm, SymInt mask_id, SymInt ignore_index, "
    f"str reduction, bool uses_triton, bool predicts, bool check_labels, {TERMS}) -> (Tensor, Tensor, Tensor)",
)
def diffusion_loss(
    logits, y, x, pk, pm, mask_id, ignore_index, reduction, uses_triton, predicts, check_labels, *flat_terms
):
    terms = terms_of(*flat_terms)
    if check_labels:
        check_labels_of(y, logits.shape[1], mask_id, ignore_index, terms)
    rows, labels = as_rows(logits), (y, x, mask_id, pk, pm, ignore_index)
    expectation = None
    if predicts and not replays_graphs(logits.device):
        expectation = find_expectation(rows, len(y), reduction)
    if expectation is None:
        case, columns = score_rows(uses_triton, rows, *labels, terms=terms)
    else:
        (case, columns), early = score_rows_early(
            rows, labels, terms=terms, divisor=divisor_of(reduction, len(y)), expectation=expectation
        )
        leave_with(columns, early)
    is_small = not uses_triton and small_vocabulary.takes(logits.shape[-1], logits.device, terms)
    if is_small and reduction != "none":
        return small_vocabulary.reduced(columns[0].numpy(), reduction), case, columns
    return reduce_rows(columns[0], reduction), case, columns


def check_labels_of(y: Tensor, vocab_size: int, mask_id: int, ignore_index: int, terms: Terms) -> None:
    forbidden = mask_id if terms.forbid_mask else None
    check_label_values(y, vocab_size, ignore_index, forbidden=forbidden, token_weights=terms.token_weights)


@diffusion_loss.register_fake
def _(
    logits, y, x, pk, pm, mask_id, ignore_index, reduction, uses_triton, predicts, check_labels, *flat_terms
):
    return fake_loss(
        y.shape[0], loss_dtype(logits.dtype), logits, reduction, uses_triton, terms_of(*flat_terms)
    )


def fake_loss(n, dtype, like, reduction, uses_triton, terms):
    loss = like.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    return (
        loss,
        like.new_empty((n,), dtype=torch.int32),
        like.new_empty(n_columns(uses_triton, terms), n, dtype=dtype),
    )


def n_columns(uses_triton: bool, terms: Terms, *, sliced: bool = False) -> int:
    """How many columns the statistics of rows have, or of rows in slices of a vocabulary."""
    if uses_triton:
        return len(load_kernels().columns(terms))
    plain = sliced_reference.N_SLICED + (terms != PLAIN) if sliced else stepwise_reference.N_STATISTICS
    return plain + len(reference.other_columns(terms))


@custom_op(
    f"{NAMESPACE}::diffusion_loss_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor logits, Tensor y, Tensor case, Tensor columns, str reduction, bool uses_triton, "
    f"SymInt mask_id, {TERMS}) -> Tensor",
)
def diffusion_loss_backward(
    upstream, logits, y, case, columns, reduction, uses_triton, mask_id, *flat_terms
):
    rows, statistics = as_rows(logits), (case, columns)
    how = {"divisor": divisor_of(reduction, len(y)), "mask_id": mask_id, "terms": terms_of(*flat_terms)}
    if uses_triton:
        early = EarlyGradient() if replays_graphs(logits.device) else left_with(columns)
        return finish_gradient(early, rows, y, statistics, upstream, **how)
    return row_gradients(False, rows, y, statistics, upstream, **how)


@diffusion_loss_backward.register_fake
def _(upstream, logits, y, case, columns, reduction, uses_triton, mask_id, *flat_terms):
    if not uses_triton:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = as_rows(logits)
    return load_kernels().empty_gradient_like(rows, rows.storage_offset() % (16 // rows.dtype.itemsize))


def _keep_for_backward(ctx, inputs, output):
    logits, y = inputs[:2]
    _, case, columns = output
    ctx.mask_id, (ctx.reduction, ctx.uses_triton) = inputs[5], inputs[7:9]
    token_weights, case_weights, logit_scale, *ctx.terms = inputs[-N_TERMS:]
    ctx.save_for_backward(logits, y, case, columns, token_weights, case_weights, logit_scale)
    ctx.mark_non_differentiable(case, columns)


def _differentiate(ctx, upstream, *_):
    *saved, token_weights, case_weights, logit_scale = ctx.saved_tensors
    gradient = diffusion_loss_backward(
        upstream, *saved, ctx.reduction, ctx.uses_triton, ctx.mask_id,
        token_weights, case_weights, logit_scale, *ctx.terms,
    )  # fmt: skip
    return gradient, *(None,) * (10 + N_TERMS)


diffusion_loss.register_autograd(_differentiate, setup_context=_keep_for_backward)
diffusion_loss_backward.register_autograd(forbid_backward)


# The case table and the rows of either.


@custom_op(
    f"{NAMESPACE}::case_sums",
    mutates_args=(),
    schema=f"(Tensor case, Tensor columns, bool uses_triton, {TERMS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def case_sums(case, columns, uses_triton, *flat_terms):
    # The kernel's results are views of one buffer, or one another, which an operator may not return.
    sums = sum_cases(uses_triton, (case, columns), terms_of(*flat_terms))
    return tuple(
        columns.new_empty(0) if part is None else part.clone() for part in (*sums, *(None,) * 3)[:6]
    )


@case_sums.register_fake
def _(case, columns, uses_triton, *flat_terms):
    terms = terms_of(*flat_terms)
    cells, nothing = columns.new_empty(3, 3), columns.new_empty(0)
    return (
        case.new_empty(3, 3, dtype=torch.int64),
        cells,
        columns.new_empty(3),
        torch.empty_like(cells) if terms.has_own_sums else nothing,
        torch.empty_like(cells) if terms.label_smoothing else columns.new_empty(0),
        columns.new_empty(()) if terms.z_loss else columns.new_empty(0),
    )


@custom_op(
    f"{NAMESPACE}::shown_rows",
    mutates_args=(),
    schema=f"(Tensor case, Tensor columns, bool uses_triton, {TERMS}) -> Tensor",
)
def shown_rows(case, columns, uses_triton, *flat_terms):
    _, values = row_values(uses_triton, (case, columns), terms_of(*flat_terms))
    return torch.stack(list(values.values()))


@shown_rows.register_fake
def _(case, columns, uses_triton, *flat_terms):
    return columns.new_empty(4 + terms_of(*flat_terms).entropy, columns.shape[1])
