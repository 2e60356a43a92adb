"""fused_linear_diffusion_loss: the masked-diffusion loss from hidden states; logits are never stored whole.

Tokens are taken in chunks (``chunks.py``; on a CPU those of a plain loss of few words in ``small_linear_loss.py``). Matrix
products of K*D*V multiplications each, where K of N positions take part (``positions.py``), and what is kept until backward:

| call | forward | backward | kept |
|---|---|---|---|
| no gradient wanted | 1 | - | - |
| "mean" or "sum" | 1, and 1 for each of hidden and weight that is trained | 0 | the gradients |
| "mean" or "sum", backward again (``retain_graph``) | - | the same once more | - |
| "none", or added to a ``.grad`` that is there | 1 | 1 for the logits again, and 1 for each that is trained | row statistics |

A bf16 weight's gradient whose fp32 sums would take too much memory costs up to 1 more (``weight_sums.py``): 0.15 at
D = 4096, V = 128256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import small_linear_loss
from .calls import Result, prepare_call
from .chunks import DEFAULT_WORKSPACE_MIB, ChunkedLoss
from .grad_accumulation import check_accumulates, grad_behind
from .implementation import (
    IMPLEMENTATIONS,
    forbid_second_derivative,
    load_kernels,
    make_table,
    no_grad,
    reduce_rows,
    row_values,
    sum_cases,
    uses_triton,
)
from .linear_operators import compiled_linear_diffusion_loss
from .term_validation import check_flag
from .validation import (
    Penalty,
    check_choice,
    check_count,
    check_linear_arguments,
    check_positive,
    check_untransformed,
    check_upstream,
    check_upstream_scale,
    is_traced,
)


def fused_linear_diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty | None = None,
    pm: Penalty | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
    return_cases: bool = False,
    check_labels: bool = False,
    chunk_tokens: int | None = None,
    workspace_mib: float = DEFAULT_WORKSPACE_MIB,
    counted: int | None = None,
    accumulate_into_grad: bool = False,
    upstream_scale: float | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    case_weights: Tensor | Sequence[Sequence[float]] | None = None,
    gate: str = "argmax",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid_mask: bool = False,
    logit_scale: float | Tensor | None = None,
    return_rows: bool = False,
    entropy: bool = False,
    shift: int = 0,
) -> Result:
    """The loss of ``hidden @ weight.T + bias`` without an N x V tensor, in memory or in the graph.

    The formula is that of :func:`difftrain_kernels.diffusion_loss_reference`, and so are the
    weights and the table: those of the logits rounded to the dtype they are computed in. Nothing
    passed in is modified. Under autocast everything but fp64 is computed in the autocast dtype, and
    each gradient comes back in its tensor's own dtype. The weight's and the bias's gradients are
    summed in fp32 over all chunks and rounded once; where a bf16 weight's sums are made in rounds
    (``workspace_mib``), again for an upstream gradient that is neither stated nor a power of two.

    Under ``torch.compile`` the loss is one operator, chunks and all. Penalties that change belong in
    0-d tensors there. ``upstream_scale`` and ``accumulate_into_grad`` are checked and then ignored. An upstream gradient scales the
    gradients into new tensors, and for one other than 1 a second backward scales what forward made,
    where an eager one computes everything again.

    Made in forward for "mean" and "sum", the gradients do not depend on what happens to the inputs
    afterwards; wherever backward computes logits again (see ``reduction``), changed inputs raise.

    Args:
        hidden: (..., D) fp32, bf16, fp16 or fp64, any device and strides; D >= 1. A fake tensor, or one
            on meta, gives results without contents, and nothing is launched.
        weight: (V, D), the output layer's (tied or not), 1 <= V < 2**31; like ``hidden`` in dtype,
            except under autocast.
        y: (...) int64 or int32, the targets; ``ignore_index`` where a position does not count.
        x: (...) int64 or int32, the ids the model saw.
        mask_id: id of [MASK], in [0, V).
        pk: penalty_keep_mask, a real number >= 0 or a 0-d float tensor on the same device, just as
            :func:`difftrain_kernels.fused_diffusion_loss` takes it.
        pm: penalty_mask_correct, like ``pk``.
        bias: (V,) or None.
        ignore_index: the target that marks a position as not counted: loss 0 and gradient exactly
            0, whatever its hidden state holds; it stays in the mean's divisor.
        reduction: "mean" over all positions, "sum", or "none" (one loss per position). For these
            two the gradients are made in forward, and a second backward makes them again. With
            "none", forward makes the losses only: backward, which alone knows each row's upstream
            gradient, computes every chunk's logits again, one matrix product more.
        impl: what computes the loss of a chunk: "auto" (the kernel on CUDA up to fp32, else the
            reference), "triton" or "reference".
        return_cases: also return the :class:`CaseTable` of this batch.
        check_labels: look for labels outside [0, V) and raise; waits for a GPU. Without it, such
            a label makes its own row's loss NaN, and with it the weight's gradient.
        chunk_tokens: positions per chunk, instead of as many as ``workspace_mib`` holds.
        workspace_mib: memory for the logits of one chunk and for what the loss makes of them, in
            MiB; at most 4096 positions, at least 1, whatever it says. All that a call holds beside its
            inputs and gradients is kept within four times as much where the kernel runs in bf16, at the
            price of rounds over the chunks; but for the weight that autocast casts.
        counted: at least as many as the positions that count (not ignored, token weight not 0), where
            the host knows it without asking the device. Then only so many take part in the matrix
            products, up to the next multiple of 128. Values stay but for the order of additions; the
            bits depend on that multiple. Where more positions count, loss, table and gradients are NaN
            ("none": the losses of some positions), and ``check_labels`` raises. Not needed on the CPU
            without the kernel: it looks, and raises. Compiled, a number that changes becomes a dynamic
            size at its second value.
        accumulate_into_grad: where ``weight.grad`` is there, backward adds the weight's gradient to it
            itself, so that it exists once; for one matrix product more, since the upstream gradient
            must be known. Without ``.grad`` autograd puts the gradient there, as ever. For a leaf
            without hooks, in one process. ``torch.autograd.grad`` gives the gradient back all the same.
        upstream_scale: the gradient that will reach this loss, where it is known. Not needed for
            speed: it spares the gradients of ``hidden`` a second rounding where the factor is not
            a power of two. Changes nothing for "none" and in fp16.
        token_weights, normalizer, case_weights, gate, softcap, label_smoothing, z_loss, forbid_mask,
            logit_scale, return_rows, entropy, shift: as in :func:`fused_diffusion_loss`. A position of
            token weight 0 may hold NaN in its hidden state, like an ignored one.

    Returns:
        The loss, fp32 (fp64 for fp64): 0-d, or of y's shape for "none". An empty batch gives NaN
        for "mean" and 0 for "sum". With ``return_cases`` or ``return_rows`` a tuple, as in
        :func:`fused_diffusion_loss`.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device, id, penalty, number or choice that does not fit, or a weight
            that nothing may be added to; the message says what was expected and what came.
        RuntimeError: in backward, a second derivative, or inputs that were changed where they are
            needed again.

    Source: the specification's ``diffusion_loss_function``; KERNELS section "Fused linear".
    """
    device_type = getattr(getattr(hidden, "device", None), "type", "cpu")
    is_autocast = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
    hidden, weight, bias = check_linear_arguments(hidden, weight, bias, is_autocast)
    vocab_size = weight.shape[0]
    call = prepare_call(
        hidden.shape[:-1], vocab_size, hidden, y, x, mask_id, pk, pm,
        ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, shift=shift,
        return_cases=return_cases, return_rows=return_rows, entropy=entropy, token_weights=token_weights,
        case_weights=case_weights, gate=gate, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        forbid_mask=forbid_mask, logit_scale=logit_scale,
    )  # fmt: skip
    check_choice("impl", impl, IMPLEMENTATIONS)
    upstream_scale = check_upstream_scale(upstream_scale)
    workspace_mib = check_positive("workspace_mib", workspace_mib)
    if chunk_tokens is not None:
        chunk_tokens = check_positive("chunk_tokens", chunk_tokens, integer=True)
    if counted is not None:
        counted = check_count("counted", counted)
    if check_flag("accumulate_into_grad", accumulate_into_grad) and weight.requires_grad:
        check_accumulates("weight", weight)
    check_untransformed("fused_linear_diffusion_loss")

    dtype = hidden.dtype
    if is_autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    is_fused = uses_triton(impl, hidden, dtype)
    workspace_bytes = int(min(workspace_mib * 2**20, 2**62))
    if torch.compiler.is_compiling() or is_traced(hidden):
        return compiled_linear_diffusion_loss(
            hidden, weight, bias, call, uses_triton=is_fused, check_labels=check_labels, dtype=dtype,
            chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes, counted=counted,
        )  # fmt: skip
    chunked = ChunkedLoss.plan(
        call.terms, call.y, call.mask_id, call.ignore_index, call.reduction, dtype, is_fused,
        chunk_tokens, workspace_bytes, counted, call.stated(upstream_scale),
    )  # fmt: skip
    if check_labels:
        call.check_label_values()
        chunked.check_counted()
    adds = accumulate_into_grad and weight.grad is not None
    if not adds and small_linear_loss.takes(hidden, weight, bias, chunked):
        return small_linear_loss.small_linear_loss(hidden, weight, bias, call, chunked)
    weighting, head = (call.x, call.pk, call.pm), (_flat(hidden), weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head):
        statistics = []
        loss = _LinearLoss.apply(*head, chunked, weighting, adds, statistics)
    else:
        statistics, _ = chunked.run(*head, weighting=weighting)
        loss = reduce_rows(statistics[1].select(0, 0), call.reduction)
    return call.result(
        loss,
        lambda: make_table(sum_cases(is_fused, statistics, call.terms), call.y.numel()),
        lambda: row_values(is_fused, statistics, call.terms),
    )


def _flat(hidden: Tensor) -> Tensor:
    """(N, D) where that is a view; a slice of sequences stays as it is, and its chunks are copied one by one."""
    if hidden.dim() == 2:
        return hidden
    try:
        return hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return hidden


# torch 2.11 cannot trace it.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


class _LinearLoss(torch.autograd.Function):
    """(hidden (..., D), weight, bias, ..., list) -> loss; the row statistics go into the list, which is no output of
    autograd's."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, chunked, weighting, adds, kept):
        # Else backward makes them, with the upstream gradient itself.
        is_made_now = chunked.reduction != "none" and not adds
        needs = tuple(ctx.needs_input_grad[:3]) if is_made_now else (False,) * 3
        statistics, gradients = chunked.run(hidden, weight, bias, needs, weighting=weighting)
        ctx.chunked = chunked.kept()
        ctx.adds, ctx.made = adds, gradients if is_made_now else None
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.shape = hidden.shape
        ctx.save_for_backward(hidden, weight, bias, chunked.y, chunked.terms.token_weights, *statistics)
        kept += statistics
        return reduce_rows(statistics[1].select(0, 0), chunked.reduction)

    @staticmethod
    def backward(ctx, upstream):
        into = grad_behind(ctx.next_functions[1][0]) if ctx.adds and ctx.needs_input_grad[1] else None
        sources = (upstream, *ctx.saved_tensors[:3]) if torch.is_grad_enabled() else ()
        with no_grad():
            gradients = _LinearLoss._gradients(ctx, check_upstream(upstream), into)
            if gradients[0] is not None and len(ctx.shape) != 2:
                gradients[0] = gradients[0].view(ctx.shape)
        if torch.is_grad_enabled():
            gradients = forbid_second_derivative(gradients, *sources)
        return *gradients, None, None, None, None

    @staticmethod
    def _gradients(ctx, upstream, into):
        chunked, needs = ctx.chunked, tuple(ctx.needs_input_grad[:3])
        # What forward made is given away once. A second backward makes it again.
        made, ctx.made = ctx.made, None
        rows = None
        if chunked.reduction == "none" or ctx.adds:
            rows = upstream.reshape(-1) if upstream.dim() else upstream / chunked.divisor
            chunked, upstream = replace(chunked, made_for=1.0, divisor=1), upstream.new_ones(())
        if made is None:
            hidden, weight, bias, y, token_weights, *saved = ctx.saved_tensors
            chunked = replace(chunked, y=y, terms=replace(chunked.terms, token_weights=token_weights))
            _, made = chunked.run(hidden, weight, bias, needs, saved=saved, upstream=rows, into=into)
        if into is not None:
            made = made[0], None, made[2]
        return [_scaled(g, upstream, chunked, dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]


def _scaled(
    made: Tensor | None, upstream: Tensor, chunked: ChunkedLoss, dtype: torch.dtype
) -> Tensor | None:
    """A gradient made for ``chunked.made_for``, for this upstream gradient and in the tensor's dtype."""
    if made is None:
        return None
    if made.dtype != dtype:
        factor = upstream if chunked.made_for == 1 else upstream / chunked.made_for
        return torch.mul(made, factor, out=torch.empty_like(made, dtype=dtype))
    if chunked.uses_triton:
        rows = made if made.dim() == 2 else made.view(1, -1)
        # Compared on the device: where the upstream gradient is the expected one, nothing is read or written.
        load_kernels().launch_rescale(rows, upstream, stated=chunked.made_for)
    elif upstream.device.type != "cpu" or upstream != chunked.made_for:
        made.mul_(upstream / chunked.made_for)
    return made
