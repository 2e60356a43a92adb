"""Texts in blocks: from left to right, each with any policy inside, and in sight of as much text as the model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from difftrain.errors import UserError
from difftrain.sampling.choosing import Choice
from difftrain.sampling.settling import Policy, Scores, State, settle


def settle_in_blocks(
    scores: Scores,
    state: State,
    mask_id: int,
    policy: Policy,
    *,
    steps: int,
    block_size: int,
    block_length: int = 0,
    choice: Choice,
    seed: int,
    samples: Tensor,
    on_pass: Callable[[Tensor], None] | None = None,
    on_block: Callable[[slice], None] | None = None,
) -> int:
    """Write every [MASK] of texts of any length in at most ``steps`` passes, and give the passes taken.

    A text that fits the model is one block unless ``block_length`` says otherwise; a longer one goes in blocks of
    half of what the model takes. Blocks share the passes by how many words each is to write. The window
    of a block holds what was written before it, and after it what was given, if anything was.

    Args:
        block_size: tokens the model takes at once.
        block_length: tokens a block; 0: as above.
        on_pass: is given x (B, T) after each pass, the whole of it.
        on_block: is given the columns of a block in what the scores are to see, before its first pass.

    Raises:
        UserError: fewer passes than blocks; those of :func:`settle`.
    """
    length = state.x.shape[1]
    if not 0 <= block_length <= block_size:
        raise UserError(
            f"block_length must be at least 0 and at most block_size {block_size}, got {block_length}"
        )
    whole = min(length, block_length or (block_size if length <= block_size else max(1, block_size // 2)))
    blocks = (
        [slice(start, min(start + whole, length)) for start in range(0, length, whole)] if length else []
    )
    to_write = [int((state.x[:, b] == mask_id).sum(1).max()) for b in blocks] if len(state.x) else []
    blocks = [b for b, n in zip(blocks, to_write, strict=True) if n]
    shares = _shares(steps, [n for n in to_write if n])
    taken = first_pass = 0
    for block, share in zip(blocks, shares, strict=True):
        window = _window(state, block, mask_id, block_size)
        part = State(*(getattr(state, field.name)[:, window] for field in dataclasses.fields(State)))
        part.is_active = torch.zeros_like(part.is_open)
        inside = slice(block.start - window.start, block.stop - window.start)
        part.is_active[:, inside] = part.is_open[:, inside]
        if on_block:
            on_block(inside)
        taken += settle(
            scores, part, mask_id, policy,
            steps=share, choice=choice, seed=seed, samples=samples, first_pass=first_pass,
            on_pass=on_pass and partial(_tell_whole, on_pass, state.x, window),
        )  # fmt: skip
        first_pass += share  # not what was taken, which hangs on the other texts
        for name in ("x", "returns", "since", "p"):
            getattr(state, name)[:, window] = getattr(part, name)
    return taken


def _tell_whole(on_pass: Callable[[Tensor], None], x: Tensor, window: slice, part: Tensor) -> None:
    x = x.clone()
    x[:, window] = part
    on_pass(x)


def _shares(steps: int, to_write: list[int]) -> list[int]:
    """Passes for each block by its words, at least one each, which add up to ``steps``."""
    if steps < len(to_write):
        raise UserError(
            f"steps must be at least {len(to_write)}, one for each block of the text, got {steps}"
        )
    total, shares, left = sum(to_write), [], steps
    for i, n in enumerate(to_write):
        share = min(max(1, round(left * n / total)), left - (len(to_write) - i - 1))
        shares.append(share)
        left, total = left - share, total - n
    return shares


def _window(state: State, block: slice, mask_id: int, block_size: int) -> slice:
    """The columns that the model sees while it writes a block."""
    length = state.x.shape[1]
    if length <= block_size:
        return slice(0, length)
    room = block_size - (block.stop - block.start)
    after = state.x[:, block.stop : block.stop + room // 2] != mask_id
    n_after = int(after.any(0).nonzero().max()) + 1 if after.any() else 0
    start = max(0, block.stop + n_after - block_size)
    return slice(start, min(length, start + block_size))
