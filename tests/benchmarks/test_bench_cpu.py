"""The CPU benchmark: its contenders compute one loss, and a run gives every figure."""

import json
from functools import partial

import pytest
import torch

import bench_cpu
import bench_cpu_linear
from measuring.live_memory import peak_mib


def test_all_contenders_compute_the_same_loss_and_gradient():
    arguments = bench_cpu.problem("64x11")
    gradients = []
    for loss in bench_cpu.CONTENDERS.values():
        bench_cpu.step(loss, arguments)
        gradients.append(arguments[0].grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_memory_is_what_is_live_at_one_time():
    def loss(logits):
        big = logits * 2  # kept by nothing
        return big.sum() * 0 + logits.sum()

    leaf = torch.zeros(256, 1024, requires_grad=True)
    assert peak_mib(partial(bench_cpu.step, loss, (leaf,))) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("shape", ["768x66", "512x1003", "64x50304", "64x50304xbfloat16"])
def test_the_loss_holds_less_memory_than_the_eager_formula(shape):
    arguments = bench_cpu.problem(shape)
    eager, *ours = (
        peak_mib(partial(bench_cpu.step, loss, arguments)) for loss in bench_cpu.CONTENDERS.values()
    )
    assert max(ours) < 0.75 * eager


def test_a_run_prints_and_writes_every_figure(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    threads = torch.get_num_threads()
    try:
        bench_cpu.main(
            ["--shapes", "8x5", "8x5xbfloat16", "--threads", "1", "--seconds", "0", "--json", str(file)]
        )
    finally:
        torch.set_num_threads(threads)
    found = json.loads(file.read_text())
    assert [entry["shape"] for entry in found["figures"]] == ["8x5", "8x5xbfloat16"]
    for entry in found["figures"]:
        assert list(entry["losses"]) == list(bench_cpu.CONTENDERS)
        assert entry["losses"]["eager"]["ratio"] == 1.0
        assert all(row["peak_mib"] > 0 for row in entry["losses"].values())
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 3
    assert {"torch", "commit", "date", "command", "cpu"} <= found["setting"].keys()


def test_a_run_of_the_linear_loss_writes_every_figure(tmp_path, capsys):
    file = tmp_path / "linear.json"
    threads = torch.get_num_threads()
    try:
        bench_cpu_linear.main(["--shape", "8,4,5", "--threads", "1", "--seconds", "0", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(file.read_text())
    (figure,) = found["figures"]
    assert (figure["shape"], figure["threads"]) == ([8, 4, 5], 1)
    assert figure["ratio"] == pytest.approx(figure["ours_ms"] / figure["eager_ms"])
    assert figure["ours_peak_mib"] > 0 < figure["eager_peak_mib"]
    assert f"ratio {figure['ratio']:.2f}" in capsys.readouterr().out
    assert {"torch", "commit", "date", "command", "seconds"} <= found["setting"].keys()
