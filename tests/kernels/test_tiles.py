"""Which tiles the model of a device chooses, and that a device is asked once."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from difftrain_kernels.triton_kernels import tile_model, tiles
from difftrain_kernels.triton_kernels.tile_model import H100, L2_SHARE, Machine

MACHINES = {
    "H100": H100,
    "A100": Machine(108, 40 * 2**20, 167936),
    "B200": Machine(148, 126 * 2**20),
    "L4": Machine(58, 48 * 2**20, 102400, warps=48, programs=24),
}
SIZES = (4097, 5000, 8192, 10000, 16385, 32000, 50257, 50304, 65537, 128256, 151936, 262144, 1000000)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("machine", MACHINES)
def test_rows_in_flight_fit_the_l2_wherever_those_of_any_tile_do_and_with_the_fewest_warps(
    machine, itemsize
):
    machine = MACHINES[machine]
    room = L2_SHARE * machine.l2_bytes
    for vocab_size in SIZES:
        best, *others = tile_model.tiles_by_merit(vocab_size, itemsize, machine)
        flights = {
            tile: tile_model.bytes_in_flight(tile, vocab_size * itemsize, machine)
            for tile in [best, *others]
        }
        fitting = [tile for tile, flight in flights.items() if flight <= room]
        assert best == min(
            fitting or [t for t, flight in flights.items() if flight == min(flights.values())]
        )
        assert tile_model.resident_programs(best, machine) >= 1
        assert 32 * best.warps * best.logits <= vocab_size, "a row fills a block"


def test_the_second_read_hits_on_an_h100_up_to_the_largest_vocabularies_in_use():
    hits = {
        size: tile_model.second_read_hits(tile_model.tiles_by_merit(size, 2, H100)[0], 2 * size, H100)
        for size in SIZES
    }
    assert all(hits[size] == 1 for size in SIZES if size <= 151936)
    # A third of the second reads must go to memory: 4.7NV bytes in place of 4NV.
    assert 0.6 < hits[262144] < 0.7


def test_registers_bound_how_many_programs_a_multiprocessor_holds():
    for logits, registers in tile_model.REGISTERS.items():
        for warps in tile_model.WARPS:
            held = tile_model.resident_programs(tile_model.StreamedTile(warps, logits), H100)
            assert held * 32 * warps * registers <= 65536 or held == 0
            assert held * warps <= 64
            assert held <= 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tile_is_compiled_with_the_registers_that_the_model_counts(dtype):
    for vocab_size in (5000, 8192, 50304):
        rows = torch.empty(2, vocab_size, dtype=dtype)
        chosen = tile_model.tiles_by_merit(vocab_size, dtype.itemsize, H100)[0]
        arguments = tiles.tile_arguments(rows, tiles.choose_tile(rows))
        assert arguments["REPEAT"] * arguments["VECTOR"] == chosen.logits
        assert arguments["LANES"] == 32 * chosen.warps
        assert arguments["maxnreg"] == tile_model.REGISTERS[chosen.logits]


def test_a_device_is_asked_once(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(
            multi_processor_count=108, L2_cache_size=40 * 2**20, shared_memory_per_multiprocessor=167936,
            regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32,
        )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device = torch.device("cuda", 61)
    machines = [tiles.machine_of(device), tiles.machine_of(torch.device("cuda", 61))]
    assert machines == [MACHINES["A100"]] * 2
    assert asked == [device]
    assert tiles.machine_of(torch.device("cpu")) == H100


def test_small_rows_are_no_matter_of_the_model():
    for vocab_size in (2, 66, 4096):
        assert tiles.choose_tile(torch.empty(1, vocab_size, dtype=torch.bfloat16)).rows >= 1
    assert tiles.choose_tile(torch.empty(1, 4097, dtype=torch.bfloat16)).rows == 0


def test_programs_that_share_rows_are_as_many_warps_whatever_the_tile():
    for warps in tile_model.WARPS:
        assert tiles.max_programs(tiles.Tile(warps=warps, repeat=4)) * warps == tiles.MAX_WARPS
