"""What a run records of its starts and ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from difftrain import __version__
from difftrain.reporting.sessions import FILE, is_gone, read_sessions, session
from difftrain.training.loop import train


def test_a_run_and_its_resume_are_two_sessions_with_device_versions_and_data(tiny):
    config = tiny(max_iters=4)
    train(config)
    train(tiny(max_iters=6), resume=True)
    entries = read_sessions(Path(config.out_dir))
    assert [(e["event"], e["step"]) for e in entries] == [
        ("start", 0),
        ("end", 4),
        ("start", 4),
        ("end", 6),
    ]
    start, end = entries[:2]
    assert start["difftrain"] == __version__
    assert start["device"].startswith("cpu: ")
    assert set(start["data"]) == {"dtype", "train.bin", "val.bin"}
    assert start["parameters"] > 0
    assert end["how"] == "ended"
    assert start["time"] <= end["time"]


def test_an_evaluation_alone_and_an_overwritten_run_leave_no_session(tiny):
    config = tiny(max_iters=2)
    train(config)
    train(config, overwrite=True)
    train(config, resume=True, eval_only=True)
    assert [e["event"] for e in read_sessions(Path(config.out_dir))] == ["start", "end"]


def test_a_session_that_fails_says_how(tmp_path):
    with pytest.raises(ValueError, match="two"), session(tmp_path, {}, lambda: 3):
        raise ValueError("one\ntwo")
    assert read_sessions(tmp_path)[-1]["how"] == "ValueError: one two"


def test_lines_that_are_no_sessions_are_passed_over(tmp_path):
    assert read_sessions(tmp_path) == []
    (tmp_path / FILE).write_bytes(b'{"event": "start"}\n[1]\n{"event": 3}\n\xff{\n{"event": "en')
    assert read_sessions(tmp_path) == [{"event": "start"}]


def test_a_process_that_was_killed_is_seen_to_be_gone_on_its_own_machine_alone():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    start = {"event": "start", "pid": dead.pid, "host": socket.gethostname()}
    assert is_gone([start])
    assert not is_gone([start | {"pid": os.getpid()}])
    assert not is_gone([start | {"host": "elsewhere"}])
    assert not is_gone([start, {"event": "end"}])
    assert not is_gone([])
    for pid in (None, "1", -1, 0, 10**30):
        assert not is_gone([start | {"pid": pid}])
    assert json.dumps(start)
