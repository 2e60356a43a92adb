"""The benchmark's plan, table and command line on the CPU; times need a GPU."""

import pytest
import torch

pytest.importorskip("triton")

import bench_loss
from bench_samples import entry_of
from comparison import entries, worker
from comparison.contenders import CONTENDERS
from reporting.result_files import read_result

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN


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
    compiled = [worker.find_contender(j).is_compiled for j in jobs]
    assert compiled == sorted(compiled)
    assert compiled.count(True) == 21
    for shape in bench_loss.LOGITS_SHAPES + bench_loss.LINEAR_SHAPES:
        of_shape = [j for j, late in zip(jobs, compiled, strict=True) if j.shape == shape and not late]
        lacks = [entries.NO_WEIGHTS in worker.find_contender(j).lacks for j in of_shape]
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
