"""``difftrain.train``: the command line's training, as a function that prints nothing."""

import dataclasses
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

import difftrain
from difftrain import UserError
from difftrain.reporting.log import read_metrics
from difftrain.training import loop
from processes import run_in_processes
from run_digests import digests_of

pytestmark = pytest.mark.usefixtures("one_thread")


def records_of(config, kind):
    return [r for r in read_metrics(Path(config.out_dir)) if r["kind"] == kind]


def without_time(records):
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def test_it_prints_nothing_and_gives_the_run_that_the_command_line_makes(tiny, capfd):
    config = tiny(deterministic=True)
    loop.train(config)
    same = tiny(out_dir=config.out_dir + "-same", deterministic=True)
    assert capfd.readouterr().out
    run = difftrain.train(same)
    assert capfd.readouterr() == ("", "")
    assert digests_of(same) == digests_of(config)
    assert (type(run), run.path, run.state, run.step) == (difftrain.Run, Path(same.out_dir), "finished", 12)
    assert run.config == same


def test_every_step_and_evaluation_is_told_as_it_is_recorded(tiny):
    steps, evaluations = [], []
    config = tiny(log_interval=5)
    difftrain.train(config, on_step=steps.append, on_evaluation=evaluations.append)
    assert [record["step"] for record in steps] == list(range(12))
    assert [record for record in steps if "loss" in record] == without_time(records_of(config, "train"))
    assert evaluations == without_time(records_of(config, "eval"))
    assert steps[1].keys() == {"kind", "step", "pk", "pm", "lr"}
    assert (steps[3]["pk"], steps[3]["pm"]) == difftrain.masking_penalties(3, config)


def test_progress_is_what_the_command_line_prints_or_goes_to_a_function(tiny, capfd):
    def shown(out):
        return [line.split(" | ")[0] for line in out.splitlines()]

    config, lines = tiny(max_iters=2), []
    loop.train(config)
    expected = shown(capfd.readouterr().out)
    assert any(line.startswith("step      1") for line in expected)
    difftrain.train(config, overwrite=True, progress=True)
    assert shown(capfd.readouterr().out) == expected
    difftrain.train(config, overwrite=True, progress=lines.append)
    assert capfd.readouterr() == ("", "")
    assert shown("\n".join(lines)) == expected


def interrupt(record):
    if record["step"] == 5:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("listeners", "steps"),
    [
        ({"on_step": interrupt}, (6, 7)),
        ({"on_step": lambda record: record["step"] == 5}, (6, 7)),
        ({"on_evaluation": lambda record: record["step"] == 8}, (8, 8)),
    ],
    ids=["ctrl-c", "step", "evaluation"],
)  # fmt: skip
def test_a_stop_keeps_a_checkpoint_from_which_it_goes_on_exactly(tiny, listeners, steps):
    straight = tiny()
    loop.train(straight)
    before = signal.getsignal(signal.SIGINT)
    stopped = tiny(out_dir=straight.out_dir + "-stopped")
    run = difftrain.train(stopped, **listeners)
    assert signal.getsignal(signal.SIGINT) is before
    assert run.state == "stopped"
    assert steps[0] <= run.checkpoints[-1].step <= steps[1]
    assert run.verify() == {}
    told = []
    run = difftrain.train(run.config, resume=True, on_step=told.append)
    assert told[0]["step"] in steps
    assert run.state == "finished"
    assert digests_of(stopped) == digests_of(straight)


def test_what_a_function_returns_stops_nothing_unless_it_is_true(tiny):
    run = difftrain.train(tiny(max_iters=2), on_step=lambda _: 1, on_evaluation=lambda _: "stop")
    assert run.state == "finished"


def test_a_function_may_do_to_its_record_what_it_likes(tiny):
    def spoil(record):
        record["masked_nll"].clear()
        record.clear()

    lines = []
    difftrain.train(tiny(max_iters=1), on_evaluation=spoil, progress=lines.append)
    assert lines[-1].startswith("unigram entropy")
    assert "at 15 %" in lines[-1]


def test_a_function_that_fails_ends_the_run_with_its_error(tiny):
    def fail(record):
        raise KeyError("mine")

    config = tiny()
    with pytest.raises(KeyError, match="mine"):
        difftrain.train(config, on_evaluation=fail)
    run = difftrain.Run(config.out_dir)
    assert run.state == "ended by KeyError: 'mine'"
    assert [saved.step for saved in run.checkpoints] == [0]
    assert run.evaluations["step"].tolist() == [0]


def test_it_runs_in_a_thread_which_hears_of_no_signal(tiny):
    before, runs = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: runs.append(difftrain.train(tiny(max_iters=2))))
    thread.start()
    thread.join()
    assert runs[0].state == "finished"
    assert signal.getsignal(signal.SIGINT) is before


def test_paths_are_expanded(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", str(tmp_path))
    run = difftrain.train(tiny(max_iters=1, out_dir="$PLACE/expanded"))
    assert run.path == tmp_path / "expanded"


def train_and_listen(config, rank):
    steps = []
    run = difftrain.train(
        dataclasses.replace(config, gradient_accumulation_steps=2),
        on_step=steps.append,
        progress=steps.append,
    )
    return run.step, len(steps)


@pytest.mark.xdist_group("processes")
def test_of_several_processes_the_main_one_is_told_and_each_gets_the_run(tiny, tmp_path):
    (main, n_main), (other, n_other) = run_in_processes(
        2, partial(train_and_listen, tiny(max_iters=2)), tmp_path
    )
    assert (main, other) == (2, 2)
    assert n_main > 2
    assert n_other == 0


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        ({"n_layer": 1}, {}, "config must be a difftrain.Config, got dict"),
        (None, {"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        (None, {"on_step": 3}, "on_step must be a function, got int"),
        (None, {"on_evaluation": "print"}, "on_evaluation must be a function, got str"),
        (None, {"progress": "bar"}, "progress must be true, false or a function, got str"),
        (None, {"resume": True}, "has no checkpoint to resume from"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(tiny, config, options, told):
    with pytest.raises(UserError, match=told):
        difftrain.train(config or tiny(), **options)
    assert not Path(tiny().out_dir).exists()
