"""Blocks of rows that stay in a CPU's cache, and the buffer that each thread keeps for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**17  # logits in a block, for each thread


def blocks_of(logits: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows, the same rows of each (N, ...) beside, and a buffer (n, V) that all blocks share."""
    n, size = logits.shape
    n_blocks = 1
    if logits.device.type == "cpu":
        # Of two rows at least: torch adds up a single long row in another order where it has threads.
        n_blocks = max(1, min(n // 2, n * size // (BLOCK * torch.get_num_threads())))
    buffer = _workspace(logits, -(-n // n_blocks), size)
    if n_blocks == 1:
        yield logits, *columns, buffer
        return
    for parts in zip(*(t.tensor_split(n_blocks) for t in (logits, *columns)), strict=True):
        yield *parts, buffer[: len(parts[0])]


class _Kept(threading.local):
    """A thread's last buffer by dtype."""

    def __init__(self):
        self.buffers = {}


_KEPT = _Kept()


def _workspace(logits: Tensor, rows: int, size: int) -> Tensor:
    """Uninitialised (rows, size) in fp32 (fp64 for fp64); that of a CPU's block is kept for the thread's next call.

    New memory costs a page fault for each 4096 bytes, of small logits as much as all the rest.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kept = _KEPT.buffers.get(dtype)
    if logits.device.type == "cpu" and kept is not None and kept.shape == (rows, size):
        return kept
    with torch.inference_mode(False):  # else no other mode could write to it
        buffer = logits.new_empty(rows, size, dtype=dtype)
    is_small = rows * size <= 2 * BLOCK * torch.get_num_threads()
    if (
        logits.device.type == "cpu" and is_small and type(buffer) is Tensor
    ):  # not what a mode made in its place
        _KEPT.buffers[dtype] = buffer
    return buffer
