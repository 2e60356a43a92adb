"""The session's steps run in order, each recorded, and a second call goes on; none needs a GPU here."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import gpu_session
from gpu_session import Step
from measuring.rehearsal import REHEARSAL
from reporting import result_files
from reporting.result_files import ResultError, note_begun, read_result

FACTS = {"device": "a device", "date": "2000-01-01T00:00:00+00:00", "commit": "abc", "kernels": "ours"}


def options_of(tmp_path, *arguments, steps=None):
    options = gpu_session.parse(list(arguments))
    options.json = tmp_path / "result.json"
    options.steps = list(steps or options.steps)
    return options


def steps_of(seen, **minutes):
    """Steps that note when they run, and what stood in the file then; "broken" raises, "wrong" is not ok."""

    def make(name):
        def run(options, seconds):
            before = read_result(options.json)["stages"] if options.json.exists() else {}
            seen.append((name, list(before), seconds))
            if name == "broken":
                raise RuntimeError("it broke")
            return {"ok": name != "wrong", "summary": "fine"}

        return run

    return {name: Step(most, make(name)) for name, most in minutes.items()}


def names(seen):
    return [name for name, *_ in seen]


def test_steps_run_in_order_and_each_is_recorded_as_soon_as_it_ends(tmp_path, capsys):
    seen = []
    steps = steps_of(seen, a=1, broken=2, wrong=0.5)
    options = options_of(tmp_path, steps=steps)
    assert gpu_session.run_steps(options, FACTS, steps) is False
    assert seen == [("a", [], 60), ("broken", ["a"], 120), ("wrong", ["a", "broken"], 30)]
    document = read_result(options.json)
    assert document["stages"]["broken"]["summary"] == "failed: RuntimeError: it broke"
    assert document["stages"]["wrong"]["environment"] == FACTS
    assert document["stages"]["a"]["seconds_in_all"] >= 0
    assert document["begun"] == {}


def test_a_second_call_goes_on_and_does_nothing_twice_unless_asked_to(tmp_path):
    seen = []
    steps = steps_of(seen, a=1, b=1, c=1)
    gpu_session.run_steps(options_of(tmp_path, steps="a"), FACTS, steps)
    assert gpu_session.run_steps(options_of(tmp_path, steps=steps), FACTS, steps) is True
    assert names(seen) == ["a", "b", "c"]
    gpu_session.run_steps(options_of(tmp_path, "--again", steps="b"), FACTS, steps)
    assert names(seen) == ["a", "b", "c", "b"]


def test_what_was_recorded_of_other_kernels_is_done_again(tmp_path):
    seen = []
    steps = steps_of(seen, a=1, b=1)
    options = options_of(tmp_path, steps=steps)
    gpu_session.run_steps(options, FACTS, steps)
    later = FACTS | {"kernels": "changed"}
    assert gpu_session.record_of(options.json, "a", later) is None
    assert gpu_session.run_steps(options_of(tmp_path, steps="a"), later, steps)
    assert names(seen) == ["a", "b", "a"]
    assert gpu_session.listing(options, later, steps).endswith("\nb               1 min  to do")


def test_only_what_fits_into_the_minutes_is_begun(tmp_path, capsys):
    seen = []
    steps = steps_of(seen, a=3, long=8, short=1)
    options = options_of(tmp_path, "--next", "4", steps=steps)
    assert gpu_session.run_steps(options, FACTS, steps) is False
    assert names(seen) == ["a", "short"]
    assert "long: not begun: it may take 8 minutes, 4.0 are left" in capsys.readouterr().out


def test_in_a_short_session_no_step_gets_more_than_it_may(tmp_path, capsys):
    seen = []
    steps = steps_of(seen, long=8, short=0.5)
    options = options_of(tmp_path, "--most", "1.5", "--next", "4", steps=steps)
    assert gpu_session.run_steps(options, FACTS, steps)
    assert [(name, seconds) for name, _, seconds in seen] == [("long", 90), ("short", 30)]
    with pytest.raises(SystemExit):
        gpu_session.parse(["--most", "0"])
    assert "--most must be above 0, got 0" in capsys.readouterr().err


def test_a_step_that_was_cut_twice_comes_after_the_others(tmp_path):
    steps = steps_of([], a=1, b=1, c=1)
    options = options_of(tmp_path, steps=steps)
    for expected in (["a", "b", "c"], ["a", "b", "c"], ["b", "c", "a"]):
        assert gpu_session.to_do(options, FACTS, steps) == expected
        note_begun(options.json, "a", FACTS)
    assert gpu_session.listing(options, FACTS, steps).startswith("a               1 min  begun 3 times")


def test_a_step_that_keeps_no_time_is_given_up_and_recorded(tmp_path, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(gpu_session, "GRACE", 0.05)
    monkeypatch.setattr(gpu_session.os, "_exit", lambda code: ended.set())
    hangs = {"hangs": Step(1e-9, lambda options, seconds: ended.wait() and {"ok": True, "summary": "late"})}
    options = options_of(tmp_path, steps=hangs)
    saved = []
    save = gpu_session.save_stage
    monkeypatch.setattr(gpu_session, "save_stage", lambda *args: (saved.append(args[2]), save(*args)))
    gpu_session.run_steps(options, FACTS, hangs)
    assert saved[0] == {"ok": False, "summary": "hung: given up after 0 s"}


def test_every_step_ends_within_eight_minutes():
    assert max(step.minutes for step in gpu_session.STEPS.values()) <= 8


def test_another_devices_file_is_refused(tmp_path):
    steps = steps_of([], a=1)
    gpu_session.run_steps(options_of(tmp_path, steps=steps), FACTS, steps)
    with pytest.raises(ResultError, match="holds figures of a device, these are of another$"):
        gpu_session.run_steps(
            options_of(tmp_path, "--again", steps=steps), FACTS | {"device": "another"}, steps
        )


def test_every_test_of_the_suite_belongs_to_one_step(monkeypatch):
    from stages import suite

    given = []
    monkeypatch.setattr(suite, "run_suite", lambda seconds, arguments, paths: given.append(paths) or {})
    for name in ("kernels", "compile", "linear", "trainer"):
        gpu_session.STEPS[name].run(SimpleNamespace(pytest=None), 1.0)
    left_out = {path.removeprefix("--ignore=") for path in given[0] if path.startswith("--ignore=")}
    assert left_out == {*given[1], *given[2]}
    assert "tests/kernels" in given[0]
    for path in {p for paths in given for p in paths if not p.startswith("-")}:
        assert (suite.ROOT / path).exists(), path


@pytest.mark.parametrize(("stage", "words"), [("loss", []), ("quick", ["--quick"])])
def test_a_timing_step_adds_what_the_benchmark_comes_to(stage, words, tmp_path, monkeypatch):
    import bench_loss
    from sample_result import sample_result

    options = options_of(tmp_path, "--commit", "abc")
    given = []

    def benchmark(arguments, name):
        given.extend(arguments)
        loss = sample_result()["stages"]["loss"]
        options.json.write_text(json.dumps({"format": 1, "environment": FACTS, "stages": {name: loss}}))
        return 0

    monkeypatch.setattr(bench_loss, "main", benchmark)
    record = gpu_session.STEPS[stage].run(options, 90.0)
    assert given == [
        "--json",
        str(options.json),
        "--minutes",
        "1.000",
        "--resume",
        *words,
        "--commit",
        "abc",
    ]
    assert record["ok"]
    assert record["summary"].startswith("24 of 26 measured goals met, of 26")
    assert record["entries"]


def test_the_sweep_of_tiles_is_asked_for_its_record(tmp_path, monkeypatch):
    record = {"ok": True, "summary": "a stand-in"}
    sweep = SimpleNamespace(run_sweep=lambda seconds: record | {"asked": seconds})
    monkeypatch.setitem(sys.modules, "stages.tile_sweep", sweep)
    monkeypatch.setattr(gpu_session, "run_alone", lambda run, seconds, *words: run(*words))
    options = options_of(tmp_path)
    found = gpu_session.STEPS["tiles"].run(options, 480.0)
    assert found == record | {"asked": 450.0}


# Rehearsals ---------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(tmp_path, monkeypatch):
    """A rehearsal without its other processes, each of which would load torch."""
    import bench_loss

    class Sent(list):
        send = list.append

    def run_jobs(work, jobs, **_):
        sent = Sent()
        work(jobs, sent)
        return [(job, answer, "") for job, answer in zip(jobs, sent, strict=True)]

    monkeypatch.setenv(REHEARSAL, "this")
    monkeypatch.setattr(gpu_session, "run_alone", lambda run, seconds, *words: run(*words))
    monkeypatch.setattr(bench_loss, "run_jobs", run_jobs)
    return tmp_path / "rehearsal.json"


def test_every_step_of_the_losses_is_rehearsed_on_tiny_shapes(in_this_process, capsys):
    words = ["--json", str(in_this_process), "--steps", "environment", "graphs", "quick", "loss", "memory"]
    assert gpu_session.main(words) == 0, capsys.readouterr().out
    document = read_result(in_this_process)
    assert document["rehearsal"] is True
    stages = dict(document["stages"])
    assert [stages[name]["summary"].split(" ")[0] for name in ("graphs", "memory")] == ["5", "6"]
    for name in ("quick", "loss"):
        outcomes = {e["outcome"] for e in stages[name]["entries"]}
        assert outcomes == {"timed"}, outcomes
    # Again: nothing is left to do, and of a timing that was cut only what is missing is measured.
    cut = {
        "environment": stages["loss"]["environment"],
        "entries": stages["loss"]["entries"][:3],
        "seconds": {},
    }
    document["stages"]["loss"] = cut
    in_this_process.write_text(json.dumps(document))
    assert gpu_session.main(words) == 0
    again = read_result(in_this_process)["stages"]
    assert again["graphs"] == stages["graphs"]
    assert [e["contender"] for e in again["loss"]["entries"]] == [
        e["contender"] for e in stages["loss"]["entries"]
    ]
    assert again["loss"]["entries"][:3] == stages["loss"]["entries"][:3]


def rehearse(tmp_path, capfd, steps, cuts):
    """The file and what was said; nothing that was said may be an error's."""
    options = gpu_session.parse(
        ["--rehearse", "--cuts", str(cuts), "--json", str(tmp_path / "rehearsal.json"), "--steps", *steps]
    )
    assert gpu_session.rehearse(options), capfd.readouterr().out
    return read_result(options.json), capfd.readouterr().out


