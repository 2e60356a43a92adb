"""What benchmarks/bench_host.py counts and times: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "bench_host.py"
CHUNK = ["product", "small_loss_and_gradient", "product", "product"]
LAUNCHES = {
    "nothing": [],
    "plain": ["small_loss_and_gradient", "small_gradient"],
    "not predicted": ["small_loss", "small_gradient"],
    "upstream stated": ["small_loss_and_gradient", "small_gradient"],
    "with the case table": ["small_loss_and_gradient", "case_sums", "small_gradient"],
    "linear, one chunk": [*CHUNK, "rescale"],
    "linear, two chunks": [*CHUNK, *CHUNK, "rescale"],
    "linear, with the table": [*CHUNK, "case_sums", "rescale"],
}


def test_each_way_is_timed_beside_nothing_and_its_launches_are_listed(tmp_path):
    file = tmp_path / "host.json"
    subprocess.run(
        [sys.executable, str(BENCHMARK), "--repeats", "1", "--json", str(file)],
        check=True, env=os.environ, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["way"]: row for row in result["rows"]}
    assert {way: row["launches"] for way, row in rows.items()} == LAUNCHES
    nothing = rows["nothing"]["together_us"]
    for row in rows.values():
        assert row["forward_us"] > 0
        assert row["ratio"] == pytest.approx(row["together_us"] / nothing, rel=0.02)
    assert result["setting"]["repeats"] == 1
