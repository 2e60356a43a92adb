"""How rows are cut: the table of tiles, and what follows from it at a launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """How a row is cut. ``rows`` > 0: that many rows of ``block_v`` in one program, else streamed."""

    warps: int
    repeat: int = 1
    rows: int = 0
    block_v: int = 0


SMALL_VOCAB = 4096
SMALL_TILE = 1024  # logits per program of 4 warps; longer rows get up to 16 logits to a thread
# Rows longer than the bound on the left are streamed with this tile. Not timed on a GPU yet: chosen on
# 2026-11-23 from the machine code for sm_90, bf16, V = 50304, 128256 and 151936 (bench_codegen, Triton
# 3.7.1). At up to 64 registers, 2 programs of 16 warps or 1 of 32 fill a multiprocessor, and rows in
# flight stay in the L2.
STREAM_TILES = (
    (65536, Tile(warps=32, repeat=2)),
    (16384, Tile(warps=16, repeat=2)),
    (0, Tile(warps=8, repeat=2)),
)
MAX_REGISTERS = 64  # 32 warps to a multiprocessor
MAX_PROGRAMS = 1024  # of the kernels whose programs take many rows


@cache
def choose_tile(vocab_size: int) -> Tile:
    """The tile for rows of this length."""
    if vocab_size <= SMALL_VOCAB:
        block_v = max(16, triton.next_power_of_2(vocab_size))
        return Tile(warps=max(4, block_v // 512), rows=max(1, SMALL_TILE // block_v), block_v=block_v)
    return next(tile for above, tile in STREAM_TILES if vocab_size > above)


def vector_size(dtype: torch.dtype) -> int:
    """Elements in a 16-byte access."""
    return 16 // dtype.itemsize


def row_phase(rows: Tensor) -> tuple[int, ...]:
    """Where rows start relative to 16-byte boundaries: of the first, and by how much it moves per row
    (of (B, T, V): per batch and per row)."""
    vector = vector_size(rows.dtype)
    moves = [stride % vector for stride in rows.stride()[:-1]]
    return rows.data_ptr() // rows.dtype.itemsize % vector, *moves


def tile_arguments(logits: Tensor, tile: Tile) -> dict:
    """The compile-time arguments that say how rows are cut."""
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    if tile.rows:
        return {"ROWS": tile.rows, "BLOCK_V": tile.block_v} | options
    lanes = 32 * tile.warps
    if torch.version.hip:
        options["num_warps"] = max(1, tile.warps // 2)  # 64 lanes to a warp
    else:
        options["maxnreg"] = MAX_REGISTERS
    aligned = not any(row_phase(logits))
    return {
        "REPEAT": tile.repeat,
        "LANES": lanes,
        "VECTOR": vector_size(logits.dtype),
        "ALIGNED": aligned,
    } | options
