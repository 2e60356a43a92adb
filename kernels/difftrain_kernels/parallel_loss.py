"""vocab_parallel_diffusion_loss: the loss of logits whose vocabulary is spread over several processes.

Every process reads its own slice once and tells the others five numbers a row; that is the only
exchange, 20 bytes a row and process (40 in fp64). From all messages each process computes the same
losses, bit for bit, and in backward the gradient of its own slice, without talking again. A maximum
and a sum on the way (all-reduce) would take two exchanges, and what a reduction makes of NaN
depends on the backend.

Ties need no comparison of columns: slices are in the order of the vocabulary, so the first process
that holds the highest logit also holds the first maximum, and knows what was answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor

from . import operators, reference, sliced_reference
from .calls import LossCall, Result, prepare_call
from .cases import CaseTable
from .implementation import (
    IMPLEMENTATIONS,
    as_rows,
    divisor_of,
    forbid_second_derivative,
    load_kernels,
    make_table,
    reduce_rows,
    row_values,
    sum_cases,
    uses_triton,
)
from .validation import (
    LOGITS_DTYPES,
    Penalty,
    check_choice,
    check_tensor,
    check_untransformed,
    check_upstream,
    is_dtensor,
    is_traced,
    shown,
)


def vocab_parallel_diffusion_loss(
    logits: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty | None = None,
    pm: Penalty | None = None,
    *,
    slice_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
    return_cases: bool = False,
    check_labels: bool = False,
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
    """The loss of logits of which each process holds some columns: a head split over the vocabulary.

    The formula is that of :func:`difftrain_kernels.diffusion_loss_reference` for the whole rows, and
    so are ties, NaN and infinities. All processes of the group call it together, with everything
    but the logits equal, and get the same loss and table; where that differs the result is undefined,
    and a process that raises leaves the others waiting. One all-gather of (5, N) fp32 in forward
    (fp64 for fp64 logits), nothing in backward; no wait for the device. Nothing passed in is modified.

    Every process calls backward on its own copy of the loss, with an equal upstream gradient, and
    gets that gradient's part for its own columns. Copies are not added up: their sum would count
    each loss once per process.

    Args:
        logits: (..., V_r) fp32, bf16, fp16 or fp64: the process's columns, where V_r may be 0; or a
            DTensor (..., V) on a mesh of one dimension, sharded on its last dimension. A fake tensor, or
            one on meta, gives results without contents: nothing is launched, and nobody is asked.
        y: (...) int64 or int32, the targets in the whole vocabulary; ``ignore_index`` where a
            position does not count.
        x: (...) int64 or int32, the ids the model saw.
        mask_id: id of [MASK], in [0, V).
        pk: penalty_keep_mask, a number >= 0 or a 0-d float tensor on the logits' device.
        pm: penalty_mask_correct, like ``pk``.
        slice_sizes: how many columns each process of the group holds, in the order of ranks, which
            is that of the vocabulary; their sum is V. ``[V // n] * n`` for an even split. Must be
            None for a DTensor, which knows.
        group: the processes that share the vocabulary; all by default. None for a DTensor.
        ignore_index: the target that marks a position as not counted: loss 0 and gradient exactly 0.
        reduction: "mean" over all positions, "sum", or "none" (one loss per position).
        impl: "auto" takes "triton" for CUDA logits up to fp32, else "reference", which here is
            eager PyTorch; the same on all processes.
        return_cases: also return the :class:`CaseTable` of this batch.
        check_labels: look for labels outside [0, V) and raise; waits for a GPU. Without it, such
            a label makes its own row's loss and gradient NaN.
        token_weights, normalizer, case_weights, gate, softcap, label_smoothing, z_loss, forbid_mask,
            logit_scale, return_rows, entropy, shift: as in :func:`fused_diffusion_loss`; equal on all
            processes. Smoothing adds two numbers a row to the all-gather, entropy one.

    Returns:
        The loss, fp32 (fp64 for fp64 logits), a plain tensor: 0-d, or of y's shape for "none". An
        empty batch gives NaN for "mean" and 0 for "sum". With ``return_cases`` or ``return_rows`` a
        tuple, as in :func:`fused_diffusion_loss`.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: an argument that does not fit; the message says what was expected and what came.
        RuntimeError: in backward, a second derivative, or logits that were modified since.

    Source: the specification's ``diffusion_loss_function``; KERNELS section "Numerics".
    """
    if is_dtensor(logits):
        logits, slice_sizes, group = _from_dtensor(logits, slice_sizes, group)
    logits = check_tensor("logits", logits, LOGITS_DTYPES)
    if logits.dim() == 0:
        raise ValueError("logits must have shape (..., V_r), got ()")
    rank, sizes = _check_slices(logits.shape[-1], slice_sizes, group)
    vocab_size = sum(sizes)
    call = prepare_call(
        logits.shape[:-1], vocab_size, logits, y, x, mask_id, pk, pm,
        ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, shift=shift,
        return_cases=return_cases, return_rows=return_rows, entropy=entropy, token_weights=token_weights,
        case_weights=case_weights, gate=gate, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        forbid_mask=forbid_mask, logit_scale=logit_scale,
    )  # fmt: skip
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_untransformed("vocab_parallel_diffusion_loss")
    if check_labels and not is_traced(logits):
        call.check_label_values()
    share = _Share(call, sizes, sum(sizes[:rank]), group, uses_triton(impl, logits, logits.dtype))
    statistics: list[Tensor] = []
    loss = _ParallelLoss.apply(logits, call.y, share, statistics)
    return call.result(loss, lambda: share.table(statistics), lambda: share.row_values(statistics))


def _from_dtensor(logits, slice_sizes, group) -> tuple[Tensor, list[int], dist.ProcessGroup]:
    """The local columns of a DTensor, the sizes of all slices, and who holds them."""
    from torch.distributed.tensor import Shard

    if slice_sizes is not None or group is not None:
        raise ValueError("slice_sizes and group must be None where logits are a DTensor, which has both")
    mesh, last = logits.device_mesh, logits.dim() - 1
    ranks = mesh.mesh.tolist()
    # A group counts its ranks upwards, whatever their order in the mesh.
    if tuple(logits.placements) != (Shard(last),) or ranks != sorted(ranks):
        raise ValueError(
            f"logits must have placements (Shard(dim={last}),) on a mesh of ascending ranks, got "
            f"{tuple(logits.placements)} on {ranks}; else pass logits.to_local(), slice_sizes and group"
        )
    vocab_size = logits.shape[-1]
    widest = -(-vocab_size // len(ranks))  # a DTensor is split as torch.chunk does
    sizes = [max(0, min(widest, vocab_size - i * widest)) for i in range(len(ranks))]
    return logits.to_local(), sizes, mesh.get_group()


def _check_slices(size: int, slice_sizes: object, group) -> tuple[int, list[int]]:
    """This process's rank in the group, and the sizes of all slices; raises where they do not fit."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed must be initialised, got no process group")
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group must hold this process, got a group without it")
    are_ints = isinstance(slice_sizes, Sequence) and all(
        isinstance(s, Integral) and not isinstance(s, bool) for s in slice_sizes
    )
    if not are_ints:
        raise TypeError(f"slice_sizes must be a sequence of {n} ints, got {shown(repr(slice_sizes))}")
    sizes = [int(s) for s in slice_sizes]
    if len(sizes) != n or min(sizes) < 0 or sum(sizes) == 0:
        raise ValueError(f"slice_sizes must be {n} sizes >= 0, not all 0, got {sizes}")
    if sizes[rank] != size:
        raise ValueError(f"logits must have slice_sizes[{rank}] = {sizes[rank]} columns, got {size}")
    return rank, sizes


class _ParallelLoss(torch.autograd.Function):
    """(logits, y, share, list) -> loss; the row statistics go into the list, which is no output of autograd's."""

    @staticmethod
    def forward(ctx, logits, y, share, kept):
        statistics = share.statistics(as_rows(logits), y)
        ctx.share = share
        ctx.save_for_backward(logits, y, *statistics)
        kept += statistics
        row_loss = statistics[1].select(0, 0)  # [0] looks for the device, which a fake tensor need not have
        return reduce_rows(row_loss, share.call.reduction)

    @staticmethod
    def backward(ctx, upstream):
        logits, y, *statistics = ctx.saved_tensors
        with torch.no_grad():
            received = check_upstream(upstream)
            received = received.reshape(-1) if received.dim() else received
            gradient = ctx.share.gradient(as_rows(logits), y, statistics, received).view(logits.shape)
        if torch.is_grad_enabled():
            (gradient,) = forbid_second_derivative([gradient], upstream, logits)
        return gradient, None, None, None


@dataclass(frozen=True)
class _Share:
    """One process's share of the vocabulary, and what all processes have in common."""

    call: LossCall
    sizes: list[int]
    start: int  # the slice's first column in the whole vocabulary
    group: dist.ProcessGroup | None
    uses_triton: bool

    def statistics(self, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(case (N,), columns (n, N)) of the whole rows."""
        if is_traced(rows):  # nobody is asked
            dtype = torch.promote_types(rows.dtype, torch.float32)
            n_columns = operators.n_columns(self.uses_triton, self.call.terms, sliced=True)
            return y.new_empty(len(y), dtype=torch.int32), rows.new_empty(n_columns, len(y), dtype=dtype)
        call, terms = self.call, self.call.terms
        kernels = load_kernels() if self.uses_triton else None
        if rows.shape[1] == 0:
            size = kernels.message_size(terms) if self.uses_triton else sliced_reference.message_size(terms)
            dtype = torch.promote_types(rows.dtype, torch.float32)
            message = rows.new_zeros(size, len(rows), dtype=dtype)
        elif self.uses_triton:
            message = kernels.launch_slice(
                rows, y, call.mask_id, call.ignore_index, start=self.start, terms=terms
            )
        else:
            message = sliced_reference.describe_slice(rows, y, call.mask_id, start=self.start, terms=terms)
        combine = kernels.launch_combine if self.uses_triton else sliced_reference.combine_slices
        labels = (y, *call.labels[1:])
        return combine(self._exchange(message), *labels, vocab_size=call.vocab_size, terms=terms)

    def _exchange(self, message: Tensor) -> Tensor:
        """The messages of all slices that have columns, (slices, n, N), in the vocabulary's order."""
        messages = message.new_empty(len(self.sizes), *message.shape)
        if len(self.sizes) == 1 or message.numel() == 0:
            messages.copy_(message)
        else:
            # torch 2.13 gave it this name; before it had the other one.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(messages.view(-1, message.shape[1]), message, group=self.group)
        if 0 in self.sizes:
            messages = torch.stack([m for m, size in zip(messages, self.sizes, strict=True) if size])
        return messages

    def gradient(self, rows: Tensor, y: Tensor, statistics: Sequence[Tensor], upstream: Tensor) -> Tensor:
        """The gradient of this slice, (N, V_r) in the logits' dtype."""
        if is_traced(rows):
            return torch.empty_like(rows)
        call = self.call
        options = {
            "divisor": divisor_of(call.reduction, len(y)),
            "mask_id": call.mask_id - self.start,
            "terms": call.terms,
        }
        if not self.uses_triton or rows.shape[1] == 0:
            return sliced_reference.slice_gradients(
                rows, y - self.start, statistics, upstream, vocab_size=call.vocab_size, **options
            )
        kernels = load_kernels()
        statistics = kernels.RowStatistics(*statistics)
        return kernels.launch_gradient(rows, y - self.start, statistics, upstream, **options)

    def table(self, statistics: Sequence[Tensor]) -> CaseTable:
        if is_traced(self.call.y):
            return operators.traced_table(statistics, self.call, self.uses_triton)
        if self.uses_triton:
            return make_table(sum_cases(True, statistics, self.call.terms), self.call.y.numel())
        scores = sliced_reference.sliced_scores(statistics, self.call.terms)
        return reference.tabulate_cases(scores, self.call.terms)

    def row_values(self, statistics: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if is_traced(self.call.y):
            return operators.traced_rows(statistics, self.call, self.uses_triton)
        if self.uses_triton:
            return row_values(True, statistics, self.call.terms)
        scores = sliced_reference.sliced_scores(statistics, self.call.terms)
        return reference.row_values(scores, self.call.terms)
