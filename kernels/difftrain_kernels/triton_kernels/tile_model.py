"""Which tiles suit a streamed row: a model of the device, from numbers that it tells of itself. No torch, no Triton.

A row is read twice where the gradient is made with the loss, and the second read hits the L2 as far as all
rows that programs work on at once fit in it. Against that stands that memory should never wait: for that a
multiprocessor wants many warps, several programs, and rows of several blocks. Both are weighed by the time that
loss and gradient take together. The numbers of the latter are fitted to tiles timed on an H100, whose times the model
meets within a fifth (benchmarks/NOTES.md); a sweep (benchmarks/sweep_tiles.py) holds it against any device.
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
# The rest of the L2 is for the gradient's lines, on their way out, and for what both of its halves hold.
L2_SHARE = 0.44
WARPS = (1, 2, 4, 8, 16, 32)
# Logits that a lane holds at once, and the registers that a thread may use then. Twice as many logits leave
# room for half as many programs: as many bytes are under way, of fewer rows.
REGISTERS = {32: 64, 64: 128}
# How far arithmetic hides behind memory, by these logits: 64 leave half as many warps, and each waits longer.
OVERLAP = {32: 1.1, 64: 0.95}
ROW_END = 0.5  # blocks that a program could read while it ends a row
LONE_PROGRAM = 0.3  # programs that others would have to stand in for, while one ends a row
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


def used_bandwidth(tile: StreamedTile, vocab_size: int, machine: Machine) -> float:
    """The share of the memory's bandwidth that such rows keep busy."""
    blocks = vocab_size / (32 * tile.warps * tile.logits)
    programs = resident_programs(tile, machine)
    of_rows, of_programs = blocks / (blocks + ROW_END), programs / (programs + LONE_PROGRAM)
    return min(1.0, OVERLAP[tile.logits] * of_rows * of_programs)


def relative_time(tile: StreamedTile, vocab_size: int, itemsize: int, machine: Machine) -> float:
    """Of loss and gradient, over a copy of the row."""
    missed = 1.0 - second_read_hits(tile, vocab_size * itemsize, machine)
    return (2.0 + missed) / 2.0 / used_bandwidth(tile, vocab_size, machine)


def tiles_by_merit(vocab_size: int, itemsize: int, machine: Machine) -> list[StreamedTile]:
    """All tiles that a row fills and a multiprocessor holds, the best by the model first."""
    tiles = [StreamedTile(warps, logits) for warps in WARPS for logits in REGISTERS]
    possible = [
        tile
        for tile in tiles
        if 32 * tile.warps * tile.logits <= vocab_size and resident_programs(tile, machine)
    ]
    return sorted(possible, key=lambda tile: (relative_time(tile, vocab_size, itemsize, machine), *tile))
