"""``difftrain watch``: what it shows, that it only reads, and that it ends with the run."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from difftrain.cli import main
from difftrain.reporting import watch as watch_module
from difftrain.reporting.log import FILE, drop_records_after
from difftrain.reporting.watch import Follower, Watched, frame, watch_run
from made_records import made_record, make_run
from waiting import PATIENCE

END = '{"event": "end", "step": 40, "how": "ended"}\n'


def append(run, *records):
    with (run / FILE).open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def end(run, line=END):
    with (run / "sessions.jsonl").open("a") as file:
        file.write(line)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def looks(monkeypatch):
    """What happens between two looks at a run, in turn; after that, watching for ever is a failure."""
    happenings = []

    def sleep(_):
        assert happenings, "it goes on watching"
        happenings.pop(0)()

    # Its own name for the module: threads of other tests may sleep meanwhile.
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(sleep=sleep))
    return happenings


# What is read -------------------------------------------------------------------------------------


def test_only_what_is_new_is_read_and_half_a_line_waits_for_its_other_half(tmp_path):
    run = make_run(tmp_path / "run", until=0)
    follower = Follower(run)
    assert [r["step"] for r in follower.read()[0]] == [0]
    line = json.dumps(made_record("train", 0, 40))
    with (run / FILE).open("a") as file:
        file.write(line[:30])
        file.flush()
        assert follower.read() == ([], False)
        file.write(line[30:] + "\n{broken\n")
    (record,), is_anew = follower.read()
    assert (record["kind"], is_anew) == ("train", False)
    assert follower.read() == ([], False)


def test_a_file_that_is_not_there_yet_or_goes_or_shrinks_is_read_from_its_beginning(tmp_path):
    follower = Follower(tmp_path / "run")
    assert follower.read() == ([], False)
    run = make_run(tmp_path / "run", until=5)
    assert len(follower.read()[0]) == 6
    drop_records_after(run, 3, is_evaluated=True)  # as a resume does
    new, is_anew = follower.read()
    assert is_anew
    assert [r["step"] for r in new if r["kind"] == "train"] == [0, 1, 2]
    content = (run / FILE).read_bytes()
    (run / FILE).write_bytes(content[: len(content) // 2])  # in place
    assert follower.read()[1]
    shutil.rmtree(run)
    assert follower.read() == ([], True)
    make_run(run, until=1)
    assert len(follower.read()[0]) == 2


def test_what_a_resume_takes_back_is_forgotten(tmp_path):
    run = make_run(tmp_path / "run", until=20)
    watched = Watched(run)
    watched.look()
    assert watched.step == 20
    drop_records_after(run, 10, is_evaluated=True)
    watched.look()
    assert watched.step == 10
    assert [r["step"] for r in watched.evals] == [0, 10]


# What is shown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fine", [True, False])
def test_the_picture_has_figures_answers_penalties_time_left_and_the_last_warning_in_80_columns(
    tmp_path, is_fine
):
    run = make_run(tmp_path / "run", until=20)
    bad = made_record("eval", 20, 40)
    bad["cases"]["masked"]["gap"] = 55.0
    append(run, bad)
    watched = Watched(run)
    watched.look()
    lines = frame(watched, is_fine=is_fine)
    text = "\n".join(lines)
    for part in ("run: 20 of 40 steps", " 50%", "4 steps/s  5 s left", "15 % 2.65", "unigram 3.253", "pk 0.25", "pm 0.5",
                 "lr 0.00", "tokens/s", "with 15 % masked, 0.603 nats better", "warning at step 20:",
                 "docs/health.md#runaway-gap"):  # fmt: skip
        assert part in " ".join(text.split("\n")).replace("  docs", " docs"), part
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 20
    assert is_fine or text.isascii()
    bars = {
        line.split()[0]: line.split()[1]
        for line in lines
        if line.split()[0] in ("masked", "intact", "corrupted") and "nll" not in line
    }
    assert set(bars) == {"masked", "intact", "corrupted"}
    assert {len(bar) for bar in bars.values()} == {40}
    mark = "▒" if is_fine else "m"
    assert bars["masked"].count(mark) == pytest.approx(40 * 0.9 * 2.71828**-2, abs=1)


def test_records_with_fewer_or_broken_fields_are_shown_as_far_as_they_go(tmp_path):
    (tmp_path / "run").mkdir()
    append(
        tmp_path / "run",
        {"kind": "train", "step": 3},
        {"kind": "eval", "step": 4, "cases": {"masked": 1}, "masked_nll": []},
    )
    watched = Watched(tmp_path / "run")
    watched.look()
    assert frame(watched)[0] == "run: 4 steps"


def test_on_a_terminal_one_picture_changes_in_place(tmp_path, looks, monkeypatch):
    run = make_run(tmp_path / "run", until=10)
    looks += [lambda: append(run, made_record("train", 10, 40)), lambda: end(run)]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    watch_run(run)
    pictures = terminal.getvalue().split("\x1b[J")
    assert len(pictures) == 4  # three looks, and the last line
    heights = [picture.count("\n") for picture in pictures[:3]]
    assert pictures[1].startswith(f"\x1b[{heights[0]}A")
    assert "11 of 40 steps" in pictures[1]
    assert all(len(line.replace("\x1b[K", "")) <= 60 + len("\x1b[20A") for line in pictures[0].splitlines())
    assert pictures[3] == f"{run}: stopped, 11 steps are done\n"


def test_without_a_terminal_there_is_a_plain_line_for_each_record_and_warning(tmp_path, looks, capsys):
    bad = made_record("eval", 10, 40)
    bad["cases"]["masked"]["gap"] = 55.0
    looks += [
        lambda: make_run(tmp_path / "run", until=2),
        lambda: append(tmp_path / "run", bad, {"kind": "train", "step": 10}),
        lambda: end(tmp_path / "run"),
    ]
    watch_run(tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"waiting for {tmp_path}/run to begin"
    assert [line.split("|")[0].split()[1] for line in lines[1:6]] == ["0", "0", "1", "10", "10"]
    assert lines[6].startswith("warning at step 10: [MASK]'s logit lies 55 below")
    assert "\x1b" not in "".join(lines)
    assert lines[-1].endswith("stopped, 11 steps are done")


# When it ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("until", "line", "said"),
    [
        (40, END, "finished, 40 steps are done"),
        (20, END, "stopped, 20 steps are done"),
        (
            20,
            '{"event": "end", "how": "TrainingFailed: 10 steps in a row"}\n',
            "TrainingFailed: 10 steps in a row; 20 steps are done",
        ),
    ],
)
def test_it_ends_when_the_run_ends_and_says_how(tmp_path, until, line, said, looks, capsys):
    run = make_run(tmp_path / "run", until=until)
    looks.append(lambda: end(run, line))
    assert main(["watch", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}: {said}"


def test_it_ends_when_the_process_is_gone_or_an_old_runs_last_evaluation_is_there(tmp_path, looks, capsys):
    run = make_run(tmp_path / "run", until=20)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    end(run, json.dumps({"event": "start", "pid": dead.pid, "host": socket.gethostname()}) + "\n")
    watch_run(run)
    assert capsys.readouterr().out.splitlines()[-1].endswith("the run's process is gone; 20 steps are done")
    old = make_run(tmp_path / "old")
    (old / "sessions.jsonl").unlink()
    watch_run(old)
    assert capsys.readouterr().out.splitlines()[-1].endswith("finished, 40 steps are done")
    end(run, json.dumps({"event": "start", "pid": os.getpid(), "host": socket.gethostname()}) + "\n")
    looks.append(lambda: end(run))
    watch_run(run)
    assert looks == []


def test_it_shows_a_run_once_where_that_is_asked_for(tmp_path, capsys):
    run = make_run(tmp_path / "run", until=20)
    before = {p: p.read_bytes() for p in run.rglob("*")}
    assert main(["watch", str(run), "--once"]) == 0
    assert "20 of 40 steps" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in run.rglob("*")} == before
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert "has no records yet" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["watch", str(run), "--interval", "0"]) == 2


def test_a_real_run_is_watched_to_its_end_and_is_the_same_as_unwatched(tiny):
    from difftrain.training.loop import train
    from run_digests import digests_of

    config = tiny(max_iters=6)
    code = "import sys; from difftrain.cli import main; c = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(c)"
    watcher = subprocess.Popen(
        [sys.executable, "-c", code, "watch", config.out_dir, "--interval", "0.05"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    alarm = threading.Timer(PATIENCE, watcher.kill)
    alarm.start()
    train(config)
    out, _ = watcher.communicate()
    alarm.cancel()
    assert watcher.returncode == 0
    assert out.splitlines()[-1] == f"{config.out_dir}: finished, 6 steps are done"
    train(plain := tiny(max_iters=6, out_dir=config.out_dir + "-plain"))
    assert digests_of(config) == digests_of(plain)
