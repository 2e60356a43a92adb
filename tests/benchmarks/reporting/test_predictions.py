"""Predictions follow from the machine code and named constants, and say that they are predictions."""

import math

import pytest

import predict
from reporting import predictions
from reporting.goals import GOALS, MISSED, NotMeasured, evaluate
from reporting.pages import updated
from reporting.predictions import CALLS, DEVICES, H100, LAUNCH_US, Device

FORWARD, DEFAULT, NOT_PREDICTED, STATED = CALLS
# One byte a nanosecond, one instruction a nanosecond, no limit that matters.
SLOW = Device("slow", "slow", "sm_90", 1 / predictions.COPY_SHARE, 1, 1e-0 / 128, 1e12, 2048, "made up")


def test_a_call_takes_its_bytes_or_its_instructions_and_its_launches():
    n, v = 8192, 50304
    found = predictions.predict(FORWARD, (n, v), SLOW)
    counts = predictions.counts_of("loss", SLOW, v)
    assert found.ms == pytest.approx(counts["slots_scan"] * n * v * 1e-6 + 2 * LAUNCH_US * 1e-3)
    quick = Device("q", "q", "sm_90", SLOW.gb_per_s, 1000, 1.0, 1e12, 2048, "made up")
    tile = predictions.tile_model.tiles_by_merit(v, 2, quick.machine)[0]
    busy = predictions.tile_model.used_bandwidth(tile, v, quick.machine)
    for call, passes in ((FORWARD, 1), (DEFAULT, 2), (NOT_PREDICTED, 3), (STATED, 2)):
        found = predictions.predict(call, (n, v), quick)
        assert found.ms == pytest.approx(
            2 * passes * n * v / busy * 1e-6 + call.launches * LAUNCH_US * 1e-3
        )
        assert found.floor == pytest.approx(2 * min(passes, 2) * n * v * 1e-6)
        assert found.rereads == 0
        assert found.is_counted


def test_second_reads_that_miss_the_cache_are_read_from_memory():
    model = predictions.tile_model
    tile = model.tiles_by_merit(262144, 2, H100.machine)[0]
    missed = 1 - model.second_read_hits(tile, 2 * 262144, H100.machine)
    spilling = predictions.predict(STATED, (8192, 262144), H100)
    assert spilling.rereads == pytest.approx(missed)
    assert missed > 0.5
    assert spilling.percent_of_floor == pytest.approx(100 / (1 + missed / 2), abs=0.5)
    assert predictions.predict(FORWARD, (8192, 262144), H100).rereads == 0, "nothing is read twice"
    assert predictions.predict(STATED, (262144, 66), H100).rereads == 0


def test_a_size_that_was_not_compiled_takes_the_code_of_the_next_smaller_one_alike():
    assert predictions.counts_of("loss", H100, 200000)["vocab_size"] == 151936
    assert predictions.counts_of("loss", H100, 50305)["vocab_size"] == 50305
    with pytest.raises(NotMeasured, match="was not compiled for sm_0"):
        predictions.counts_of("loss", Device("x", "x", "sm_0", 1, 1, 1, 1, 1, ""), 50304)


def test_predicted_entries_are_held_against_the_goals_like_measured_ones():
    verdicts = evaluate(GOALS, predictions.predicted_entries(H100))
    missed = [str(v.goal) for v in verdicts if v.state == MISSED]
    assert missed == [
        *(f"forward at 8192 x {v}: at least 90 % of the limit" for v in (50304, 50305)),
        *(f"loss and gradient at 8192 x {v}: at least 90 % of the limit" for v in (50304, 50305)),
        *(f"loss and gradient at 8192 x {v}: at least 85 % of the limit" for v in (128256, 151936)),
        "loss and gradient at 8192 x 262144: at least 75 % of the limit",
    ]
    lines = predictions.goals_text().splitlines()
    assert all(": predicted " in line for line in lines)
    assert not any("best peer" in line or "linear" in line for line in lines)


def test_every_device_has_a_source_and_is_known_by_its_drivers_name():
    for device in DEVICES:
        assert device.source
        assert math.isclose(device.copy, 0.9e9 * device.gb_per_s)
    assert predictions.device_called("NVIDIA H100 80GB HBM3") is H100
    assert predictions.device_called("NVIDIA H200").name == "H200"
    assert predictions.device_called("NVIDIA H100 PCIe") is None
    # 67 and 19.5 TFLOP/s in fp32 on paper: two operations to an fma, 128 lanes, of which an A100 has 64.
    assert H100.issue * 2 / 1e12 == pytest.approx(67, rel=0.01)
    assert DEVICES[2].issue / 1e12 == pytest.approx(19.5, rel=0.01)


def test_the_notes_hold_what_the_command_writes_and_call_it_a_prediction():
    """`python benchmarks/predict.py` keeps it so."""
    notes = predict.NOTES.read_text(encoding="utf-8")
    assert updated(notes, predict.BEGIN, predict.END, predict.part()) == notes
    assert predict.part().startswith("**Predicted, not measured**")


def test_the_command_prints_or_writes_between_its_markers(tmp_path, monkeypatch, capsys):
    notes = tmp_path / "NOTES.md"
    monkeypatch.setattr(predict, "NOTES", notes)
    notes.write_text("nothing")
    assert predict.main([]) == 1
    assert "lacks the markers" in capsys.readouterr().err
    notes.write_text(f"a\n{predict.BEGIN}\n{predict.END}\nb\n")
    assert predict.main([]) == 0
    assert notes.read_text() == f"a\n{predict.BEGIN}\n{predict.part()}\n{predict.END}\nb\n"
    capsys.readouterr()
    assert predict.main(["--print"]) == 0
    assert capsys.readouterr().out.startswith("**Predicted, not measured**")
