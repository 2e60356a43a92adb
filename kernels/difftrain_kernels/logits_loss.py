"""fused_diffusion_loss: the masked-diffusion loss from logits.

The gradient is made in forward, with the loss, where its upstream gradient is stated (``upstream_scale``)
or predicted (``upstream_prediction.py``), and backward compares on the device; else, and where another one
came, in backward. The bits are the same. What each way moves is in docs/loss.md, "What is moved". Nothing
waits for the device.

Memory: beside the logits one buffer of their size, their gradient, from forward to backward where it is made
in forward, else from backward on. At the end of backward both exist either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import LossCall, Result, prepare_call
from .cpu_loss import cpu_loss
from .early_gradient import EarlyGradient, finish_gradient, score_rows_early
from .implementation import (
    IMPLEMENTATIONS,
    as_rows,
    divisor_of,
    forbid_second_derivative,
    load_kernels,
    make_table,
    reduce_rows,
    row_gradients,
    row_values,
    score_rows,
    sum_cases,
    uses_triton,
)
from .operators import compiled_diffusion_loss
from .reference import reference_loss
from .term_validation import check_flag
from .upstream_prediction import find_expectation
from .validation import (
    Penalty,
    active_transform,
    check_choice,
    check_logits,
    check_overwritable,
    check_upstream,
    check_upstream_scale,
    is_traced,
)


def fused_diffusion_loss(
    logits: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty | None = None,
    pm: Penalty | None = None,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
    return_cases: bool = False,
    check_labels: bool = False,
    upstream_scale: float | None = None,
    upstream_prediction: bool = True,
    overwrite_logits: bool = False,
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
    """Cross-entropy weighted by what the model predicts; a drop-in for the eager loss.

    The formula is that of :func:`difftrain_kernels.diffusion_loss_reference`. Nothing passed in
    is modified, unless ``overwrite_logits`` asks for it.

    Under ``torch.compile`` the loss is one operator, with the bits of an eager call of the same
    implementation ("reference", which autograd records only eagerly, up to roundings). Penalties that
    change belong in 0-d tensors there. An operator does not write over its inputs, so ``upstream_scale`` and
    ``overwrite_logits``, which change no result, are checked and then ignored.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64, any device and strides; 1 <= V < 2**31. A fake
            tensor, or one on meta, gives results without contents, and nothing is launched.
        y: (...) int64 or int32, the targets; ``ignore_index`` where a position does not count.
        x: (...) int64 or int32, the ids the model saw.
        mask_id: id of [MASK], in [0, V).
        pk: penalty_keep_mask, the weight where a masked position is answered [MASK]. A real number
            >= 0 (int, float, Fraction, Decimal, a scalar or 0-d array of numpy's; True and False are
            1 and 0), taken as ``float(pk)``; or a 0-d float tensor on the logits' device, which gets
            no gradient. 1 by default.
        pm: penalty_mask_correct, the weight where a correct word is answered [MASK]; like ``pk``.
        ignore_index: the target that marks a position as not counted, within y's dtype. Such
            positions have loss 0 and gradient exactly 0, but stay in the mean's divisor.
        reduction: "mean" over all positions, "sum", or "none" (one loss per position).
        impl: "auto" takes "triton" for CUDA logits up to fp32, on a CPU the reference in blocks of rows,
            made for speed, and else the reference; "triton" the fused kernel (on CPU tensors too where
            TRITON_INTERPRET=1); "reference" plain PyTorch under autograd.
        return_cases: also return the :class:`CaseTable` of this batch.
        check_labels: look for labels outside [0, V) and raise; waits for a GPU. Without it, such
            a label makes its own row's loss and gradient NaN.
        upstream_scale: the gradient that will reach this loss, such as 1 / accumulation steps,
            where it is known. The gradient is then made together with the loss, and backward only
            checks the statement on the device. Any other upstream gradient gives the exact
            gradient too, but costs a second pass.
        upstream_prediction: where none is stated, the gradient that the last losses of this kind received
            is expected, and checked in the same way; False: the gradient is made in backward. No result
            changes. The environment variable DIFFTRAIN_UPSTREAM_PREDICTION=0 turns it off everywhere.
        overwrite_logits: the gradient may be written over the logits (no buffer of their size).
            Where the reference runs, or no gradient is wanted, or under ``torch.compile``, they
            stay as they are. A later forward use sees the gradient. Any other use of their values
            in backward then raises, and so does a second backward unless ``upstream_scale`` is
            stated. With it, an upstream gradient other than stated rounds each element twice.
        token_weights: a factor of each position's loss, any real dtype, of a shape that broadcasts to
            y's: (B, T), (B, 1), (T,) or (). It is read where it lies, and is a constant: one that
            requires a gradient is refused. A position of weight 0 does not count, as if it were
            ignored; a negative one counts, and NaN or infinity shows in the loss.
        normalizer: what the sum over positions is divided by in place of their number, for "mean" and
            "sum" alike: a number >= 0, or a 0-d tensor on the device. 0 gives loss 0 and,
            where loss and gradient of each position are finite, gradient 0.
        case_weights: the nine weights by case in place of ``pk`` and ``pm``: three rows (masked, intact,
            corrupted) of three numbers >= 0 (answered [MASK], the target, something else), or a (3, 3)
            floating-point tensor on the device.
        gate: "argmax" weighs a position by what the model answers; "probability" by what it would answer
            on average, so that a weight fades in with the probability of [MASK] instead of jumping.
        softcap: c > 0: logits become c * tanh(logit / c) before everything else.
        label_smoothing: share in [0, 1) of the target that is spread over the vocabulary.
        z_loss: factor >= 0 of the squared log-sum-exp that is added to each position that counts, times
            its token weight, not its weight by case.
        forbid_mask: [MASK] takes part in nothing, as if its logit were -inf; its gradient is exactly 0,
            and as a target it is no label.
        logit_scale: a factor > 0 of the logits, a number or a 0-d floating-point tensor on the device; a
            constant. Before ``softcap``.
        return_rows: also return the :class:`RowOutputs` of this batch, from the same pass.
        entropy: with their entropy.
        shift: how many positions earlier the logits of a position stand, along y's last dimension: 1 for
            models that predict the next token. Positions without logits do not count.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): 0-d, or of y's shape for "none". An empty batch
        gives NaN for "mean" and 0 for "sum". With ``return_cases`` or ``return_rows`` a tuple: (loss,
        CaseTable), (loss, RowOutputs) or (loss, CaseTable, RowOutputs).

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device, id, penalty or choice that does not fit; the message
            says what was expected and what came.
        RuntimeError: in backward, a second derivative, or logits that were modified since.

    Source: the specification's ``diffusion_loss_function``.
    """
    logits = check_logits(logits)
    call = prepare_call(
        logits.shape[:-1], logits.shape[-1], logits, y, x, mask_id, pk, pm,
        ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, shift=shift,
        return_cases=return_cases, return_rows=return_rows, entropy=entropy, token_weights=token_weights,
        case_weights=case_weights, gate=gate, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        forbid_mask=forbid_mask, logit_scale=logit_scale,
    )  # fmt: skip
    check_choice("impl", impl, IMPLEMENTATIONS)
    upstream_scale = check_upstream_scale(upstream_scale)
    check_flag("upstream_prediction", upstream_prediction)
    if overwrite_logits:
        check_overwritable(logits)
    is_fused = uses_triton(impl, logits, logits.dtype)
    if torch.compiler.is_compiling() or is_traced(logits):
        return compiled_diffusion_loss(
            logits, call, uses_triton=is_fused, predicts=upstream_prediction, check_labels=check_labels
        )
    if check_labels:
        call.check_label_values()
    if not is_fused:
        is_stepwise = impl == "auto" and logits.device.type == "cpu" and not active_transform()
        return (cpu_loss if is_stepwise else reference_loss)(logits, call)
    return _triton_loss(logits, call, call.stated(upstream_scale), upstream_prediction, overwrite_logits)


def _triton_loss(
    logits: Tensor, call: LossCall, stated: float | None, predicts: bool, overwrite: bool
) -> Result:
    if torch.is_grad_enabled() and logits.requires_grad:
        expectation = None
        # Over the logits a gradient made for another upstream gradient could not be made again.
        if predicts and stated is None and not overwrite:
            expectation = find_expectation(logits, call.y.shape[0], call.reduction)
        statistics = []
        loss = _TritonLoss.apply(logits, (call, stated, expectation, overwrite), statistics)
    else:
        statistics = score_rows(True, as_rows(logits, uneven=True), *call.labels, terms=call.terms)
        loss = reduce_rows(statistics[1].select(0, 0), call.reduction)
    return call.result(
        loss,
        lambda: make_table(sum_cases(True, statistics, call.terms), call.y.numel()),
        lambda: row_values(True, statistics, call.terms),
    )


class _TritonLoss(torch.autograd.Function):
    """(logits, how, list) -> loss; the row statistics go into the list, which is no output of autograd's."""

    @staticmethod
    def forward(ctx, logits, how, kept):
        call, stated, expectation, overwrite = how
        rows = as_rows(logits, uneven=True)
        ctx.divisor = divisor_of(call.reduction, call.y.shape[0])
        ctx.stated, ctx.overwrite, ctx.made_for = stated, overwrite, None
        ctx.mask_id, ctx.terms, ctx.early = call.mask_id, call.terms.kept(), EarlyGradient()
        if expectation is not None:
            statistics, ctx.early = score_rows_early(
                rows, call.labels, terms=call.terms, divisor=ctx.divisor, expectation=expectation
            )
        elif stated is None:
            statistics = load_kernels().launch_loss(rows, *call.labels, terms=call.terms)
        else:
            statistics, gradient = load_kernels().launch_loss_and_gradient(
                rows, *call.labels, terms=call.terms, upstream=stated, divisor=ctx.divisor,
                gradient_out=rows if overwrite else None,
            )  # fmt: skip
            if overwrite:  # the gradient is the logits, which are saved
                torch.autograd.graph.increment_version(logits)
            else:
                ctx.early = EarlyGradient(gradient, stated)
        ctx.save_for_backward(logits, call.y, *statistics)
        kept += statistics
        return reduce_rows(statistics.row_loss, call.reduction)

    @staticmethod
    def backward(ctx, upstream):
        if not torch.is_grad_enabled():
            return _TritonLoss._gradient(ctx, check_upstream(upstream)), None, None
        sources = upstream, ctx.saved_tensors[0]
        with torch.no_grad():
            gradient = _TritonLoss._gradient(ctx, check_upstream(upstream))
        return *forbid_second_derivative([gradient], *sources), None, None

    @staticmethod
    def _gradient(ctx, upstream):
        logits, y, *statistics = ctx.saved_tensors
        rows = as_rows(logits, uneven=True)
        upstream = upstream.reshape(-1) if upstream.dim() else upstream
        how = {"divisor": ctx.divisor, "mask_id": ctx.mask_id, "terms": ctx.terms}
        if ctx.overwrite and ctx.stated is not None:
            gradient = _scale_overwritten(ctx, rows, upstream)
        elif ctx.overwrite:
            gradient = row_gradients(True, rows, y, tuple(statistics), upstream, overwrite=True, **how)
            torch.autograd.graph.increment_version(logits)
        else:
            gradient = finish_gradient(ctx.early, rows, y, tuple(statistics), upstream, **how)
        # Over the logits it must not be the saved tensor itself.
        gradient = gradient.detach() if ctx.overwrite else gradient
        return gradient if gradient.dim() == logits.dim() else gradient.view(logits.shape)


def _scale_overwritten(ctx, gradient: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that lies over the logits, for this upstream gradient."""
    if ctx.made_for is None:
        load_kernels().launch_rescale(gradient, upstream, stated=ctx.stated)
        ctx.made_for = upstream.clone()
        return gradient
    ratio = torch.where(upstream == ctx.made_for, 1.0, upstream / ctx.made_for)
    return (gradient * (ratio.view(*gradient.shape[:-1], 1) if ratio.dim() else ratio)).to(gradient.dtype)
