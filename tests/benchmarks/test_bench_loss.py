"""The benchmark's models, measurements and command line on the CPU, at tiny shapes; times need a GPU."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import bench_loss
import contenders
import entries
import loss_worker
import timing
from contenders import CONTENDERS
from loss_worker import Job
from results import read_result

from bench_samples import DEVICE, composed, logits_contender, problem_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN


# Models -------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_traffic_model():
    assert entries.bytes_moved(8192, 50304, 2, with_gradient=False) == 824_180_736
    assert entries.bytes_moved(8192, 50304, 2, with_gradient=True) == 1_648_361_472
    # KERNELS section 4: 0.55 ms on an H100, whose copy moves 3.0 TB/s.
    assert round(1_648_361_472 / 3.0e12 * 1e3, 2) == 0.55


def entry_of(kind, **changes):
    shape = [8, 10] if kind == "logits" else [70, 16, 40]
    values = {"dtype": "bf16", "contender": "sample", "family": "ours", "lacks": "", "ms": 2.0}
    return entries.Entry(
        shape, **(values | {"measure": entries.BOTH, "outcome": entries.TIMED, "peak_mib": 7.0} | changes)
    )


def test_rates_follow_from_time_and_model():
    both, forward = (entry_of("logits", measure=m) for m in (entries.BOTH, entries.FORWARD))
    entries.add_rates(both, 640e-6, {})
    assert both.gb_per_s == pytest.approx(8 * 10 * 2 * 2 / 2e-3 / 1e9)
    assert both.percent_of_limit == pytest.approx(25.0)
    assert both.times_the_products is None
    entries.add_rates(forward, 640e-6, {})
    assert forward.percent_of_limit == pytest.approx(12.5)
    linear = entry_of("linear")
    entries.add_rates(linear, 1.0, {True: 1.6, False: 0.5})
    assert linear.times_the_products == pytest.approx(1.25)
    assert linear.gb_per_s is None


@pytest.mark.parametrize(("nbytes", "copies"), [(10, 11), (35, 4), (10**9, 2)])
def test_the_inputs_between_two_uses_of_one_are_larger_than_the_cache(nbytes, copies):
    assert timing.copies_beyond_cache(nbytes, cache_bytes=50) == copies


# Measuring ----------------------------------------------------------------------------------------


def test_quantiles_of_known_samples():
    assert timing.quantiles([float(i) for i in range(11)]) == (5.0, 2.0, 8.0)
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(("each_ms", "count"), [(1.0, 20), (100.0, 10), (1e-4, 200)])
def test_calls_are_timed_in_turn_within_the_budget(each_ms, count):
    made, rounds = [], []

    def times_of(calls):
        rounds.append(len(calls))
        for call in calls:
            call.run()
            call.restore()
        return [each_ms] * len(calls)

    calls = [timing.Call(partial(made.append, n), partial(made.append, f"restore {n}")) for n in "abc"]
    assert timing.time_calls(calls, 20.0, times_of) == [each_ms] * count
    assert made[:6] == ["a", "restore a", "b", "restore b", "c", "restore c"], "the first round is untimed"
    assert rounds == [3, count]
    assert made[12:20:2] == ["a", "b", "c", "a"]


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
        calls = loss_worker.calls_of(loss_of, problems, scale, None)
        assert [c.restore for c in calls] == [None, None]
        calls[1].run()
    assert seen == [(False, False, 1.0), (True, True, 1.0), 1.0, (True, True, 0.125), 0.125]


def test_what_was_written_over_is_restored_before_it_is_used_again():
    source = problem_of("logits")
    problem = source.copy()
    (call,) = loss_worker.calls_of(lambda p, _: p.inputs[0].zero_(), [problem], None, source)
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
    monkeypatch.setattr(loss_worker, "peak_mib", lambda call: 7.0)
    monkeypatch.setattr(loss_worker, "_cache_bytes", lambda device: 10_000)


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_measurement_fills_every_column(kind, fake_device):
    job = Job((70, 40) if kind == "logits" else (70, 16, 40), "bf16", "eager reference", 1.0)
    found = loss_worker.ShapeBench(job, DEVICE).entries(job, 100.0)
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
    monkeypatch.setattr(loss_worker, "CONTENDERS", (wrong,))
    monkeypatch.setattr(timing, "cuda_times", lambda calls: pytest.fail("timed"))
    job = Job((70, 40), "bf16", "a wrong one")
    (entry,) = loss_worker.ShapeBench(job, DEVICE).entries(job, 100.0)
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
    monkeypatch.setattr(loss_worker, "CONTENDERS", chosen)
    monkeypatch.setattr(loss_worker, "copy_bandwidth", lambda budget_ms: 100e9)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(loss_worker, "ShapeBench", partial(loss_worker.ShapeBench, device=DEVICE))
    sent = _Sent()
    loss_worker.work([Job((70, 40), "bf16", c.name) for c in chosen], sent)
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

    monkeypatch.setattr(loss_worker, "copy_bandwidth", lambda budget_ms: 100e9)
    monkeypatch.setattr(loss_worker, "ShapeBench", partial(loss_worker.ShapeBench, device=DEVICE))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    sent = _Sent()
    loss_worker.work([Job((70, 40), "bf16", "eager reference")] * 2, sent)
    assert len(sent) == 2
    assert sent[1] == "restart"


# Command line -------------------------------------------------------------------------------------


def test_shapes_follow_the_arguments():
    def shapes(*arguments):
        return bench_loss.shapes_of(bench_loss.parse(list(arguments)))

    assert shapes() == bench_loss.LOGITS_SHAPES + bench_loss.LINEAR_SHAPES
    assert shapes("--quick") == [(8192, 50304), (8192, 768, 50304)]
    assert shapes("--vocab", "66", "1000", "--rows", "64") == [(64, 66), (64, 1000)]
    assert shapes("--linear", "8,16,32") == [(8, 16, 32)]
    assert shapes("--linear") == []
    assert shapes("--vocab", "9", "--linear", "8,16,32") == [(8192, 9), (8, 16, 32)]


def test_the_plan_leaves_compiling_to_the_end_and_keeps_contenders_of_one_judge_together():
    jobs = bench_loss.plan(bench_loss.parse([]))
    assert len(jobs) == len(set(jobs)) == sum(
        {"logits": 6, "linear": 3}[c.kind] for c in CONTENDERS
    )  # fmt: skip
    compiled = [loss_worker.find_contender(j).is_compiled for j in jobs]
    assert compiled == sorted(compiled)
    assert compiled.count(True) == 15
    for shape in bench_loss.LOGITS_SHAPES + bench_loss.LINEAR_SHAPES:
        of_shape = [j for j, late in zip(jobs, compiled, strict=True) if j.shape == shape and not late]
        lacks = [contenders.NO_WEIGHTS in loss_worker.find_contender(j).lacks for j in of_shape]
        assert lacks == sorted(lacks)
    only = bench_loss.plan(bench_loss.parse(["--quick", "--only", "Liger", "eager"]))
    names = ["eager reference", "Liger cross-entropy", "eager reference", "Liger fused linear"]
    assert [j.contender for j in only] == names
    assert {j.budget_ms for j in only} == {bench_loss.QUICK_BUDGET_MS}


@pytest.mark.parametrize(("arguments", "share"), [([], 0.25), (["--quick"], 0.25)])
def test_the_timed_part_takes_a_quarter_of_the_run_at_most(arguments, share):
    # The rest is for checking, compiling and starting; whatever they take, the run ends on time.
    options = bench_loss.parse(arguments)
    timed_ms = sum(job.budget_ms * len(entries.MEASURES) for job in bench_loss.plan(options))
    assert timed_ms <= share * options.minutes * 60e3
    assert options.minutes == (1.0 if options.quick else 8.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--linear", "8,16"], ["--linear", "a,b,c"], ["--rows", "8"], ["--dtype", "fp8"], ["--vocab", "0"],
        ["--vocab", "9", "--rows", "-1"], ["--minutes", "0"], ["--minutes", "nan"], ["--plot", "chart.txt"],
    ],
)  # fmt: skip
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        bench_loss.parse(arguments)
    assert stopped.value.code == 2


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_loss.main(["--quick"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "bench_loss.py measures on a CUDA GPU, and torch finds none.\n"


def _answer(work, jobs, *, job_seconds, seconds):
    """In place of worker processes: one job timed, the others not."""
    for job in jobs:
        if job.contender == "ours" and job.kind == "logits":
            timed = entry_of(
                "logits", contender="ours", ms_20=1.0, ms_80=3.0, gb_per_s=1.0, percent_of_limit=50.0
            )
            yield job, ([timed], 1.5), ""
        else:
            yield job, None, "crashed: SIGSEGV"


def test_results_are_written_and_drawn_whatever_becomes_of_the_workers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(bench_loss, "run_jobs", _answer)
    file, chart = tmp_path / "result.json", tmp_path / "chart.png"
    arguments = ["--quick", "--commit", "abc", "--json", str(file), "--plot", str(chart)]
    assert bench_loss.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == ["device", "driver", "torch", "triton", "commit"]
    stage = read_result(file)["stages"]["loss"]
    assert stage["environment"]["commit"] == "abc"
    assert len(stage["entries"]) == len(CONTENDERS)
    assert {e["outcome"] for e in stage["entries"]} == {"timed", "crashed: SIGSEGV"}
    assert stage["seconds"]["8192 x 50304 bf16, ours"] == 1.5
    assert chart.read_bytes()[:4] == b"\x89PNG"
    assert bench_loss.main(["--quick", "--json", str(chart)]) == 1, "no results file, and not overwritten"
    assert "is not" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_small_run_on_the_gpu(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--vocab", "1000", "5001", "--rows", "256", "--linear", "256,64,1000", "--json", str(file)]
    assert bench_loss.main([*arguments, "--only", "ours", "eager"]) == 0
    found = read_result(file)["stages"]["loss"]["entries"]
    ours = [e for e in found if e["family"] == "ours" and (e["lacks"] == "" or e["shape"][-1] > 4096)]
    assert len(ours) >= 30
    assert all(e["outcome"] == "timed" for e in ours), [e["outcome"] for e in ours]
