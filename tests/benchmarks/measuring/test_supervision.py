"""Whatever a worker does, every job gets one answer, in order, and the run ends in time."""

import os
import sys
from types import SimpleNamespace

import pytest

from fake_workers import obey
from measuring import supervision
from waiting import PATIENCE, popen_whose_time_is_over_when, wait_until


def run(jobs, job_seconds=PATIENCE, seconds=PATIENCE):
    return list(supervision.run_jobs(obey, jobs, job_seconds=job_seconds, seconds=seconds))


def test_jobs_are_done_in_order_by_one_process():
    found = run(["a", "b", "c"])
    assert [(job, answer[0], problem) for job, answer, problem in found] == [(j, j, "") for j in "abc"]
    assert len({answer[1] for _, answer, _ in found}) == 1


def test_a_crash_is_reported_and_a_fresh_process_goes_on():
    found = run(["a", "crash", "b", "exit", "c"])
    assert [(job, problem) for job, _, problem in found] == [
        ("a", ""), ("crash", "crashed: SIGKILL"), ("b", ""), ("exit", "crashed: exit code 3"), ("c", ""),
    ]  # fmt: skip
    assert [answer[0] for _, answer, problem in found if not problem] == ["a", "b", "c"]
    assert len({answer[1] for _, answer, problem in found if not problem}) == 3


def test_a_worker_that_leaves_blames_no_job():
    found = run(["last of its process", "b"])
    assert [(answer[0], problem) for _, answer, problem in found] == [
        ("last of its process", ""),
        ("b", ""),
    ]
    assert found[0][1][1] != found[1][1][1]


@pytest.fixture
def hangs(tmp_path, monkeypatch):
    """The file that a worker that hangs writes its process id to; no time passes before."""
    file, real = tmp_path / "hangs", supervision._wait

    def wait(connection, seconds):
        wait_until(lambda: connection.poll() or file.exists(), "an answer or a worker that hangs")
        return real(connection, seconds)

    monkeypatch.setattr(supervision, "_wait", wait)
    return file


def test_a_job_that_hangs_is_given_up_and_the_next_one_done(hangs):
    jobs = [f"hang {hangs}", "b"]
    found = []
    for job in supervision.run_jobs(obey, jobs, job_seconds=1.0, seconds=PATIENCE):
        hangs.unlink(missing_ok=True)
        found.append(job)
    assert [problem for *_, problem in found] == ["hung: no answer in 1 s", ""]


def test_what_is_not_done_when_the_time_is_over_is_said_to_be_not_measured(hangs, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 1.0 if hangs.exists() else 0.0)
    monkeypatch.setattr(supervision, "time", clock)
    found = run(["a", f"hang {hangs}", "b"], seconds=1.0)
    assert [problem for *_, problem in found] == ["", *["not measured: the run's 1 s were over"] * 2]
    with pytest.raises(ProcessLookupError):  # it was ended
        os.kill(int(hangs.read_text()), 0)


SAYS_WHAT_IT_CAME_TO = """
import signal, sys, time
def say(*_):
    print("came to 3 of 7", flush=True)
    open(sys.argv[2], "w").close()
    {after}
signal.signal(signal.SIGINT, say)
open(sys.argv[1], "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("after", ["sys.exit(2)", "time.sleep(600)"], ids=["and ends", "and runs on"])
def test_a_command_that_takes_too_long_may_say_what_it_came_to(after, tmp_path, monkeypatch):
    began, said = tmp_path / "began", tmp_path / "said"
    limits = [began.exists] if after == "sys.exit(2)" else [began.exists, said.exists]
    popen = popen_whose_time_is_over_when(*limits)
    monkeypatch.setattr(supervision.subprocess, "Popen", popen)
    program = SAYS_WHAT_IT_CAME_TO.format(after=after)
    command = [sys.executable, "-c", program, str(began), str(said)]
    code, text = supervision.run_command(command, 4.0, grace=PATIENCE)
    assert (code, text) == (None, "came to 3 of 7\n")
