"""Warnings: each is told once, for what it is meant for and for nothing else, and names what to do."""

import math

import pytest

from difftrain.config import Config
from difftrain.reporting.health import MEMORISING_RECORDS, SPIKES, USUAL, Health, number
from difftrain.reporting.lines import console_line, summary_lines
from made_records import record


def keys_of(*records, config=None):
    health = Health(config or Config())
    return [warning.key for r in records for warning in health.see(r)]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, []),
        ({"masked": 0.0}, ["pk"]),
        ({"masked": 0.0, "pk": 1.0}, []),
        ({"intact": 0.0}, ["pm"]),
        ({"masked": 0.99, "intact": 0.99}, ["all"]),
        ({"gap": 40.0}, ["gap"]),
        ({"counted": 0.1}, ["counted"]),
        ({"counted": 0.5}, []),
    ],
)
def test_an_evaluation_shows_what_is_wrong_with_penalties_answers_and_positions(changes, keys):
    assert keys_of(record(5, **changes)) == keys
    assert keys_of(record(0, **changes)) == [key for key in keys if key == "counted"]


def test_a_warning_is_told_once_however_often_it_is_seen():
    assert keys_of(record(5, masked=0.0), record(9, masked=0.0, gap=40.0), record(13, gap=40.0)) == [
        "pk",
        "gap",
    ]


@pytest.mark.parametrize("recipe", ["llada", "mdlm"])
def test_a_recipe_without_penalties_is_warned_of_nothing_that_they_do(recipe):
    none = {"n": 0, "mask": math.nan, "target": math.nan, "other": math.nan, "nll": math.nan, "gap": None}
    for gap in (40.0, None):
        seen = record(5, masked=0.0, gap=gap, pk=1.0, pm=1.0)
        seen["cases"] |= {"intact": none, "corrupted": none}
        assert keys_of(seen, config=Config(recipe=recipe)) == []
        assert "says [MASK] to masked 0% |" in console_line(seen)


def trained(*nlls, start=0, **changes):
    """Training records whose nll, on masked positions too, is this."""
    rows = []
    for i, nll in enumerate(nlls):
        row = record(start + i, kind="train", nll=nll, masked_nll=None, **changes)
        row["cases"]["masked"]["nll"] = nll
        rows.append(row)
    return rows


def evaluated(step, nll):
    return record(step, masked_nll={"15": 1.0, "50": 1.0, "85": 1.0, "training": nll})


@pytest.mark.parametrize(
    ("later", "validation", "keys"),
    [
        (1.5, 2.2, ["memorising"]),
        (1.5, 2.01, []),  # a rise within the noise
        (2.04, 2.1, []),  # training is no better than validation
        (2.3, 2.5, []),  # both rise: it has come apart
    ],
)
def test_memorising_is_validation_rising_while_training_falls(later, validation, keys):
    first, second = trained(*[2.05] * MEMORISING_RECORDS), trained(*[later] * MEMORISING_RECORDS, start=10)
    assert keys_of(*first, evaluated(5, 2.0), *second, evaluated(15, validation)) == keys


def test_memorising_is_judged_by_no_handful_of_training_records():
    few = trained(*[1.0] * (MEMORISING_RECORDS - 1), start=10)
    assert keys_of(*trained(*[2.0] * MEMORISING_RECORDS), evaluated(5, 2.0), *few, evaluated(15, 3.0)) == []


def noisy(n):
    return [2.0 + 0.1 * math.sin(12.9898 * i) for i in range(n)]


def test_a_few_jumps_of_the_loss_are_spikes_and_noise_is_none():
    assert keys_of(*trained(*noisy(200))) == []
    jumps = [*noisy(USUAL), *[value for _ in range(SPIKES) for value in (5.0, *noisy(5))]]
    assert keys_of(*trained(*jumps)) == ["spikes"]
    assert keys_of(*trained(*jumps[:-7])) == []
    assert keys_of(*trained(*noisy(USUAL), *[0.5] * 5)) == []  # it falls, as it should


def test_steps_that_are_not_applied_are_told_of():
    rows = [trained(2.0, start=i, skipped_steps=i)[0] for i in range(SPIKES + 1)]
    assert keys_of(*rows[:-1]) == []
    assert keys_of(*rows) == ["skipped"]


@pytest.mark.parametrize("kind", ["eval", "train"])
@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"nll": "x"},
        {"cases": []},
        {"cases": {"masked": 3}},
        {"masked_nll": None},
        {"nll": 10**400},
        {"nll": True},
    ],
    ids=range(7),
)
def test_records_that_lack_or_break_fields_are_no_error(kind, broken):
    assert keys_of({"kind": kind, "step": 5, "pk": 1.0, "pm": 1.0} | broken) == []


def test_a_number_is_finite_and_no_flag():
    assert number({"a": {"b": 2}}, "a", "b") == 2.0
    for value in (None, True, "2", math.nan, math.inf, 10**400, {}):
        assert number({"a": value}, "a") is None


def test_a_warning_names_the_section_that_says_what_to_do():
    (warning,) = Health(Config()).see(record(5, gap=40.0))
    assert str(warning) == (
        "[MASK]'s logit lies 40 below the maximum on masked positions (docs/health.md#runaway-gap)"
    )


# The end of a run ---------------------------------------------------------------------------------


def test_the_summary_has_at_most_ten_lines_with_figures_warnings_verdict_and_report(tmp_path):
    health = Health(Config())
    warnings = [w for r in (record(4, masked=0.0, intact=0.0), record(8, gap=40.0)) for w in health.see(r)]
    lines = summary_lines(tmp_path / "a run", record(8), (1.25, 4), warnings)
    assert len(lines) <= 10
    assert lines[0] == (
        "warned of: inert-penalty (step 4), runaway-gap (step 8); what to do stands in docs/health.md"
    )
    assert lines[1] == "validation loss 1.5000 at the final penalties, the best is 1.2500 at step 4"
    assert lines[2].startswith(f"report: difftrain report '{tmp_path}/a run' (writes ")
    assert lines[3] == "verdict: with 15 % masked, 1.150 nats better than guessing words by frequency"
    assert lines[4].startswith("unigram entropy 3.250 nats")
    assert len(summary_lines(tmp_path, record(8), (1.5, 8), [])) == 4


def test_the_verdict_may_be_that_nothing_is_known_yet(tmp_path):
    levels = {"15": 3.5, "50": 3.5, "85": 3.5, "training": 3.5}
    assert (
        "with 15 % masked, 0.250 nats worse than guessing words by frequency: nothing is learned"
        in "".join(summary_lines(tmp_path, record(8, masked_nll=levels), (1.5, 8), []))
    )
    assert "verdict: 1.250 nats better than guessing" in "".join(
        summary_lines(tmp_path, record(8, masked_nll=None), (1.5, 8), [])
    )
