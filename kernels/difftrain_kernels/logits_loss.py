"""fused_diffusion_loss: the masked-diffusion loss from logits."""

from __future__ import annotations

from torch import Tensor

from .cases import CaseTable
from .reference import diffusion_loss_reference
from .validation import Penalty, check_choice, check_label_values, check_loss_arguments

IMPLEMENTATIONS = ("auto", "reference")


def fused_diffusion_loss(
    logits: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty,
    pm: Penalty,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
    return_cases: bool = False,
    check_labels: bool = False,
) -> Tensor | tuple[Tensor, CaseTable]:
    """Cross-entropy weighted by what the model predicts; a drop-in for the eager loss.

    The formula is that of :func:`difftrain_kernels.diffusion_loss_reference`. Nothing passed in
    is modified.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64, any device; V >= 1.
        y: (...) int64 or int32, the targets; ``ignore_index`` where a position does not count.
        x: (...) int64 or int32, the ids the model saw.
        mask_id: id of [MASK], in [0, V).
        pk: penalty_keep_mask, the weight where a masked position is answered [MASK]. A number
            >= 0, or a 0-d float tensor on the logits' device.
        pm: penalty_mask_correct, the weight where a correct word is answered [MASK]; like ``pk``.
        ignore_index: the target that marks a position as not counted. Such positions have loss 0
            and gradient exactly 0, but stay in the mean's divisor.
        reduction: "mean" over all positions, "sum", or "none" (one loss per position).
        impl: "auto" takes the fastest implementation for the device; "reference" plain PyTorch.
        return_cases: also return the :class:`CaseTable` of this batch.
        check_labels: look for labels outside [0, V) and raise; waits for a GPU. Without it, such
            a label makes its own row's loss and gradient NaN.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): 0-d, or of y's shape for "none". An empty batch
        gives NaN for "mean" and 0 for "sum". With ``return_cases``, the pair (loss, CaseTable).

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device, id, penalty or choice that does not fit; the message
            says what was expected and what came.

    Source: the specification's ``diffusion_loss_function``.
    """
    check_loss_arguments(logits, y, x, mask_id, pk, pm, ignore_index, reduction)
    check_choice("impl", impl, IMPLEMENTATIONS)
    if check_labels:
        check_label_values(y, logits.shape[-1], ignore_index)
    return diffusion_loss_reference(
        logits, y, x, mask_id, pk, pm,
        ignore_index=ignore_index, reduction=reduction, return_cases=return_cases,
    )  # fmt: skip
