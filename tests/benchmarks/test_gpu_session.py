"""The session's stages run in order, each recorded; none needs a GPU here."""

import json

import pytest
import torch

pytest.importorskip("triton")

import gpu_session
from reporting.result_files import ResultError, read_result

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
