"""The worker's jobs on the CPU, at tiny shapes; times need a GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import bench_loss
from bench_samples import DEVICE, composed, logits_contender, problem_of
from comparison import entries, worker
from comparison.worker import Job
from measuring import timing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN


def test_forward_wants_no_gradient_and_backward_gets_the_upstream_gradient():
    problems = [problem_of("logits"), problem_of("logits")]
    seen = []

    def loss_of(problem, scale):
        seen.append((problem.inputs[0].requires_grad, torch.is_grad_enabled(), scale))
        loss = problem.inputs[0].float().sum()
        if loss.requires_grad:
            loss.register_hook(lambda upstream: seen.append(upstream.item()))
        return loss

    for scale in entries.MEASURES.values():
        calls = worker.calls_of(loss_of, problems, scale, None)
        assert [c.restore for c in calls] == [None, None]
        calls[1].run()
    assert seen == [(False, False, 1.0), (True, True, 1.0), 1.0, (True, True, 0.125), 0.125]


def test_what_was_written_over_is_restored_before_it_is_used_again():
    source = problem_of("logits")
    problem = source.copy()
    (call,) = worker.calls_of(lambda p, _: p.inputs[0].zero_(), [problem], None, source)
    call.run()
    assert not problem.inputs[0].any()
    call.restore()
    assert torch.equal(problem.inputs[0], source.inputs[0])
    assert problem.inputs[0].data_ptr() != source.inputs[0].data_ptr()


@pytest.fixture
def fake_device(monkeypatch):
    """A clock of 2 ms a call and a memory of 7 MiB, so that the rest of a measurement runs on the CPU."""

    def times_of(calls):
        for call in calls:
            call.run()
        return [2.0] * len(calls)

    monkeypatch.setattr(timing, "cuda_times", times_of)
    monkeypatch.setattr(worker, "peak_mib", lambda call: 7.0)
    monkeypatch.setattr(worker, "_cache_bytes", lambda: 10_000)


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_measurement_fills_every_column(kind, fake_device):
    job = Job((70, 40) if kind == "logits" else (70, 16, 40), "bf16", "eager reference", 1.0)
    found = worker.ShapeBench(job, DEVICE).entries(job, 100.0)
    assert [e.measure for e in found] == list(entries.MEASURES)
    for entry in found:
        assert (entry.outcome, entry.ms, entry.ms_20, entry.ms_80, entry.samples) == (
            "timed",
            2.0,
            2.0,
            2.0,
            10,
        )
        assert (entry.gb_per_s is None) == (kind == "linear")
        assert (entry.times_the_products is None) == (kind == "logits")
        nbytes = 2 * (70 * 40 if kind == "logits" else 70 * 16 + 16 * 40)
        assert entry.gradients_mib == (0 if entry.measure == entries.FORWARD else nbytes / 2**20)
    other = Job(job.shape, "bf16", "eager reference").blank("wrong: loss off by 1")
    lines = bench_loss.report([*found, other]).splitlines()
    assert lines[1] == ("70 x 40, bf16" if kind == "logits" else "70 x 16 x 40, bf16")
    assert len(lines) == 6
    assert all("2.000 ms [2.000, 2.000]" in line and "7 MiB" in line for line in lines[2:5])
    assert ("GB/s" in lines[2]) == (kind == "logits")
    assert ("1.00 x products" in lines[2]) == (kind == "linear")
    assert ("0.50 x products" in lines[3]) == (kind == "linear")
    assert lines[5].split() == ["eager", "reference", "wrong:", "loss", "off", "by", "1"]
    again = bench_loss.report(found[:1], found[0].shape)
    assert again.startswith("  eager"), "no second heading for the same shape"


def test_a_wrong_contender_is_shown_as_wrong_and_not_timed(fake_device, monkeypatch):
    wrong = replace(logits_contender(lambda p, _: composed(p, pm=1.0)), name="a wrong one")
    monkeypatch.setattr(worker, "CONTENDERS", (wrong,))
    monkeypatch.setattr(timing, "cuda_times", lambda calls: pytest.fail("timed"))
    job = Job((70, 40), "bf16", "a wrong one")
    (entry,) = worker.ShapeBench(job, DEVICE).entries(job, 100.0)
    assert entry.outcome.startswith("wrong: loss off by")
    assert entry.ms is None
    assert "a wrong one" in bench_loss.report([entry])


class _Sent(list):
    send = list.append


def test_the_worker_reports_what_is_missing_or_fails_and_goes_on(fake_device, monkeypatch):
    def absent():
        raise ImportError("No module named 'no_such_library'")

    def failing(problem, _):
        raise ZeroDivisionError("first line\nsecond")

    def hungry(problem, _):
        raise torch.OutOfMemoryError("asked for too much")

    chosen = (
        replace(logits_contender(None), name="absent", make=absent),
        replace(logits_contender(failing), name="failing"),
        replace(logits_contender(hungry), name="hungry"),
        replace(logits_contender(lambda p, _: composed(p)), name="right"),
    )
    monkeypatch.setattr(worker, "CONTENDERS", chosen)
    monkeypatch.setattr(worker, "copy_bandwidth", lambda budget_ms: 100e9)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(worker, "ShapeBench", partial(worker.ShapeBench, where=DEVICE))
    sent = _Sent()
    worker.work([Job((70, 40), "bf16", c.name) for c in chosen], sent)
    assert [[e.outcome for e in found] for found, seconds in sent] == [
        ["not installed: No module named 'no_such_library'"],
        ["failed: ZeroDivisionError: first line"],
        ["out of memory"],
        ["timed"] * 3,
    ]
    assert all(seconds > 0 for _, seconds in sent)
    assert sent[3][0][0].copy_gb_per_s == 100.0


def test_the_worker_asks_for_a_fresh_process_when_the_device_is_lost(fake_device, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker, "copy_bandwidth", lambda budget_ms: 100e9)
    monkeypatch.setattr(worker, "ShapeBench", partial(worker.ShapeBench, where=DEVICE))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    sent = _Sent()
    worker.work([Job((70, 40), "bf16", "eager reference")] * 2, sent)
    assert len(sent) == 2
    assert sent[1] == "restart"
