"""Schedules of any shape: what they give at a step, what they are told by evaluations, and how mistakes are named."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.cli import main
from difftrain.config import Config, resolve_config
from difftrain.config.schedules import ANSWERS, CASE_WEIGHTS, KINDS, METRICS, PENALTIES, QUANTITIES, scaled
from difftrain.data import open_corpus
from difftrain.errors import UserError
from difftrain.reporting.log import read_metrics
from difftrain.runtime import Runtime
from difftrain.schedule import (
    advanced,
    case_weights,
    final_penalties,
    learning_rate,
    masking_penalties,
    metric_of,
    reached_of,
    value_of,
)
from difftrain.training import step as step_module
from difftrain.training.budget import shorten
from difftrain.training.loop import train
from difftrain.training.step import _make_batch
from difftrain_kernels import CaseTable, cases
from resume_runs import train_all, train_with_stop
from run_digests import digests_of

STEPS = (0, 1, 2, 3, 4, 5, 6, 9)
PK = "penalty_keep_mask"


def of(table, **options):
    return Config(schedules={PK: table}, **options)


def values(table, **options):
    return [value_of(PK, step, of(table, **options)) for step in STEPS]


# What a shape gives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"shape": "constant", "value": 0.5}, [0.5] * 8),
        ({"shape": "constant"}, [0.25] * 8),
        ({"shape": "linear", "from": 2, "to": 0, "steps": 4}, [2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
        ({"shape": "linear", "from": 1.25, "steps": 2, "after": 2}, [1.25, 1.25, 1.25, 0.75, 0.25, 0.25, 0.25, 0.25]),
        ({"shape": "linear", "from": 1, "to": 3, "steps": 0, "after": 3}, [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0]),
        ({"shape": "step", "at": [2, 5], "values": [1, 0, 3]}, [1.0, 1.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0]),
        ({"shape": "points", "at": [1, 3, 3, 5], "values": [1, 2, 5, 3]}, [1.0, 1.0, 1.5, 5.0, 4.0, 3.0, 3.0, 3.0]),
        ({"shape": "points", "at": [4], "values": [2]}, [2.0] * 8),
    ],
    ids=lambda value: value["shape"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_shape_gives_these_values(table, expected):
    assert values(table) == expected


def test_a_cosine_leaves_and_arrives_level_and_is_half_way_in_the_middle():
    config = of({"shape": "cosine", "from": 1.0, "to": 0.0, "steps": 100, "after": 10})
    assert [value_of(PK, step, config) for step in (0, 10, 110, 500)] == [1.0, 1.0, 0.0, 0.0]
    assert value_of(PK, 60, config) == pytest.approx(0.5)
    assert value_of(PK, 35, config) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


@pytest.mark.parametrize("warmup", [0, 1, 7, 1000])
def test_linear_tables_are_the_specifications_curriculum_to_the_bit(warmup):
    plain = Config(masking_warmup_iters=warmup)
    told = Config(
        masking_warmup_iters=123,
        schedules={
            PK: {"shape": "linear", "from": 1, "steps": warmup},
            "penalty_mask_correct": {"shape": "linear", "from": 0, "steps": warmup},
        },
    )
    for step in (*range(1002), 10**9):
        assert masking_penalties(step, told) == masking_penalties(step, plain)


def test_without_schedules_every_quantity_is_its_option_and_a_case_weighs_1():
    config = Config()
    moved = {*PENALTIES, *CASE_WEIGHTS, "learning_rate"}
    for name in set(QUANTITIES) - moved:
        assert value_of(name, 3, config) == getattr(config, name)
    assert {value_of(name, 3, config) for name in CASE_WEIGHTS} == {1.0}
    assert case_weights(3, config) is None


def test_a_scheduled_learning_rate_replaces_warmup_and_decay():
    config = Config(schedules={"learning_rate": {"shape": "step", "at": [5], "values": [0.1, 0.01]}})
    assert [learning_rate(step, config) for step in (0, 4, 5)] == [0.1, 0.1, 0.01]


def test_final_penalties_are_the_options_whatever_the_schedules_do():
    assert final_penalties(of({"shape": "constant", "value": 7})) == (0.25, 0.5)
    assert final_penalties(Config(recipe="llada")) == (1.0, 1.0)


def test_case_weights_stand_in_the_cells_of_the_case_table():
    assert (KINDS, ANSWERS) == (cases.KINDS, cases.ANSWERS)
    tables = {name: {"shape": "constant", "value": 2 + i} for i, name in enumerate(CASE_WEIGHTS)}
    weights = case_weights(0, Config(schedules=tables))
    assert (weights[0][0], weights[1][0]) == (1.0, 0.0) == masking_penalties(0, Config())
    for i, name in enumerate(CASE_WEIGHTS):
        kind, answer = name.split("_")[1:]
        assert weights[KINDS.index(kind)][ANSWERS.index(answer)] == 2 + i


# Schedules that wait for a metric -------------------------------------------------------------------

WAITING = {
    "shape": "metric", "metric": "masked_nll.50", "below": [3, 2], "values": [1, 0.6, 0.25], "steps": 4, "after": 1,
}  # fmt: skip


def evaluated(step, nll):
    return {"step": step, "masked_nll": {"50": nll}}


def test_a_metric_moves_a_schedule_one_value_on_at_a_time_and_not_while_it_moves():
    config = of(WAITING)
    reached = {}
    seen = []
    for step, nll in (
        (0, 0.0),
        (2, 3.0),
        (4, math.nan),
        (6, 2.9),
        (6, 1.0),
        (8, 1.0),
        (10, 2.0),
        (12, 1.9),
        (20, 0.0),
    ):
        before = {name: list(moves) for name, moves in reached.items()}
        now = advanced(reached, evaluated(step, nll), config)
        assert reached == before, "not modified"
        reached = now
        seen.append(reached.get(PK))
    assert seen == [None, None, None, [1, 6], [1, 6], [1, 6], [1, 6], [2, 12], [2, 12]]
    assert [value_of(PK, step, config, {PK: [1, 6]}) for step in (6, 8, 10, 99)] == [1.0, 0.8, 0.6, 0.6]
    assert value_of(PK, 99, config) == 1.0


def test_an_evaluation_that_is_made_twice_moves_a_schedule_once():
    config = of({"shape": "metric", "metric": "nll", "below": 2, "values": [3, 2, 1]})
    record = {"step": 5, "nll": 1.0}
    once = advanced({}, record, config)
    assert once == advanced(once, record, config) == {PK: [1, 5]}
    assert advanced(once, record | {"step": 6}, config) == {PK: [2, 6]}


def test_above_waits_for_a_metric_to_rise_and_two_quantities_wait_for_themselves():
    tables = {
        PK: {"shape": "metric", "metric": "nll", "above": 2, "values": [1, 0.5]},
        "mask_factor": {"shape": "metric", "metric": "mask_everywhere", "below": 0.9, "values": [0.5, 1]},
    }
    config = Config(schedules=tables)
    shares = {"cases": {"masked": {"mask": 0.95}, "intact": {"mask": 0.95}}}
    assert advanced({}, {"step": 3, "nll": 2.5, **shares}, config) == {PK: [1, 3]}
    shares["cases"]["intact"]["mask"] = 0.8
    assert advanced({PK: [1, 3]}, {"step": 4, "nll": 2.5, **shares}, config) == {
        PK: [1, 3],
        "mask_factor": [1, 4],
    }
    assert value_of("mask_factor", 4, config, {"mask_factor": [1, 4]}) == 1.0


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_has_every_metric_that_can_be_named(tiny):
    for mode in ("diffusion", "gpt2"):
        config = tiny(max_iters=1, mode=mode, out_dir=str(Path(tiny().out_dir) / mode))
        record = train(config)
        allowed = METRICS if mode == "diffusion" else ("nll", "loss_final")
        for name in allowed:
            assert math.isfinite(metric_of(record, name)), name
            of({"shape": "metric", "metric": name, "below": 1, "values": [1, 2]})
    shares = (
        [record["cases"][kind]["mask"] for kind in ("masked", "intact")] if "cases" in record else [0.0]
    )
    assert min(shares) >= 0.0


def test_state_of_another_configuration_is_left_out_or_cut():
    state = {"schedules": {PK: [2, 12], "mask_factor": [1, 4]}}
    assert reached_of(state, of(WAITING)) == {PK: [2, 12]}
    shorter = WAITING | {"values": [1, 0.6], "below": 3}
    assert reached_of(state, of(shorter)) == {PK: [1, 12]}
    assert reached_of({}, of(WAITING)) == {}


# In a run -------------------------------------------------------------------------------------------

EVERYTHING = {
    PK: {"shape": "metric", "metric": "masked_nll.50", "below": [9, 8], "values": [1, 0.6, 0.25], "steps": 2, "after": 3},
    "penalty_mask_correct": {"shape": "cosine", "from": 0.1, "steps": 9},
    "weight_corrupted_other": {"shape": "points", "at": [2, 6], "values": [1, 3]},
    "guaranteed_correct_factor": {"shape": "linear", "from": 0.5, "steps": 8},
    "mask_factor": {"shape": "step", "at": [4], "values": [0.5, 1]},
    "replace_factor": {"shape": "linear", "from": 0, "steps": 6},
    "label_smoothing": {"shape": "linear", "from": 0, "to": 0.1, "steps": 6},
    "learning_rate": {"shape": "cosine", "from": 0.01, "to": 0.001, "steps": 12},
    "weight_decay": {"shape": "constant", "value": 0.3},
}  # fmt: skip
RUN = {
    "max_iters": 13, "eval_interval": 3, "log_interval": 2, "dropout": 0.1, "batch_size": 2, "schedules": EVERYTHING,
}  # fmt: skip


def reached_in(config):
    return find_checkpoint(Path(config.out_dir), "latest").state["schedules"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.xdist_group("processes")
def test_a_run_stopped_between_any_moves_and_resumed_ends_in_the_same_bits(tiny, capsys):
    straight = tiny(**RUN)
    train(straight)
    moves = [line for line in capsys.readouterr().out.splitlines() if line.startswith("schedule: ")]
    assert moves == [f"schedule: {PK} moves on to 0.6", f"schedule: {PK} moves on to 0.25"]
    assert reached_in(straight)[PK][0] == 2, "so that the stops lie before, at and after its moves"
    for stop_at in (1, 3, 4, 6, 7, 10):
        stopped = dataclasses.replace(straight, out_dir=f"{straight.out_dir}-{stop_at}")
        train_with_stop(stopped, stop_at)
        assert digests_of(stopped) == digests_of(straight), stop_at


@pytest.mark.usefixtures("one_thread")
@pytest.mark.xdist_group("processes")
def test_two_processes_move_together_and_resume_exactly(tiny, tmp_path):
    straight = tiny(**RUN, gradient_accumulation_steps=2, out_dir=str(tmp_path / "two"))
    stopped = dataclasses.replace(straight, out_dir=str(tmp_path / "stopped"))
    train_all([(straight, None), (stopped, 7)], 2, tmp_path)
    assert reached_in(straight)[PK][0] > 0
    assert digests_of(stopped) == digests_of(straight)


@pytest.mark.usefixtures("one_thread")
def test_a_step_takes_every_quantity_at_its_value_and_the_log_says_which(tiny, monkeypatch):
    config = tiny(**RUN | {"log_interval": 1})
    seen = []
    real_loss, real_batch, real_update = (
        step_module.model_loss,
        step_module._make_batch,
        step_module.LiveRun.update,
    )

    def loss(*arguments, **options):
        seen.append(
            {"case_weights": options["case_weights"], "label_smoothing": options["label_smoothing"]}
        )
        return real_loss(*arguments, **options)

    def batch(corpus, samples, config, runtime, corruption, own_errors):
        found = real_batch(corpus, samples, config, runtime, corruption, own_errors)
        batches.append(corruption)
        return found

    def update(run, *arguments):
        groups = run.optimizer.param_groups
        rates.append(
            (groups[0]["lr"], groups[1]["lr"], groups[0]["weight_decay"], groups[1]["weight_decay"])
        )
        return real_update(run, *arguments)

    batches, rates, histories = [], [], []
    monkeypatch.setattr(step_module, "model_loss", loss)
    monkeypatch.setattr(step_module, "_make_batch", batch)
    monkeypatch.setattr(step_module.LiveRun, "update", update)
    real_advanced = step_module.advanced

    def advance(reached, record, config):
        histories.append((record["step"], real_advanced(reached, record, config)))
        return histories[-1][1]

    monkeypatch.setattr(step_module, "advanced", advance)
    train(config)
    records = [r for r in read_metrics(Path(config.out_dir)) if r["kind"] == "train"]
    assert len(records) == len(seen) == len(batches) == len(rates) == 13
    for step, record in enumerate(records):
        reached = [now for at, now in histories if at <= step][-1]

        def now(name, step=step, reached=reached):
            return value_of(name, step, config, reached)

        assert seen[step]["case_weights"] == case_weights(step, config, reached)
        assert seen[step]["case_weights"][2][2] == now("weight_corrupted_other")
        assert seen[step]["label_smoothing"] == now("label_smoothing")
        assert batches[step] == {
            n: now(n) for n in ("guaranteed_correct_factor", "mask_factor", "replace_factor")
        }
        assert rates[step] == (now("learning_rate"), now("learning_rate"), 0.3, 0.0)
        assert (record["pk"], record["pm"], record["lr"]) == (
            now(PK),
            now("penalty_mask_correct"),
            rates[step][0],
        )
        for name in set(EVERYTHING) - {PK, "penalty_mask_correct", "learning_rate"}:
            assert record[name] == now(name)


def test_the_corruption_of_a_step_is_that_of_its_own_options(tiny):
    config = tiny()
    corpus, samples = open_corpus(config.data), torch.arange(64, dtype=torch.int64, device="cpu")
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1)
    changes = {"guaranteed_correct_factor": 0.5, "mask_factor": 0.25, "replace_factor": 0.0}
    as_options = dataclasses.replace(config, **changes)
    found = _make_batch(corpus, samples, config, runtime, changes)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found[:2], _make_batch(corpus, samples, as_options, runtime)[:2], strict=True)
    )
    assert not torch.equal(found[0], _make_batch(corpus, samples, config, runtime)[0])


@pytest.mark.usefixtures("one_thread")
def test_the_logged_loss_is_that_of_all_nine_weights(tiny, monkeypatch):
    tables = []
    real = CaseTable.loss_at

    def loss_at(table, *arguments, **options):
        if options.get("case_weights"):
            tables.append((real(table, **options).item(), options["case_weights"]))
        return real(table, *arguments, **options)

    monkeypatch.setattr(CaseTable, "loss_at", loss_at)
    weight = {"weight_intact_target": {"shape": "constant", "value": 5}}
    config = tiny(max_iters=1, schedules=weight)
    train(config)
    train_record, eval_record = (
        next(r for r in read_metrics(Path(config.out_dir)) if r["kind"] == kind)
        for kind in ("train", "eval")
    )
    assert {train_record["loss"], eval_record["loss"]} <= {loss for loss, _ in tables}
    assert all(weights[1] == [0.0, 5.0, 1.0] or weights[1][1] == 5.0 for _, weights in tables)


@pytest.mark.usefixtures("one_thread")
def test_validation_does_not_follow_the_schedules(tiny):
    plain, told = (
        tiny(max_iters=1),
        tiny(max_iters=1, schedules=EVERYTHING, out_dir=f"{tiny().out_dir}-told"),
    )
    assert train(plain)["validation_id"] == train(told)["validation_id"]


@pytest.mark.usefixtures("one_thread")
def test_tables_of_the_old_curriculum_train_the_same_bits(tiny):
    plain = tiny(max_iters=9)
    ramp = {"shape": "linear", "steps": plain.masking_warmup_iters}
    told = dataclasses.replace(
        plain,
        schedules={PK: ramp | {"from": 1}, "penalty_mask_correct": ramp | {"from": 0}},
        out_dir=f"{plain.out_dir}-told",
    )
    train(plain)
    train(told)
    weights = [
        load_file(find_checkpoint(Path(c.out_dir), "latest").folder / "model.safetensors")
        for c in (plain, told)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_budget_shortens_schedules_with_the_run():
    text = Config(schedules=EVERYTHING).schedules
    half = Config(schedules=scaled(text, 0.5)).scheduled
    assert half[PK]["steps"] == 1
    assert half["weight_corrupted_other"]["at"] == [1, 3]
    assert half["mask_factor"]["at"] == [2]
    assert half["learning_rate"]["after"] == 0
    assert half["learning_rate"]["steps"] == 6
    config = Config(schedules=EVERYTHING, max_iters=100)
    assert shorten(config, 50).schedules == scaled(text, 0.5)
    assert Config(schedules=scaled(text, 0.01)).scheduled["learning_rate"]["steps"] == 1


# As text, and mistakes ------------------------------------------------------------------------------


def test_a_table_comes_back_from_a_file_the_command_line_and_a_checkpoint(tmp_path):
    config = Config(schedules=EVERYTHING)
    (tmp_path / "all.toml").write_text(config.to_toml(), encoding="utf-8")
    assert resolve_config(None, str(tmp_path / "all.toml"), {}) == config
    assert resolve_config(None, None, {"schedules": config.schedules}) == config
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    (tmp_path / "short.toml").write_text(f"[schedules]\n{PK} = {{shape = 'constant', value = 1}}\n")
    short = resolve_config(None, str(tmp_path / "short.toml"), {})
    assert short.scheduled == {PK: {"shape": "constant", "value": 1.0}}
    assert resolve_config(None, str(tmp_path / "short.toml"), {"schedules": "{}"}) == Config()
    assert hash(short) != hash(Config())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (3, f"schedules.{PK} must be a table with a shape, got int 3"),
        ({}, f"schedules.{PK}.shape must be one of constant, linear, .*, got None"),
        ({"shape": "liner"}, "shape must be one of .*, got 'liner'; did you mean linear"),
        ({"shape": "linear", "from": 1}, "must have the key steps for the shape linear, got shape, from"),
        ({"shape": "linear", "from": 1, "stpes": 3}, "must have of from, to, after, steps .*, got 'stpes'; did you mean steps"),
        ({"shape": "linear", "from": -1, "steps": 3}, f"schedules.{PK}.from must be at least 0.0, got -1"),
        ({"shape": "linear", "from": "a", "steps": 3}, "from must be a number, got str 'a'"),
        ({"shape": "linear", "from": True, "steps": 3}, "from must be a number, got bool True"),
        ({"shape": "linear", "from": math.inf, "steps": 3}, "from must be finite, got inf"),
        ({"shape": "cosine", "from": 10**400, "steps": 3}, "from must be finite, got 1000"),
        ({"shape": "linear", "from": 1, "steps": -3}, "steps must be a whole number of steps, 0 or more, got -3"),
        ({"shape": "linear", "from": 1, "steps": 1.5}, "steps must be a whole number of steps, 0 or more, got 1.5"),
        ({"shape": "step", "at": [], "values": [1]}, "at must be a list of steps, got \\[\\]"),
        ({"shape": "step", "at": [3, 1], "values": [1, 2, 3]}, "at must be a list of steps that rise, got \\[3, 1\\]"),
        ({"shape": "step", "at": [3], "values": [1]}, "values must be 2 numbers for 1 steps in at, got 1"),
        ({"shape": "points", "at": [3], "values": [1, 2]}, "values must be 1 numbers for 1 steps in at, got 2"),
        ({"shape": "points", "at": [3], "values": 1}, "values must be a list of numbers, got 1"),
        (WAITING | {"metric": "masked_nll.5"}, "metric must be one of nll, .*, got 'masked_nll.5'; did you mean"),
        (WAITING | {"below": [1]}, "below must be a number or 2 for 3 values, got 1"),
        (WAITING | {"above": 3}, "must have either below or above, got below and above"),
        ({"shape": "metric", "metric": "nll", "values": [1, 2]}, "must have either below or above, got neither"),
        ({"shape": "metric", "metric": "nll", "below": 1, "values": [1]}, "values must be at least 2 numbers"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named_in_one_line(table, message):
    with pytest.raises(UserError, match=message) as caught:
        of(table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": 3}, "schedules must be a table, got int 3"),
        ({"schedules": "{a = "}, "schedules is not valid TOML"),
        ({"schedules": "{}\nx = 1"}, "schedules must name quantities"),
        ({"schedules": {"mask_facto": {}}}, "schedules must name quantities that can move, got 'mask_facto'; did you"),
        ({"schedules": {"mask_factor": {"shape": "constant", "value": 2}}}, "mask_factor.value must be at most 1.0, got 2"),
        ({"schedules": {PK: {"shape": "constant"}}, "recipe": "llada"}, "schedules must be of label_smoothing, .*, got"),
        ({"schedules": {PK: {"shape": "constant"}}, "mode": "gpt2"}, "schedules must be of label_smoothing, .*, got"),
        (
            {"schedules": {"learning_rate": WAITING}, "mode": "gpt2"},
            "metric must be one of nll, loss_final, got 'masked_nll.50'",
        ),
        (
            {"schedules": {"label_smoothing": {"shape": "constant"}}, "compile": "step"},
            "schedules must not have label_smoothing with compile step",
        ),
    ],
)  # fmt: skip
def test_wrong_schedules_are_named_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        Config(**options)


def test_a_wrong_schedule_ends_a_command_with_one_line(capsys):
    assert main(["train", "--schedules", "{learning_rate = {shape = 'lin'}}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("difftrain: schedules.learning_rate.shape must be one of constant, ")


# Shown before a run ---------------------------------------------------------------------------------


def shown(capsys, *words):
    assert main(["schedule", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_schedule_shows_values_and_a_picture_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = shown(capsys, "--max_iters", 2001)
    assert lines[0].split() == ["step", PK, "penalty_mask_correct", "learning_rate"]
    rows = {int(line.split()[0]): line.split()[1:3] for line in lines[1:12]}
    assert list(rows) == list(range(0, 2001, 200))
    assert (rows[0], rows[400], rows[1000]) == (["1", "0"], ["0.7", "0.2"], ["0.25", "0.5"])
    start = lines.index(f"{PK}: by its own options") + 1
    picture = lines[start : start + 8]
    assert picture[0].startswith("         1 |***")
    assert picture[5].startswith("      0.25 |   ")
    assert picture[5].endswith("*" * 25)
    assert picture[7].split() == ["step", "0", "2000"]
    columns = [[row[12:].ljust(60)[i] for row in picture[:6]] for i in range(60)]
    assert all(column.count("*") == 1 for column in columns)
    assert max(map(len, lines)) <= 80
    assert list(tmp_path.iterdir()) == []


def test_schedule_takes_a_preset_a_file_and_a_run_and_shows_what_waits_at_its_soonest(tmp_path, capsys):
    waiting = {
        "shape": "metric",
        "metric": "nll",
        "below": 2,
        "values": [1, 0.5, 0.1],
        "after": 5,
        "steps": 12,
    }
    config = Config(schedules={PK: waiting}, max_iters=41, eval_interval=10)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    lines = shown(capsys, tmp_path / "config.toml")
    assert shown(capsys, tmp_path) == lines
    values = {int(line.split()[0]): line.split()[1] for line in lines[1:12]}
    # Free to move from step 5: at 10, until 22; then at 30, until 42.
    assert [values[step] for step in (0, 8, 12, 24, 28, 32, 40)] == [
        "1", "1", "0.9167", "0.5", "0.5", "0.4333", "0.1667",
    ]  # fmt: skip
    assert f"{PK}: at the soonest; moves on where an evaluation has nll below 2, 2" in lines
    assert "499" in shown(capsys, "demo", "--max_iters", 500)[11]
    assert shown(capsys, "--mode", "gpt2")[0].split() == ["step", "learning_rate"]
    assert len(shown(capsys, "--max_iters", 1)) > 3
    assert main(["schedule", str(tmp_path / "none.toml")]) == 2
    assert "configuration file not found" in capsys.readouterr().err
