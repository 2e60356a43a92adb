"""What a position's labels and the model's answer make of it: its case and its weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORED = tl.constexpr(9)  # case of an ignored position; the others are kind * 3 + answer


@triton.jit
def target_column(y, vocab_size):
    """The column of the target, -1 where there is none; and whether there is one."""
    is_label = (y >= 0) & (y < vocab_size)
    return tl.where(is_label, y, -1).to(tl.int32), is_label


@triton.jit
def load_penalty(penalty, ON_DEVICE: tl.constexpr):
    """A penalty that was passed as a number or as a pointer."""
    if ON_DEVICE:
        return tl.load(penalty)
    else:
        return penalty


@triton.jit
def kind_and_weight(x, y, says_mask, mask_id, pk, pm):
    """0 masked, 1 intact, 2 corrupted; and the weight of the position."""
    is_masked = (x == mask_id) & (y != mask_id)
    is_intact = (x == y) & (x != mask_id)
    kind = tl.where(is_masked, 0, tl.where(is_intact, 1, 2))
    weight = tl.where(is_masked & says_mask, pk, 1.0)
    return kind, tl.where(is_intact & says_mask, pm, weight)


def penalty_arguments(pk: float | Tensor, pm: float | Tensor, device: torch.device) -> dict:
    """Both as numbers, or both as fp32 scalars on the device; no wait for the device either way."""
    on_device = isinstance(pk, Tensor) or isinstance(pm, Tensor)
    if on_device:
        pk, pm = (
            p.detach().to(torch.float32) if isinstance(p, Tensor) else torch.full((), p, device=device)
            for p in (pk, pm)
        )
    else:
        pk, pm = float(pk), float(pm)
    return {"pk": pk, "pm": pm, "PENALTIES_ON_DEVICE": on_device}
