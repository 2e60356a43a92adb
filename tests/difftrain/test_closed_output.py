"""What becomes of a command when nobody reads its output any longer, as after ``| head -1``."""

import contextlib
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from difftrain.checkpoints import saver as saver_module
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.cli import PIPE_CLOSED, main
from difftrain.errors import OutputClosed
from difftrain.training import console as console_module
from difftrain.training.loop import train
from launch import finish, start, train_command
from run_digests import digests_of
from waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run_unread(*words, is_error_read=True, is_buffered=True):
    """Exit code and standard error of a command whose standard output, or both, nobody reads from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "difftrain", *map(str, words)],
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "" if is_buffered else "1"}, text=True, timeout=PATIENCE,
        stdout=writer, stderr=subprocess.PIPE if is_error_read else writer,
    )  # fmt: skip
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_a_help_that_nobody_reads_ends_quietly_with_the_code_of_a_closed_pipe(words):
    assert PIPE_CLOSED == 141
    assert run_unread(*words) == (141, "")
    assert run_unread(*words, is_error_read=False) == (141, None)
    assert run_unread(*words, is_buffered=False) == (141, "")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_closed_pipe_and_a_terminal_that_is_gone_are_one_and_a_full_disk_is_not(number, monkeypatch):
    def write(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(console_module.tqdm, "write", write)
    say = console_module.Console(is_main=True)
    with pytest.raises(OSError, match="No space") if number == errno.ENOSPC else contextlib.nullcontext():
        say("a line")
    assert say.is_closed == (number != errno.ENOSPC)


def test_a_mistake_that_nobody_reads_keeps_its_exit_code():
    assert run_unread("train", "--no_such_option", "1", is_error_read=False) == (2, None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file that is always full")
def test_an_output_file_on_a_full_disk_is_told_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "difftrain", "--help"],
            env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("difftrain: the disk is full")


class Unread(io.StringIO):
    """A stream that breaks when a line comes that begins like this; an empty beginning is any line's."""

    def __init__(self, beginning=""):
        super().__init__()
        self.beginning = beginning

    def write(self, text):
        if text.startswith(self.beginning):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_a_text_that_nobody_reads_is_kept_and_token_files_are_not_half_made(tiny, tmp_path, capsys):
    config = tiny(max_iters=1)
    train(config)
    (tmp_path / "a.txt").write_text("abcab" * 50)
    before = sorted(tmp_path.iterdir())
    with contextlib.redirect_stdout(Unread()):
        assert main(["sample", config.out_dir, "--device", "cpu"]) == 141
        assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 141
    (kept,) = Path(config.out_dir, "samples").iterdir()
    assert len(kept.read_text()) == 17
    assert sorted(tmp_path.iterdir()) == before
    assert capsys.readouterr().err == ""


# Training -------------------------------------------------------------------------------------------


def test_training_that_nobody_reads_stops_as_at_ctrl_c_and_goes_on_exactly(tiny):
    config = tiny(max_iters=6)
    code, err = run_unread(*train_command(config))
    assert code == 141
    (line,) = err.splitlines()
    assert line == (
        "difftrain: nobody reads standard output any longer; stopped after 0 steps; go on with: "
        f"difftrain train --resume --out_dir {config.out_dir}"
    )
    assert find_checkpoint(Path(config.out_dir), "latest").step == 0
    train(config, resume=True)
    straight = tiny(max_iters=6, out_dir=config.out_dir + "-straight")
    train(straight)
    assert digests_of(config) == digests_of(straight)


@pytest.mark.xdist_group("processes")
def test_training_whose_reader_leaves_saves_the_step_it_is_at_on_all_processes(tiny):
    config = tiny(max_iters=10**6, eval_interval=10**6, gradient_accumulation_steps=2)
    process = start("-m", "difftrain", *train_command(config), processes=2)
    for line in process.stdout:
        if line.startswith("step      5 | train"):
            break
    process.stdout.close()
    code, _, err = finish(process)
    assert code == 1, err  # torchrun's own; it names that of the process
    assert "exitcode  : 141" in err
    (steps,) = re.findall(r"any longer; stopped after (\d+) steps; go on with", err)
    assert find_checkpoint(Path(config.out_dir), "latest").step == int(steps) > 5
    assert "Traceback" not in err.split("failed (exitcode")[0]


@pytest.mark.parametrize("options", [{}, {"eval_only": True}], ids=["trained", "evaluated"])
def test_training_whose_last_line_is_unread_is_done_and_says_it_elsewhere(tiny, options):
    config = tiny(max_iters=2)
    with (
        contextlib.redirect_stdout(Unread("unigram entropy")),
        pytest.raises(OutputClosed, match="longer; unigram entropy"),
    ):
        train(config, **options)
    assert options or find_checkpoint(Path(config.out_dir), "latest").step == 2


# What is shown before it is stored ------------------------------------------------------------------


def test_a_text_is_shown_though_no_copy_of_it_can_be_kept(tiny, capsys):
    config = tiny(max_iters=1)
    train(config)
    (Path(config.out_dir) / "samples").write_text("in the way")
    capsys.readouterr()
    assert main(["sample", config.out_dir, "--device", "cpu", "--prompt", "red"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("red")
    (line,) = shown.err.splitlines()
    assert line.startswith("difftrain: warning: no copy of the text is kept: [Errno 17]")


def test_the_last_figures_are_shown_though_the_last_save_fails(tiny, monkeypatch, capsys):
    real = saver_module.save_checkpoint

    def full(run_dir, step, *rest, **options):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(run_dir, step, *rest, **options)

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    assert main(train_command(tiny(max_iters=4))) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith("unigram entropy 2")
    assert "the disk is full" in shown.err
