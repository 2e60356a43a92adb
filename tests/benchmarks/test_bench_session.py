"""The parts of a GPU session on the CPU: logs and reports read, tiny trainings, stages recorded."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import gpu_session
import graph_replay
import sanitizer
import small_launches
import suite
import training_runs
from results import ResultError, read_result

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

# Suite --------------------------------------------------------------------------------------------

LOG = """\
============================= test session starts ==============================
collecting ... collected 7 items

tests/test_a.py::test_one PASSED                                         [ 14%]
tests/test_a.py::test_two[a b-PASSED] FAILED                             [ 28%]
tests/test_a.py::test_gpu SKIPPED (needs CUDA)                           [ 42%]
[gw3] [ 57%] PASSED tests/test_b.py::test_three[1 2]
[gw0] [  9%] FAILED tests/test_b.py::test_four
tests/test_b.py::test_five ERROR                                         [ 85%]
tests/test_b.py::test_six PASSED
=================================== FAILURES ===================================
FAILED tests/test_a.py::test_two - assert 1 == 2
"""


def test_a_log_is_counted_line_by_line():
    counts, failed = suite.read_log(LOG)
    assert counts == {"passed": 3, "failed": 2, "skipped": 1, "error": 1}
    assert failed == ["tests/test_a.py::test_two[a b-PASSED]", "tests/test_b.py::test_four", "tests/test_b.py::test_five"]  # fmt: skip


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """A repository of one test file that passes, fails and hangs."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)

    def write(body):
        (tmp_path / "test_it.py").write_text(body)

    return write


def test_a_suite_is_run_and_its_failures_named(small_suite):
    small_suite("def test_good(): pass\ndef test_bad(): assert 0\n")
    found = suite.run_suite(60.0, ["-p", "no:cacheprovider"])
    assert (found["ok"], found["counts"]) == (False, {"passed": 1, "failed": 1})
    assert found["failed"] == ["test_it.py::test_bad"]
    assert "assert 0" in "\n".join(found["last_lines"])


def test_a_suite_that_does_not_finish_is_counted_as_far_as_it_came(small_suite):
    small_suite("import time\ndef test_good(): pass\ndef test_hang(): time.sleep(60)\n")
    found = suite.run_suite(4.0, ["-p", "no:cacheprovider"])
    assert (found["ok"], found["counts"], found["exit_code"]) == (False, {"passed": 1}, None)
    assert found["summary"].endswith("not finished")


# Sanitizer ----------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n60 results checked, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
BROKEN = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at _loss_and_gradient_kernel+0x2a30
60 results checked, 0 wrong
========= ERROR SUMMARY: 2 errors
"""
NO_HAZARD = (
    "60 results checked, 0 wrong\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
HAZARD = "========= Warning: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"


@pytest.mark.parametrize(
    ("text", "errors"),
    [(CLEAN, 0), (BROKEN, 2), (NO_HAZARD, 0), (HAZARD, 1), ("Killed\n", None), ("", None)],
)
def test_a_sanitizers_report_is_read(text, errors):
    assert sanitizer.read_report(text)[0] == errors


def fake_sanitizer(folder, text):
    """A program that takes the sanitizer's arguments and prints what it would."""
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\necho \"$@\" > '{folder}/arguments'\necho $PYTORCH_NO_CUDA_MEMORY_CACHING >> '{folder}/arguments'\ncat <<'END'\n{text}END\n")  # fmt: skip
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "ok", "summary"),
    [
        (CLEAN, True, "0 errors, 60 results checked, 0 wrong"),
        (BROKEN, False, "2 errors, 60 results checked, 0 wrong"),
        (CLEAN.replace("0 wrong", "1 wrong"), False, "0 errors, 60 results checked, 1 wrong"),
        (CLEAN.replace("60 results", "0 results"), False, "0 errors, 0 results checked, 0 wrong"),
        ("========= ERROR SUMMARY: 0 errors\n", False, "0 errors, the program did not finish"),
        ("no GPU\n", False, "no summary, the program did not finish"),
    ],
)
def test_a_tool_is_ok_only_where_it_found_nothing_and_results_were_right(tmp_path, text, ok, summary):
    path = fake_sanitizer(tmp_path, text)
    found = sanitizer.run_tool(str(path), "memcheck", 20.0, ["program"])
    assert (found["ok"], found["summary"]) == (ok, summary)
    assert (found["report"] == []) == ok
    arguments, caching = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == "--tool memcheck --print-limit 20 program"
    assert caching == "1"


