"""The training benchmark on a tiny model: every part is timed, and shares and ratios follow from the times."""

import json

import pytest

import bench_train
from difftrain.config import Config


def test_shares_speed_and_ratios_follow_from_the_times():
    ours = {part: [2.0, 2.0] for part in bench_train.PARTS} | {"loop": [10.0, 10.0]}
    plain = {part: [4.0, 4.0] for part in bench_train.PARTS if part != "corruption"}
    saves = {"save waits": [120.0], "save writes": [5.0], "resume": [7.0]}
    config = Config(batch_size=4, block_size=8, eval_interval=90)
    found = bench_train.report(ours, plain, saves, config)
    assert found["parts"]["data"] == {"median_ms": 2.0, "q20_ms": 2.0, "q80_ms": 2.0}
    assert found["parts"]["step"]["median_ms"] == 12.0
    assert found["plain"]["step"]["median_ms"] == 20.0
    assert found["ratios"]["loss"] == 0.5
    assert found["ratios"]["step"] == pytest.approx(12 / 20)
    assert found["ratios"]["loop"] == pytest.approx(10 / 20)
    assert "corruption" not in found["ratios"]
    assert found["tokens_per_second"] == pytest.approx(4 * 8 / 10e-3)
    assert found["data_share"] == pytest.approx(4 / 10)
    assert found["save_share"] == pytest.approx(120 / (90 * 10 + 120))


def test_a_run_prints_and_writes_every_part_and_the_setting(tmp_path, capsys):
    file = tmp_path / "train.json"
    tiny = {"batch_size": 2, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}
    options = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    options += ["--steps", "1", "--warmup", "1", "--saves", "1", "--device", "cpu", "--json", str(file)]
    bench_train.main(options)
    found = json.loads(file.read_text())
    parts = [*bench_train.PARTS, "step", "loop", "save waits", "save writes", "resume"]
    assert list(found["parts"]) == parts
    assert all(row["q20_ms"] == row["median_ms"] > 0 for row in found["parts"].values())
    assert tiny.items() <= found["setting"].items()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines[2:-1]] == parts
    assert lines[-1].startswith(f"{found['tokens_per_second']:,.0f} tokens/s; ")
