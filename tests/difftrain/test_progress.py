"""Progress: on a terminal alone, of the first process, and not where it is not wanted."""

import contextlib
import io
import sys

import torch

from difftrain.cli import main
from difftrain.data import preparing
from difftrain.progress import is_shown, progress, quiet
from difftrain.reporting.page.writing import write_report
from difftrain.sampling.causal import continue_causal
from difftrain.sampling.choosing import Choice
from difftrain.training.loop import train
from made_records import make_run
from specified_fill import scores_of, settled


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def on_terminal(monkeypatch):
    """Within it standard error is a terminal, on which a bar shows at once."""
    monkeypatch.setattr("difftrain.progress.DELAY", 0.0)
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def test_a_bar_has_a_name_a_count_a_rate_and_time_left_and_goes(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        items = progress(range(3), what="counting", unit="sheep")
        assert list(items) == [0, 1, 2]
        shown = terminal.getvalue()
        assert "counting" in shown
        assert "/3 [" in shown
        assert "sheep/s" in shown or "?sheep" in shown
        assert shown.split("\r")[-1].strip() == "" or shown.endswith("\r")


def test_there_is_no_bar_without_a_terminal_when_quiet_and_on_other_processes(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        assert is_shown()
        with quiet():
            assert not is_shown()
            with quiet(False):
                assert is_shown()
        monkeypatch.setenv("RANK", "1")
        assert not is_shown()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert not is_shown()
        assert list(progress(range(3), what="counting", unit="sheep")) == [0, 1, 2]
        assert sys.stderr.getvalue() == terminal.getvalue() == ""


def logits_of(x):
    return torch.zeros(*x.shape, 4, dtype=torch.float32, device="cpu")


def test_sampling_preparing_reading_and_the_report_show_bars(tmp_path, monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        x = torch.full((1, 6), 3, dtype=torch.int64, device="cpu")
        settled(logits_of, x, 3, "confidence", 2, Choice())
        assert "sampling" in terminal.getvalue()
        assert "pass" in terminal.getvalue()
        samples = torch.zeros(1, dtype=torch.int64, device="cpu")
        how = {"choice": Choice(), "seed": 0, "samples": samples}
        continue_causal(scores_of(logits_of), x[:, :1], 4, 3, block_size=2, **how)
        assert "token" in terminal.getvalue()
        (tmp_path / "texts").mkdir()
        for i in range(12):
            (tmp_path / "texts" / f"{i}.txt").write_text("abcab" * 50)
        preparing.prepare(str(tmp_path / "texts"), out=tmp_path / "out")
        assert "reading" in terminal.getvalue()
        assert "encoding" in terminal.getvalue()
        write_report([make_run(tmp_path / "run")])
        assert "drawing" in terminal.getvalue()


def test_training_shows_bars_and_quiet_leaves_the_results(tiny, capsys, monkeypatch):
    config = tiny(max_iters=2)
    with on_terminal(monkeypatch) as terminal:
        train(config)
    assert "evaluating" in terminal.getvalue()
    assert "step" in terminal.getvalue()
    capsys.readouterr()
    with on_terminal(monkeypatch) as terminal, quiet():
        train(config, overwrite=True)
    assert terminal.getvalue() == ""
    out = capsys.readouterr().out
    assert "| train |" not in out
    assert "| eval " in out
    assert "verdict: " in out


def test_quiet_leaves_what_a_command_was_for(tmp_path, capsys, monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        (tmp_path / "a.txt").write_text("abcab" * 50)
        assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert "225 training and 25 validation tokens" in line
        assert terminal.getvalue() == ""
        assert is_shown()


def test_a_text_is_encoded_in_pieces_as_it_is_whole(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    whole = preparing.prepare(str(tmp_path / "a.txt"), out=tmp_path / "whole")
    monkeypatch.setattr(preparing, "PIECE", 7)
    pieces = preparing.prepare(str(tmp_path / "a.txt"), out=tmp_path / "pieces")
    for name in ("train.bin", "val.bin"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes()