def test_the_sanitizer_is_found_on_path_or_in_a_toolkit_or_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer.glob, "glob", lambda *args, **options: [])
    assert sanitizer.run_sanitizer(5.0) == {
        "ok": False, "summary": "compute-sanitizer is not installed", "tools": {},
    }  # fmt: skip
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    path = fake_sanitizer(tmp_path / "cuda" / "bin", CLEAN)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitizer.find_sanitizer() == str(path)
    monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin")
    found = sanitizer.run_sanitizer(20.0)
    assert found["ok"]
    assert list(found["tools"]) == ["memcheck", "racecheck"]


def test_small_launches_are_checked_and_a_wrong_one_is_named(monkeypatch, device):
    impl = "auto" if device.type == "cuda" else "triton"
    for name in ("fused_diffusion_loss", "fused_linear_diffusion_loss"):
        whole = getattr(small_launches.sys.modules["contenders"], name)
        monkeypatch.setattr(small_launches.sys.modules["contenders"], name, partial(whole, impl=impl))
    lines = small_launches.check(device, [66], [torch.bfloat16], impl)
    assert len(lines) == 12
    assert all(line.endswith(":") for line in lines), lines
    assert sum("stated wrongly" in line for line in lines) == 2
    right = small_launches._with_cases
    monkeypatch.setattr(small_launches, "_with_cases", lambda *args: right(*args) * 1.01)
    monkeypatch.setattr(small_launches, "CONTENDERS", ())
    lines = small_launches.check(device, [66], [torch.bfloat16], impl)
    (wrong,) = (line for line in lines if not line.endswith(":"))
    assert wrong.startswith("logits V=66 torch.bfloat16 with the case table: wrong: loss off by")


# Graphs -------------------------------------------------------------------------------------------


def redo(step):
    """A replay that does again what was captured, into the same outputs."""
    outputs = step()

    def replay():
        for old, new in zip(outputs, step(), strict=True):
            old.copy_(new)

    return replay, outputs


def stale(step):
    """A replay that keeps what it was captured with."""
    return (lambda: None), step()


def test_replays_that_follow_their_inputs_are_right():
    found = graph_replay.run_graphs(redo, "cpu")
    assert found["summary"] == "5 of 5 losses replay bit for bit"
    assert found["ok"]


def test_a_replay_that_keeps_old_penalties_is_wrong():
    def baked(problem):
        if not hasattr(problem.y, "penalties"):  # a static batch keeps those that it was first called with
            problem.y.penalties = {"pk": problem.pk.item(), "pm": problem.pm.item()}
        loss_of, _ = graph_replay.cases()["streamed rows"]
        return loss_of(graph_replay.replace(problem, **problem.y.penalties))

    shape = graph_replay.SHAPES["streamed rows"]
    assert graph_replay.replays_wrong(baked, shape, redo, "cpu").startswith("replay 1: loss off by")
    loss_of, _ = graph_replay.cases()["linear"]
    assert graph_replay.replays_wrong(loss_of, graph_replay.LINEAR_SHAPE, redo, "cpu") == ""
    assert graph_replay.replays_wrong(loss_of, graph_replay.LINEAR_SHAPE, stale, "cpu") != ""


def test_a_capture_that_fails_is_the_result():
    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    found = graph_replay.run_graphs(fails, "cpu")
    assert not found["ok"]
    assert found["cases"]["linear"] == "RuntimeError: operation not permitted when stream is capturing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_losses_replay_in_a_cuda_graph():
    found = graph_replay.run_graphs()
    assert found["ok"], found["summary"]


