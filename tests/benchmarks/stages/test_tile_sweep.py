"""The sweep of tiles on the CPU, its timer stubbed: only what is right is timed, and the model is judged."""

import json

import pytest
import torch

pytest.importorskip("triton")

from difftrain_kernels import triton_kernels
from stages import tile_sweep


@pytest.fixture
def sweep(monkeypatch, tmp_path, device):
    """A sweep of two tiles of one V, in which times are those given, in order, a tile's three at a time."""
    if device.type != "cpu":
        pytest.skip("times are stubbed")
    monkeypatch.setattr(tile_sweep, "CANDIDATES", 2)
    monkeypatch.setattr(tile_sweep, "CHECKED_ROWS", 2)

    def run(times, **options):
        left = list(times)

        def time_calls(calls, budget_ms, times_of):
            assert budget_ms > 0
            return [left.pop(0)]

        monkeypatch.setattr(tile_sweep, "time_calls", time_calls)
        path = tmp_path / "tiles.json"
        options = {"sizes": (4097,), "device": "cpu", "dtype": torch.float32, "logits": 1, **options}
        record = tile_sweep.run_sweep(60, path, **options)
        assert json.loads(path.read_text())["summary"] == record["summary"]
        assert not left
        return record

    return run


def test_the_fastest_tile_is_told_beside_the_models_choice(sweep):
    found = sweep([2.0, 4.0, 3.0, 1.0, 2.0, 3.0])
    assert found["ok"]
    assert [entry["rank"] for entry in found["entries"]] == [0, 1]
    assert found["entries"][1]["ms"] == {"loss": 1.0, "loss_and_gradient": 2.0, "gradient": 3.0}
    second = found["entries"][1]
    assert found["table"] == {
        4097: {"warps": second["warps"], "logits": second["logits"], "model_is_slower_by": 0.5}
    }
    assert "slower for V = 4097: 50.0%" in found["summary"]
    assert {"device", "date", "command"} <= found["environment"].keys()
    assert found["machine"]["multiprocessors"] == 132


def test_a_wrong_tile_is_told_and_not_timed(sweep, monkeypatch):
    right = triton_kernels.launch_gradient

    def wrong(logits, *arguments, tile, **options):
        gradient = right(logits, *arguments, tile=tile, **options)
        return gradient * 2 if tile.warps == 2 else gradient

    monkeypatch.setattr(triton_kernels, "launch_gradient", wrong)
    found = sweep([1.0, 2.0, 3.0])
    assert not found["ok"]
    first, second = found["entries"]
    assert (first["warps"], first["ms"], first["wrong"]) == (2, {}, "its passes leave different bits")
    assert (second["wrong"], len(second["ms"])) == ("", 3)
    assert found["table"][4097]["model_is_slower_by"] is None


def test_a_vocabulary_whose_turn_comes_too_late_is_listed(monkeypatch):
    found = tile_sweep.run_sweep(0, sizes=(4097, 8192), device="cpu")
    assert not found["ok"]
    assert found["summary"].endswith("no time for V = 4097, 8192")
