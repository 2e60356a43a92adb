"""Which tiles suit a streamed row: a model of the device, from numbers that it tells of itself. No torch, no Triton.

A row is read twice where the gradient is made with the loss, and the second read should hit the L2. So all
rows that programs work on at once have to fit in it. What a row costs beside its loops is paid by each
warp, so of the tiles whose rows fit the one with the fewest warps is the best; registers bound how many
programs a multiprocessor holds. The byte and instruction counts are in benchmarks/NOTES.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """What a device has; the last four of one multiprocessor."""

    multiprocessors: int
    l2_bytes: int
    shared_bytes: int = 233472
    registers: int = 65536
    warps: int = 64
    programs: int = 32


H100 = Machine(132, 50 * 2**20)  # assumed where there is no device to ask
# The rest of the L2 is for the gradient's lines, on their way out, and for what its sets cannot hold.
L2_SHARE = 0.85
WARPS = (1, 2, 4, 8, 16, 32)
# Logits that a lane holds at once, and the registers that a thread may use then. Twice as many logits leave
# room for half as many programs: as many bytes are under way, of fewer rows.
REGISTERS = {32: 64, 64: 128}
SHARED_BYTES = 2048  # of a program: what its reductions exchange, and what the device keeps for itself


class StreamedTile(NamedTuple):
    """A row is read in blocks of 32 * ``warps`` lanes that hold ``logits`` each."""

    warps: int
    logits: int


def resident_programs(tile: StreamedTile, machine: Machine) -> int:
    """Programs that one multiprocessor holds at once."""
    return min(
        machine.programs,
        machine.warps // tile.warps,
        machine.registers // (32 * tile.warps * REGISTERS[tile.logits]),
        machine.shared_bytes // SHARED_BYTES,
    )


def bytes_in_flight(tile: StreamedTile, row_bytes: int, machine: Machine) -> int:
    """Bytes of the rows that the device works on at once."""
    return resident_programs(tile, machine) * machine.multiprocessors * row_bytes


def second_read_hits(tile: StreamedTile, row_bytes: int, machine: Machine) -> float:
    """The share of the second read that the L2 should still hold."""
    return min(1.0, L2_SHARE * machine.l2_bytes / bytes_in_flight(tile, row_bytes, machine))


def tiles_by_merit(vocab_size: int, itemsize: int, machine: Machine) -> list[StreamedTile]:
    """All tiles that a row fills and a multiprocessor holds, the best by the model first."""
    tiles = [StreamedTile(warps, logits) for warps in WARPS for logits in REGISTERS]
    row_bytes = vocab_size * itemsize
    possible = [
        tile
        for tile in tiles
        if 32 * tile.warps * tile.logits <= vocab_size and resident_programs(tile, machine)
    ]
    return sorted(possible, key=lambda tile: (-second_read_hits(tile, row_bytes, machine), *tile))
