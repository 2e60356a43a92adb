"""``make demo`` in a folder where pip and difftrain are stand-ins: what it says, and when."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $* | unbuffered=$PYTHONUNBUFFERED tmp=$TMPDIR"
case "$*" in *pip*) test -z "$PIP_FAILS" || exit 3;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "setup.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "pip", "difftrain"):
        (tmp_path / ".venv/bin" / name).write_text(STAND_IN)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    return tmp_path


def make(folder, target, **environment):
    cleared = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHONUNBUFFERED")
    }
    return subprocess.run(
        ["make", target], cwd=folder, env=cleared | environment, capture_output=True, text=True
    )


def test_each_phase_of_the_demo_speaks_before_it_works_and_is_not_buffered(folder):
    done = make(folder, "demo")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    phases = [i for i, line in enumerate(lines) if line.startswith("demo, ")]
    assert [lines[i].split(":")[0] for i in phases] == [f"demo, {i} of 5" for i in (1, 2, 3, 4, 5)]
    assert phases[0] == 0
    works = [i for i, line in enumerate(lines) if line.startswith(("python -m pip", "difftrain "))]
    assert [lines[i].split()[1] for i in works] == ["-m", "train", "plot", "sample", "repair"]
    assert all(phase < work for phase, work in zip(phases, works, strict=True))
    assert all(work < phase for work, phase in zip(works, phases[1:], strict=False))
    assert all("unbuffered=1" in lines[i] for i in works)


def test_installing_is_neither_silent_nor_compiles_and_is_done_once(folder):
    done = make(folder, "install")
    (pip,) = (line for line in done.stdout.splitlines() if "-m pip" in line)
    words = pip.split(" | ")[0].split()
    assert "--no-compile" in words
    assert not {"-q", "--quiet"} & set(words)
    assert pip.endswith(f"tmp={folder}/.venv/fetched")  # what is being fetched counts as installed so far
    assert not (folder / ".venv/fetched").exists()
    assert "pip" not in make(folder, "install").stdout


def test_an_installation_that_fails_ends_the_demo_and_is_tried_again(folder):
    done = make(folder, "demo", PIP_FAILS="1")
    assert done.returncode != 0
    assert "demo, 2 of 5" not in done.stdout
    assert make(folder, "demo").returncode == 0
