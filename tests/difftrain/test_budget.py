import dataclasses
import itertools
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from difftrain.cli import main
from difftrain.config import Config, resolve_config
from difftrain.config.sources import preset_names, read_preset, read_toml
from difftrain.errors import UserError
from difftrain.reporting.log import read_metrics
from difftrain.schedule import learning_rate, masking_penalties
from difftrain.training import budget as budget_module
from difftrain.training import step as step_module
from difftrain.training.budget import FIRST_STEPS, TIMED_STEPS, shorten
from difftrain.training.loop import train
from launch import obey, train_command
from processes import run_in_processes
from run_digests import digests_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def machine(monkeypatch):
    """A function that makes the machine seem to take these seconds a step, and for the evaluated batches."""

    def takes(step, evaluation=0.0):
        seconds = [99.0] * FIRST_STEPS + [step] * (TIMED_STEPS - 1) + [50 * step, evaluation]
        clock = iter([0.0, *(reading for s in itertools.accumulate(seconds) for reading in (s, s))])
        monkeypatch.setattr(budget_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    return takes


@pytest.fixture
def budgeted(tiny):
    """A configuration of at most 80 steps, at least 8, in a minute, with 5 evaluations."""

    def make(**changes):
        values = {"max_iters": 80, "eval_interval": 20, "budget_minutes": 1, "min_iters": 8}
        return tiny(**(values | changes))

    return make


def fitted(config, capsys):
    """The configuration that a run with a budget was saved with, and what was said of it."""
    train(config)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "this machine" in line)
    return Config(**read_toml(Path(config.out_dir) / "config.toml")), line


@pytest.mark.parametrize(
    ("step", "evaluation", "steps", "line"),
    [
        (1.0, 0.0, 60, "this machine does 1.0 steps a second: 60 steps, about 1 min"),
        # All 8 batches of an evaluation take twice as long as the 4 that are timed: 5 times 4 s.
        (1.0, 2.0, 40, "this machine does 1.0 steps a second: 40 steps, about 1 min"),
        (1.04, 0.0, 56, "this machine does 0.96 steps a second: 56 steps, about 1 min"),
        (0.1, 0.0, 80, "this machine does 10.0 steps a second: 80 steps (max_iters), under 1 min"),
        (30.0, 0.0, 8, "this machine does 0.03 steps a second: 8 steps (min_iters), about 4 min"),
        (1.0, 30.0, 8, "this machine does 1.0 steps a second: 8 steps (min_iters), about 5 min"),
    ],
    ids=["fits", "evaluations count", "rounded down", "fast", "slow", "no time but for evaluations"],
)
def test_a_budget_takes_the_steps_that_the_machine_can_and_says_so(
    budgeted, machine, capsys, step, evaluation, steps, line
):
    machine(step, evaluation)
    saved, said = fitted(budgeted(), capsys)
    assert (saved.max_iters, saved.budget_minutes) == (steps, 0.0)
    assert said == line
    assert read_metrics(Path(saved.out_dir))[-1]["step"] == steps


def test_what_is_counted_in_steps_is_shortened_with_the_run():
    demo = resolve_config("demo", None, {})
    short = shorten(demo, 320)
    changed = {k: v for k, v in dataclasses.asdict(short).items() if v != getattr(demo, k)}
    assert changed == {
        "max_iters": 320, "budget_minutes": 0.0, "masking_warmup_iters": 64, "warmup_iters": 16,
        "eval_interval": 80, "log_interval": 10,
    }  # fmt: skip
    for step in (0, 30, 64, 130, 320):
        assert masking_penalties(step, short) == masking_penalties(4 * step, demo)
    assert learning_rate(130, short) == pytest.approx(learning_rate(520, demo), rel=0.01)
    assert learning_rate(320, short) == demo.min_lr
    assert shorten(demo, 1280) == dataclasses.replace(demo, budget_minutes=0.0)
    late = dataclasses.replace(demo, lr_decay_iters=1000, warmup_iters=0, log_interval=1)
    assert (shorten(late, 320).lr_decay_iters, shorten(late, 320).warmup_iters) == (250, 0)
    assert shorten(late, 320).log_interval == 1