# Training -----------------------------------------------------------------------------------------

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 8, "eval_interval": 8,
    "eval_batch_size": 4, "log_interval": 1, "warmup_iters": 2, "masking_warmup_iters": 4, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def in_process(config, seconds, seen=None):
    from difftrain.training.loop import train

    train(config)


def test_a_tiny_training_with_each_loss_is_measured_and_compared(capsys):
    found = training_runs.run_training(60.0, TINY, n_words=40, n_tokens=4000, train=in_process)
    assert list(found["runs"]) == ["reference", "logits", "linear"]
    for run in found["runs"].values():
        assert [step for step, _ in run["curve"]] == list(range(8))
        assert run["tokens_per_second"] > 0
        assert run["peak_memory_mib"] > 0
        assert run["agreement"].startswith("agrees: ")
    assert found["ok"]
    assert found["what"] == "8 steps of 64 tokens, 1 layers of width 16, vocabulary 41, float32"
    assert {"max_iters": 8, "dtype": "float32"}.items() <= found["options"].items()


def test_the_trainers_own_command_makes_a_run_and_a_failure_says_why(tmp_path, monkeypatch):
    from difftrain.config import Config

    data = training_runs.write_tokens(tmp_path / "tokens", 40, 4000)
    options = training_runs.GPT2_SMALL | TINY | {"max_iters": 2, "data": str(data)}
    config = Config(**options, out_dir=str(tmp_path / "run"))
    training_runs.train_by_command(config, 100.0)
    assert len(training_runs.read_run(config)["curve"]) == 2
    program = tmp_path / "program"
    for body, message in (
        ("echo first; echo the reason >&2; exit 2", "^exit code 2: the reason$"),
        ("echo begun; sleep 60", "^not finished in 1 s: begun$"),
    ):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setattr(training_runs.sys, "executable", str(program))
        with pytest.raises(RuntimeError, match=message):
            training_runs.train_by_command(config, 1.0)


def test_a_run_that_fails_leaves_the_others(capsys):
    def fails_for_logits(config, seconds):
        if config.loss_impl == "logits":
            raise RuntimeError("not finished in 3 s")
        in_process(config, seconds)

    changes = TINY | {"max_iters": 2}
    found = training_runs.run_training(60.0, changes, n_words=40, n_tokens=4000, train=fails_for_logits)
    assert not found["ok"]
    assert found["runs"]["logits"] == {"failure": "RuntimeError: not finished in 3 s"}
    assert found["runs"]["linear"]["agreement"].startswith("agrees")
    assert "logits: RuntimeError: not finished in 3 s" in found["summary"]


def test_curves_agree_within_rounding_at_first_and_a_hundredth_later():
    steps = list(range(0, 500, 10))
    reference = [[s, 5.0 - s / 500] for s in steps]

    def moved(first=1.0, late=1.0):
        return [[s, loss * (first if s == 0 else late if s > 400 else 1.0)] for s, loss in reference]

    agreement = training_runs.agreement
    assert agreement(reference, reference) == (
        True,
        "agrees: first loss 0 % apart, means of tenths at most 0 %",
    )
    assert agreement(moved(first=1.0005), reference)[0]
    assert not agreement(moved(first=1.002), reference)[0]
    assert agreement(moved(late=1.005), reference)[0]
    assert not agreement(moved(late=1.02), reference)[0]
    assert not agreement([[s, float("nan")] for s in steps], reference)[0]
    with pytest.raises(ValueError, match="other steps"):
        agreement(reference[1:], reference)