def test_a_rehearsal_is_killed_goes_on_and_is_no_result(tmp_path, capfd):
    document, said = rehearse(tmp_path, capfd, ["graphs"], 1)
    assert list(document["stages"]) == ["graphs"]
    assert all(stage["ok"] for stage in document["stages"].values())
    assert document["rehearsal"] is True
    assert document["environment"]["device"] == "rehearsal on the CPU"
    assert "refused, as it must be: rehearsal.json is a rehearsal" in said
    assert said.endswith("nothing was lost, and nothing ran on\n")
    assert result_files.newest(tmp_path) is None


@pytest.mark.slow
def test_so_is_one_of_all_of_them(tmp_path, capfd):
    document, _ = rehearse(tmp_path, capfd, list(gpu_session.STEPS), gpu_session.CUTS)
    assert list(document["stages"]) == list(gpu_session.STEPS)
    assert all(stage["ok"] for stage in document["stages"].values())


# Command line -------------------------------------------------------------------------------------


def test_without_a_gpu_the_session_says_so_in_one_sentence_and_lists_its_steps(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_session.main([]) == 1
    assert capsys.readouterr().err == "gpu_session.py needs a CUDA GPU, and torch finds none.\n"
    assert gpu_session.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_session.STEPS)
    assert all(line.endswith("to do") for line in lines)


@pytest.mark.parametrize("arguments", [["--steps", "nothing"], ["--next", "0"], ["--steps"]])
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        gpu_session.parse(arguments)
    assert stopped.value.code == 2