def test_evaluations_stay_at_the_same_shares_of_a_run_of_any_length():
    demo = resolve_config("demo", None, {})
    for share in range(8, 41):
        short = shorten(demo, 1280 * share // 40)
        assert 4 * short.eval_interval == short.max_iters


def test_a_run_with_a_budget_is_the_run_of_its_numbers_and_resumes_as_such(
    budgeted, machine, capsys, monkeypatch
):
    config = budgeted(dropout=0.1)
    machine(6.0)
    saved, _ = fitted(config, capsys)
    assert saved.max_iters == 10
    plain = dataclasses.replace(saved, out_dir=saved.out_dir + "-plain")
    train(plain)
    assert digests_of(saved) == digests_of(plain)

    stopped = dataclasses.replace(config, out_dir=config.out_dir + "-stopped")
    calls, real = [], step_module._make_batch

    def signals(*arguments):
        calls.append(1)
        if len(calls) == FIRST_STEPS + TIMED_STEPS + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    machine(6.0)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_make_batch", signals)
        train(stopped)
    assert "stopped after 5 steps" in capsys.readouterr().out
    assert main(["train", "--resume", "--out_dir", stopped.out_dir]) == 0
    assert "timing" not in capsys.readouterr().out
    assert digests_of(dataclasses.replace(saved, out_dir=stopped.out_dir)) == digests_of(plain)


def test_the_folder_is_checked_before_anything_is_timed(budgeted, monkeypatch, tmp_path):
    monkeypatch.setattr(budget_module, "time", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        train(budgeted(out_dir=str(tmp_path / "file" / "run")))


def test_nothing_is_timed_where_there_is_nothing_to_choose(budgeted, monkeypatch):
    monkeypatch.setattr(budget_module, "time", None)
    train(budgeted(max_iters=4, min_iters=9))
    train(budgeted(), eval_only=True)
    config = Config(**read_toml(Path(budgeted().out_dir) / "config.toml"))
    assert (config.max_iters, config.budget_minutes) == (4, 0.0)


def test_a_budget_does_not_move_the_end_of_a_run_that_is_resumed(budgeted):
    train(budgeted(max_iters=2, budget_minutes=0))
    with pytest.raises(UserError, match="budget_minutes must be 0 to resume .*: give max_iters"):
        train(budgeted(), resume=True)


def test_only_the_demo_has_a_budget_and_steps_that_are_asked_for_are_taken(tmp_path):
    assert Config().budget_minutes == 0.0
    assert [name for name in preset_names() if "budget_minutes" in read_preset(name)] == ["demo"]
    assert resolve_config("demo", None, {}).budget_minutes == 3.0
    assert resolve_config("demo", None, {"max_iters": "5"}).budget_minutes == 0.0
    file = tmp_path / "c.toml"
    file.write_text("max_iters = 5\n")
    assert resolve_config("demo", str(file), {}).budget_minutes == 0.0
    file.write_text("max_iters = 5\nbudget_minutes = 2\n")
    assert resolve_config("demo", str(file), {}).budget_minutes == 2.0


def train_by_own_clock(configs, rank):
    """How the runs end where time goes fast for the main process and slowly for the others."""
    ticks = itertools.count(0.0, 3.0 if rank == 0 else 0.01)
    budget_module.time = SimpleNamespace(perf_counter=lambda: next(ticks))
    return [obey(train_command(config)) for config in configs]


@pytest.mark.xdist_group("processes")
def test_processes_whose_clocks_differ_agree_on_the_steps(budgeted, tmp_path):
    configs = [
        budgeted(gradient_accumulation_steps=2, parallel=kind, out_dir=str(tmp_path / kind))
        for kind in ("ddp", "fsdp")
    ]
    ended = run_in_processes(2, partial(train_by_own_clock, configs), tmp_path)
    for code, out, err in ended[0]:
        assert code == 0, out + err
        # An evaluation's 8 batches are timed whole by two processes: 5 times 3 s, and 15 steps of 3 s.
        assert out.count("this machine does 0.33 steps a second: 14 steps, about 1 min") == 1, out
    assert [code for code, *_ in ended[1]] == [0, 0]
    assert [read_metrics(Path(config.out_dir))[-1]["step"] for config in configs] == [14, 14]


@pytest.mark.slow
def test_the_demo_beats_unigram_entropy_clearly_in_its_fewest_steps(tmp_path):
    demo = resolve_config("demo", None, {"out_dir": str(tmp_path / "demo")})
    record = train(shorten(demo, demo.min_iters))
    assert record["masked_nll"]["15"] < record["unigram_entropy"] - 0.3  # 0.57 where it was measured