def test_made_up_tokens_are_there_to_be_learned(tmp_path):
    import numpy as np

    folder = training_runs.write_tokens(tmp_path / "a", 1000, 20_000)
    words = np.fromfile(folder / "train.bin", dtype=np.uint16)
    assert len(words) == 20_000
    assert words.max() < 1000
    first, second = words.reshape(-1, 2).T
    successor = dict(zip(first, second, strict=True))
    assert all(successor[a] == b for a, b in zip(first, second, strict=True))
    assert len(set(successor.values())) == len(successor) > 500
    assert 0.10 < (first == 0).mean() < 0.17, "Zipf's law: 1 / H(1000)"
    again = training_runs.write_tokens(tmp_path / "b", 1000, 20_000)
    assert (again / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()


# Session ------------------------------------------------------------------------------------------

FACTS = {"device": "a device", "date": "2000-01-01T00:00:00+00:00", "commit": "abc"}


def options_of(tmp_path, *arguments):
    options = gpu_session.parse(list(arguments))
    options.json = tmp_path / "result.json"
    return options


def test_stages_run_in_order_and_each_is_recorded_as_soon_as_it_ends(tmp_path, capsys):
    seen = []

    def stage(name, ok=True):
        def run(options, seconds):
            before = read_result(options.json)["stages"] if options.json.exists() else {}
            seen.append((name, list(before)))
            if name == "sanitizer":
                raise RuntimeError("it broke")
            return {"ok": ok, "summary": "fine"}

        return run

    stages = {name: stage(name) for name in gpu_session.STAGES}
    options = options_of(tmp_path, "--stages", "graphs", "suite", "sanitizer")
    assert gpu_session.run_stages(options, FACTS, stages) is False
    assert seen == [("suite", []), ("sanitizer", ["suite"]), ("graphs", ["suite", "sanitizer"])]
    found = read_result(options.json)["stages"]
    assert found["sanitizer"]["summary"] == "failed: RuntimeError: it broke"
    assert found["graphs"]["environment"] == FACTS
    assert found["graphs"]["seconds_in_all"] >= 0
    # A later call replaces its own stages and keeps the rest.
    later = FACTS | {"commit": "def"}
    assert gpu_session.run_stages(options_of(tmp_path, "--stages", "graphs"), later, stages)
    found = read_result(options.json)["stages"]
    assert {name: record["environment"]["commit"] for name, record in found.items()} == {
        "suite": "abc", "sanitizer": "abc", "graphs": "def",
    }  # fmt: skip


def test_stages_that_find_no_time_left_keep_their_earlier_record(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 0.0, 0.0, 1000.0, 1000.0])
    stages = {
        name: lambda options, seconds: {"ok": True, "summary": f"{seconds:.0f} s"}
        for name in ("suite", "loss")
    }
    monkeypatch.setattr(gpu_session.time, "monotonic", lambda: next(clock))
    options = options_of(tmp_path, "--minutes", "10")
    assert gpu_session.run_stages(options, FACTS, stages) is False
    assert list(read_result(options.json)["stages"]) == ["suite"]
    assert "loss: not run: the session's 10 minutes are over" in capsys.readouterr().out


def test_another_devices_file_is_refused(tmp_path):
    options = options_of(tmp_path, "--stages", "graphs")
    stages = {"graphs": lambda options, seconds: {"ok": True, "summary": ""}}
    gpu_session.run_stages(options, FACTS, stages)
    with pytest.raises(ResultError, match="holds figures of a device, these are of another$"):
        gpu_session.run_stages(options, FACTS | {"device": "another"}, stages)


def test_the_loss_stage_adds_what_the_benchmark_comes_to(tmp_path, monkeypatch):
    import bench_loss

    from sample_result import sample_result

    options = options_of(tmp_path, "--commit", "abc", "--quick")
    given = []

    def benchmark(arguments):
        given.extend(arguments)
        loss = sample_result()["stages"]["loss"]
        document = {"format": 1, "environment": FACTS, "stages": {"loss": loss}}
        options.json.write_text(json.dumps(document))
        return 0

    monkeypatch.setattr(bench_loss, "main", benchmark)
    record = gpu_session._loss(options, 30.0)
    assert given == ["--json", str(options.json), "--minutes", "0.500", "--quick", "--commit", "abc"]
    assert record["ok"]
    assert record["summary"].startswith("24 of 26 measured goals met, of 26")
    assert record["entries"]


def test_without_a_gpu_the_session_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_session.main([]) == 1
    assert capsys.readouterr().err == "gpu_session.py needs a CUDA GPU, and torch finds none.\n"


@pytest.mark.parametrize("arguments", [["--stages", "nothing"], ["--minutes", "0"], ["--stages"]])
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        gpu_session.parse(arguments)
    assert stopped.value.code == 2
