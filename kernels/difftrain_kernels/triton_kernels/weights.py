"""What a position's labels and the model's answer make of it: its case and its weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spacing import row_offset

IGNORED = tl.constexpr(9)  # case of an ignored position; the others are kind * 3 + answer


@triton.jit
def target_column(y, vocab_size, forbidden, terms):
    """The column of the target, -1 where there is none; and whether there is one."""
    is_label = (y >= 0) & (y < vocab_size)
    if terms.FORBID_MASK:
        is_label = is_label & (y != forbidden)
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


@triton.jit
def _cells(pk, pm, terms):
    """The nine weights by case."""
    if terms.case_weights is None:
        return (pk, 1.0, 1.0, pm, 1.0, 1.0, 1.0, 1.0, 1.0)
    elif terms.CASES_ON_DEVICE:
        first = terms.case_weights
        return (
            tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), tl.load(first + 4),
            tl.load(first + 5), tl.load(first + 6), tl.load(first + 7), tl.load(first + 8),
        )  # fmt: skip
    else:
        return terms.case_weights


@triton.jit
def weight_of_case(case, pk, pm, terms):
    """The weight by what was answered, of nine."""
    cells = _cells(pk, pm, terms)
    weight = tl.where(case == 0, cells[0], cells[8])
    for cell in tl.static_range(1, 8):
        weight = tl.where(case == cell, cells[cell], weight)
    return weight


@triton.jit
def expected_weight(kind, p_mask, p_target, pk, pm, terms):
    """The weight that the model's own answer would have on average."""
    cells = _cells(pk, pm, terms)
    by_mask = tl.where(kind == 0, cells[0], tl.where(kind == 1, cells[3], cells[6]))
    by_target = tl.where(kind == 0, cells[1], tl.where(kind == 1, cells[4], cells[7]))
    by_other = tl.where(kind == 0, cells[2], tl.where(kind == 1, cells[5], cells[8]))
    return by_other + (by_mask - by_other) * p_mask + (by_target - by_other) * p_target


@triton.jit
def load_token_weight(row, inside, terms):
    """The token's own factor in fp32, 1 without token weights."""
    if terms.token_weights is None:
        return 1.0
    else:
        pointers = terms.token_weights + row_offset(row, terms.token_spacing)
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def is_left_out(y, token_weight, ignore_index, terms):
    """Whether a position does not count: nothing of its row is read."""
    if terms.token_weights is None:
        return y == ignore_index
    else:
        return (y == ignore_index) | (token_weight == 0.0)


def penalty_arguments(pk: float | Tensor, pm: float | Tensor, device: torch.device) -> dict:
    """Both as numbers, or both as fp32 scalars on the device; no wait for the device either way."""
    on_device = isinstance(pk, Tensor) or isinstance(pm, Tensor)
    if on_device:
        pk, pm = (
            p.detach().to(torch.float32)
            if isinstance(p, Tensor)
            else torch.full((), p, dtype=torch.float32, device=device)
            for p in (pk, pm)
        )
    else:
        pk, pm = float(pk), float(pm)
    return {"pk": pk, "pm": pm, "PENALTIES_ON_DEVICE": on_device}
