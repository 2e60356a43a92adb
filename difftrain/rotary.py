"""Rotary positions: queries and keys turned by the angles of their places."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BASE = 10000.0


def rotation_table(length: int, head_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosine and sine of each position's angles: (length, head_size / 2, 2) fp32.

    Source: Su et al., "RoFormer" (2021), in the half-split form.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), BASE ** (-exponent))
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


class Rotation(NamedTuple):
    """What the layers of one pass share to rotate by complex numbers.

    Attributes:
        turns: (T, D) complex, a number for every pair of a position's queries and keys. Rows that lie whole are
            multiplied twice as fast as heads one by one.
        back_turns: (T, D), their conjugates.
        order: (3D,) int64, the rows of a weight that :func:`in_pairs` takes.
        back_order: (3D,) int64, the inverse permutation.
    """

    turns: Tensor
    back_turns: Tensor
    order: Tensor
    back_order: Tensor


def rotation(table: Tensor, n_head: int) -> Rotation | Tensor:
    """Positions' cosines and sines (T, head_size / 2, 2) as :func:`rotated` takes them, in fp32 or wider."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    # Compilers make one loop of the plain formula, and of complex numbers none; not every device has these.
    if torch.compiler.is_compiling() or table.device.type not in ("cpu", "cuda"):
        return table
    turns = torch.view_as_complex(table.repeat(1, 2 * n_head, 1))
    order = in_pairs(torch.arange(3 * turns.shape[1], dtype=torch.int64, device=table.device), n_head)
    return Rotation(turns, turns.conj_physical(), order, order.argsort())


def in_pairs(rows: Tensor, n_head: int) -> Tensor:
    """A copy of the weight (3D, D) or bias (3D,) of queries, keys and values, in the order of pairs.

    In each head's queries and keys the features i and i + head_size / 2, which are rotated together, come
    to stand side by side. Scores do not depend on the order of features, and to reorder a weight costs less
    than to reorder what it makes of every token.
    """
    size = rows.shape[0] // 3
    qk, v = rows.split((2 * size, size))
    halves = qk.view(2 * n_head, 2, size // n_head // 2, *rows.shape[1:])
    return torch.cat((halves.transpose(1, 2).reshape(qk.shape), v))


def rotated(
    h: Tensor, weight: Tensor, bias: Tensor | None, rotation: Rotation | Tensor, n_head: int
) -> tuple[Tensor, ...]:
    """Queries, keys and values of h (B, T, D), (B, n_head, T, D / n_head) each; the first two rotated, in pairs' order.

    Args:
        weight, bias: of the linear layer that makes them, (3D, D) and (3D,).
        rotation: of the T positions, made by :func:`rotation`.
    """
    if isinstance(rotation, Rotation):
        return _Rotated.apply(h, weight, bias, n_head, *rotation)
    bias = None if bias is None else in_pairs(bias, n_head)
    q, k, v = heads(F.linear(h, in_pairs(weight, n_head), bias), n_head)
    return _turned(q, rotation), _turned(k, rotation), v


def heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as views of (B, T, 3D): (B, n_head, T, D / n_head) each."""
    return qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4).unbind()


def _turned(heads: Tensor, table: Tensor) -> Tensor:
    """(B, n_head, T, head_size) with its pairs turned by (T, head_size / 2, 2)."""
    cos, sin = table.unbind(-1)
    a, b = heads.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(heads.dtype)


class _Rotated(torch.autograd.Function):
    """The linear layer, and the pairs of its result multiplied in place: one pass forward and one backward.

    It gives and takes heads, since each view that autograd knows of costs as much as a small operation.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, n_head: int,
        turns: Tensor, back_turns: Tensor, order: Tensor, back_order: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)
            is_wide = h.dtype == torch.float64  # which autocast leaves alone
            h, weight, bias = (t if t is None or is_wide else t.to(dtype) for t in (h, weight, bias))
        weight = weight.index_select(0, order)
        qkv = F.linear(h, weight, None if bias is None else bias.index_select(0, order))
        ctx.save_for_backward(h, weight, back_turns, back_order)
        return heads(_turn(qkv, turns), n_head)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, back_turns, back_order = ctx.saved_tensors
        gradient = torch.stack([g.transpose(1, 2) for g in gradients], dim=2).flatten(2)
        rows = _turn(gradient, back_turns).flatten(0, 1)
        of_h, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            (rows @ weight).view_as(h) if of_h else None,
            (rows.T @ h.flatten(0, 1)).index_select(0, back_order) if of_weight else None,
            rows.sum(0).index_select(0, back_order) if of_bias else None,
            *[None] * 5,
        )


def _turn(qkv: Tensor, turns: Tensor) -> Tensor:
    """``qkv`` (B, T, 3D) itself, with queries and keys multiplied by complex (T, D) numbers."""
    qk = qkv[..., : 2 * turns.shape[1]]
    pairs = qk.to(turns.real.dtype).unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(turns)
    if pairs.dtype != qk.dtype:
        qk.copy_(pairs.flatten(-2))
    return qkv
