"""What .ci/run chooses: everything on a usual machine, the core on a very slow one, and never nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def program(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def ci(tmp_path):
    """Run .ci/run where a loop takes so many seconds: what it prints, and what it made."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    log = tmp_path / "made"
    program(tmp_path / "bin/make", f'echo "$@" >> {log}; [ "$1" != "$FAILING" ]')

    def run(seconds, failing=""):
        log.write_text("")
        program(tmp_path / "bin/python", f"cat > /dev/null; echo {seconds}")
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "bin/python"),
            "FAILING": failing,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, log.read_text().split()

    return run


def test_a_usual_machine_runs_everything(ci):
    for seconds in ("0.40", "0.46", "2.70"):
        done, made = ci(seconds)
        assert (done.returncode, made) == (0, [".venv/.test", "test"]), done.stderr
        assert "core" not in done.stdout


def test_a_very_slow_one_runs_the_core_and_says_why(ci):
    done, made = ci("18.40")
    assert (done.returncode, made) == (0, [".venv/.test", "test-core"]), done.stderr
    assert "core selection only" in done.stdout
    assert "it is 40 times slower than a quiet one" in done.stdout


@pytest.mark.parametrize(
    ("seconds", "failing"), [("0.46", "test"), ("9.00", "test-core"), ("0.46", ".venv/.test")]
)
def test_what_fails_in_it_fails_it(ci, seconds, failing):
    done, _ = ci(seconds, failing)
    assert done.returncode != 0


def test_a_speed_that_is_none_fails_it(ci):
    done, made = ci("")
    assert done.returncode != 0
    assert made == []
