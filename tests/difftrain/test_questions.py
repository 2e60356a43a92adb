import os
import platform
import subprocess
from importlib import metadata

import pytest

from difftrain import __version__
from difftrain.cli import main, questions
from difftrain.config.sources import preset_names


def version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi of these shell words, and nothing else, where programs are found."""

    def put(script):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return put


def test_version_names_what_a_bug_report_needs(capsys, driver):
    lines = version(capsys)
    assert lines[0] == f"difftrain {__version__}"
    assert lines[1] == f"torch {metadata.version('torch')}"
    assert lines[2].startswith("triton ")
    assert lines[3] == f"Python {platform.python_version()} on {platform.platform()}"
    assert [line for line in lines if line.startswith("device: ")] == lines[4:]
    assert len(lines) == 5
    assert lines[4].endswith(f", {os.cpu_count()} cores")


def test_version_names_each_graphics_card_and_its_driver_before_the_processor(capsys, driver):
    driver('echo "NVIDIA H100 80GB HBM3, 550.54.15"; echo "Tesla, Model 2, 470.1"')
    assert version(capsys)[4:6] == [
        "device: NVIDIA H100 80GB HBM3, driver 550.54.15",
        "device: Tesla, Model 2, driver 470.1",
    ]


def test_version_tells_of_a_driver_that_fails_or_does_not_answer(capsys, driver, monkeypatch):
    driver('echo "no devices were found" >&2; exit 6')
    assert version(capsys)[4] == "device: nvidia-smi fails: no devices were found"

    def hangs(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(questions.subprocess, "run", hangs)
    assert version(capsys)[4] == "device: nvidia-smi does not answer"


def test_version_says_what_is_not_installed(capsys, driver, monkeypatch):
    def version_of(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(questions.metadata, "version", version_of)
    assert version(capsys)[1:3] == ["torch is not installed", "triton is not installed"]


# Completion -----------------------------------------------------------------------------------------

COMPLETE = """
eval "$script"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p difftrain | sed 's/.*-F \\([^ ]*\\) .*/\\1/') difftrain "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def completed():
    """A function that gives what bash offers for the last of these words."""
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
        main(["--print-completion", "bash"])
    assert stopped.value.code == 0
    script = out.getvalue()

    def complete(*words, folder="."):
        done = subprocess.run(
            ["bash", "-c", COMPLETE, "bash", "difftrain", *words],
            env=os.environ | {"script": script}, cwd=folder, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.split()

    return complete


def test_bash_completes_commands_presets_options_and_their_words(completed):
    assert completed("tr") == ["train"]
    assert set(completed("train", "")) >= set(preset_names())
    assert completed("train", "--learning") == ["--learning_rate"]
    assert completed("train", "--mode", "") == ["diffusion", "gpt2"]
    assert completed("train", "--decay_lr", "f") == ["false"]
    assert completed("sample", "--pol") == ["--policy"]


def test_bash_completes_run_folders_and_configuration_files(completed, tmp_path):
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run.toml").write_text("")
    assert [word.rstrip("/") for word in completed("plot", "ru", folder=tmp_path)] == ["run-1"]
    assert completed("train", "--config", "run.", folder=tmp_path) == ["run.toml"]


def test_an_unknown_shell_is_refused_in_one_line_that_names_the_known_ones(capsys):
    pytest.importorskip("shtab", reason="the extra completion is not installed")
    assert main(["--print-completion", "cmd.exe"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("difftrain: SHELL must be one of bash, ")
    assert line.endswith(", got 'cmd.exe'")
