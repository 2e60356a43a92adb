"""How rows are cut: small rows held whole, others streamed in tiles that a model of the device chooses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .tile_model import H100, REGISTERS, Machine, StreamedTile, tiles_by_merit


@dataclass(frozen=True)
class Tile:
    """How a row is cut. ``rows`` > 0: that many rows of ``block_v`` in one program, else streamed."""

    warps: int
    repeat: int = 1
    rows: int = 0
    block_v: int = 0


SMALL_VOCAB = 4096
SMALL_TILE = 1024  # logits per program of 4 warps; longer rows get up to 16 logits to a thread
MAX_PROGRAMS = 1024  # of the kernels whose programs take many rows, or blocks of them
MAX_WARPS = 8192  # the same of streamed rows, whose programs have one warp or many


@cache
def machine_of(device: torch.device) -> Machine:
    """What a device tells of itself, asked once; an H100 where there is none."""
    if device.type != "cuda":
        return H100
    asked = torch.cuda.get_device_properties(device)
    # Not every build of torch tells of these two.
    shared_bytes = getattr(asked, "shared_memory_per_multiprocessor", H100.shared_bytes)
    registers = getattr(asked, "regs_per_multiprocessor", H100.registers)
    warps = asked.max_threads_per_multi_processor // asked.warp_size
    return Machine(asked.multi_processor_count, asked.L2_cache_size, shared_bytes, registers, warps)


def choose_tile(logits: Tensor) -> Tile:
    """The tile for rows of this length and dtype on their device.

    The loss alone takes the tile of the loss with its gradient, though it reads once: lanes add in the
    same order then, and both leave the same bits.
    """
    return _tile_of(logits.shape[-1], logits.dtype.itemsize, logits.device)


@cache
def _tile_of(vocab_size: int, itemsize: int, device: torch.device) -> Tile:
    if vocab_size <= SMALL_VOCAB:
        block_v = max(16, next_power_of_2(vocab_size))
        return Tile(warps=max(4, block_v // 512), rows=max(1, SMALL_TILE // block_v), block_v=block_v)
    return streamed_tile(tiles_by_merit(vocab_size, itemsize, machine_of(device))[0], itemsize)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is no less; Triton's own is made for compilers, and slow on the host."""
    return 1 << max(n - 1, 0).bit_length()


def streamed_tile(tile: StreamedTile, itemsize: int) -> Tile:
    """A tile of the model in 16-byte accesses of logits of this size."""
    warps = max(2, tile.warps) if torch.version.hip else tile.warps  # 64 lanes to a warp
    return Tile(warps=warps, repeat=tile.logits * itemsize // 16)


def max_programs(tile: Tile) -> int:
    """How many programs share the rows, where a program takes many."""
    return MAX_PROGRAMS if tile.rows else MAX_WARPS // tile.warps


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
        held = tile.repeat * vector_size(logits.dtype)
        options["maxnreg"] = REGISTERS.get(held, min(REGISTERS.values()))
    aligned = not any(row_phase(logits))
    return {
        "REPEAT": tile.repeat,
        "LANES": lanes,
        "VECTOR": vector_size(logits.dtype),
        "ALIGNED": aligned,
    } | options
