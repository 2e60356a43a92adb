"""A trial of a repair: errors planted in held-out text, and what becomes of them counted."""

from pathlib import Path

import pytest

from difftrain.checkpoints.reading import find_checkpoint, open_held_out
from difftrain.cli import main
from difftrain.errors import UserError
from difftrain.sampling.marking import marked
from difftrain.sampling.repairing import Edit, Repair, RepairRequest
from difftrain.sampling.trial import Trial, TrialRequest, try_repair
from difftrain.training.loop import train


@pytest.fixture
def run(tiny):
    train(config := tiny(max_iters=2))
    return Path(config.out_dir)


def test_errors_are_planted_where_it_says_and_nowhere_else(run):
    trial = try_repair(run, TrialRequest(errors=10.0, seed=3, device="cpu"), RepairRequest(sure=0.0))
    checkpoint = find_checkpoint(run, "best")
    words = checkpoint.vocabulary
    held_out = words.decode(open_held_out(checkpoint, is_change_allowed=False).val.tolist())
    assert trial.original in held_out
    assert len(trial.planted) == 5  # one of the 16 words of each of five windows
    assert trial.n_words == 80
    back = list(trial.wrong)
    for error in trial.planted:
        assert back[error.position] == error.old != error.new
        back[error.position] = error.new
        line = trial.wrong.splitlines()[error.line - 1]
        assert line[error.column - 1 : error.column] == error.old
    assert "".join(back) == trial.original
    again = try_repair(run, TrialRequest(errors=10.0, seed=3, device="cpu"), RepairRequest(sure=0.0))
    assert again == trial
    other = try_repair(run, TrialRequest(errors=10.0, seed=4, device="cpu"), RepairRequest(sure=0.0))
    assert other.original != trial.original


def edit(position, old, new=None):
    return Edit(position, 1, position + 1, old, 0.9, new, None if new is None else 0.95)


def test_what_became_of_the_errors_is_counted():
    planted = (edit(1, "X", "b"), edit(3, "Y", "d"), edit(5, "Z", "f"))
    suspects = (edit(0, "a"), edit(1, "X"), edit(3, "Y"))
    changes = (edit(0, "a", "q"), edit(1, "X", "b"), edit(3, "Y", "w"))
    trial = Trial("abcdefgh", "aXcYeZgh", planted, suspects, Repair("qbcweZgh", changes), 8)
    assert trial.summary == (
        "suspected 2 of 3 errors and 1 of 5 right words; put 1 errors right, changed 1 right words"
    )
    assert marked(trial.wrong, suspects, is_coloured=False) == "[-a-][-X-]c[-Y-]eZgh"
    assert marked(trial.wrong, changes, is_coloured=False) == "{+q+}{+b+}c{+w+}eZgh"
    assert marked(trial.wrong, suspects[:1], is_coloured=True) == "\033[9;31ma\033[0mXcYeZgh"
    assert marked("", (), is_coloured=True) == ""


def test_the_command_shows_the_text_three_times_and_ends_with_the_counts(run, capfdbinary):
    assert main(["repair", str(run), "--held_out", "--errors", "20", "--seed", "2", "--device", "cpu"]) == 0
    out = capfdbinary.readouterr().out.decode()
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert titles[:3] == [
        "--- held-out text", "--- with 15 words made wrong, and what the model suspects marked",
        "--- repaired, what was changed marked",
    ]  # fmt: skip
    assert titles[3].startswith("--- suspected ")
    assert len(titles) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either FILE, which - makes standard input, or --held_out"),
        (["-", "--held_out"], "give either FILE, which - makes standard input, or --held_out"),
        (["--held_out", "--diff"], "--diff goes with FILE alone"),
        (["--held_out", "--keep_unknown"], "--keep_unknown goes with FILE alone"),
        (["-", "--errors", "3"], "--errors goes with --held_out alone"),
        (["-", "--seed", "0"], "--seed goes with --held_out alone"),
        (["-", "--allow_changed_data"], "--allow_changed_data goes with --held_out alone"),
        (["--held_out", "--errors", "0"], "errors must be per cents in (0, 100], got 0"),
        (["--held_out", "--errors", "nan"], "errors must be per cents in (0, 100], got nan"),
        (["--held_out", "--seed", "-1"], "seed must be at least 0 and below 2^31, got -1"),
    ],
)
def test_options_that_do_not_go_together_are_said_in_a_line(words, message, capsys):
    assert main(["repair", "no-run", *words]) == 2
    assert message in capsys.readouterr().err


def test_repair_and_sample_take_the_dtype_of_their_option(run, capfdbinary):
    for words in (
        ["repair", str(run), "--held_out"],
        ["sample", str(run), "--length", "9", "--steps", "2"],
    ):
        assert main([*words, "--device", "cpu", "--dtype", "bfloat16"]) == 0
        assert main([*words, "--device", "cpu", "--dtype", "int8"]) == 2
        assert b"dtype must be auto, float32, bfloat16" in capfdbinary.readouterr().err


def test_a_model_that_was_never_taught_to_suspect_is_refused(tiny):
    train(config := tiny(max_iters=2, recipe="llada"))
    with pytest.raises(UserError, match="repair needs a model that was taught to find wrong words"):
        try_repair(Path(config.out_dir), TrialRequest(device="cpu"), RepairRequest())
