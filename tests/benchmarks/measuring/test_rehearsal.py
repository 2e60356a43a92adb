"""Sessions that are killed at random moments lose the step under way, and nothing computes on after them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from measuring import rehearsal
from waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
SESSION = Path(__file__).parents[2] / "support/fake_session.py"


def rehearse(tmp_path, fault="", cuts=3, longest=1.5):
    """What was wrong, and what was said."""
    file, said = tmp_path / "result.json", []
    command = [sys.executable, str(SESSION), str(file), *([fault] if fault else [])]
    return rehearsal.run_with_cuts(command, file, cuts, longest=longest, seed=1, say=said.append), said


def test_a_session_that_is_killed_goes_on_and_loses_nothing(tmp_path):
    wrong, said = rehearse(tmp_path)
    assert wrong == []
    assert said, "it was killed at least once"
    assert len(rehearsal._finished(tmp_path / "result.json")) == 5


@pytest.mark.parametrize(
    ("fault", "sign"),
    [("forgets", "is not what it was"), ("runs on", "ran on"), ("fails", "it ended with 1")],
)
def test_what_a_session_does_wrong_is_told(fault, sign, tmp_path, monkeypatch):
    left_over = rehearsal._left_over
    monkeypatch.setattr(rehearsal, "_left_over", lambda: left_over(patience=0.5))
    wrong, _ = rehearse(tmp_path, fault, cuts=0 if fault == "runs on" else 1, longest=600.0)
    assert any(sign in line for line in wrong), wrong
    monkeypatch.setattr(rehearsal, "_left_over", left_over)
    for pid in left_over(patience=0.0):
        os.kill(pid, signal.SIGKILL)


def test_a_command_ends_with_the_process_that_started_it(tmp_path):
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"""
import sys
sys.path.insert(0, {str(Path(rehearsal.__file__).parents[1])!r})
from measuring.supervision import run_command
run_command([sys.executable, "-c", {child!r}], 600.0)
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_until(lambda: mark.exists() and mark.read_text(), "the command is started")
    process.kill()
    process.wait()
    pid = int(mark.read_text())
    wait_until(lambda: not _is_alive(pid), "the command ends")


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_stand_in_for_the_sanitizer_runs_its_program(tmp_path):
    path = rehearsal.write_sanitizer(tmp_path)
    for tool, sign in (
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards"),
    ):
        words = [str(path), "--tool", tool, "--print-limit", "20", "echo", "it ran"]
        assert sign in subprocess.run(words, check=True, capture_output=True, text=True).stdout
    failed = subprocess.run([*words[:5], "false"], capture_output=True, text=True)
    assert failed.stdout == ""
