"""The experiment on the curriculum: runs in pieces, goes on where it was, compares what it measured."""

import json

import pytest

import curriculum
from difftrain.training.console import Listeners
from experiment.arms import ARMS, JUDGE, run_config
from experiment.measures import Effort

SMALL = """block_size = 16
batch_size = 4
n_layer = 1
n_head = 2
n_embd = 16
warmup_iters = 1
eval_iters = 2
eval_batch_size = 2
log_interval = 1
"""


@pytest.fixture
def arguments(tmp_path, corpus_folder, monkeypatch):
    file = tmp_path / "small.toml"
    file.write_text(SMALL + f'data = "{corpus_folder}"\n')
    monkeypatch.setattr(curriculum, "Effort", lambda: Effort(windows=8, draws=2, texts=4))
    return ["--out", str(tmp_path / "runs"), "--options", str(file), "--seeds", "1", "--steps", "4"]


def test_every_arm_differs_from_the_others_and_trains_as_it_says(tmp_path):
    configs = {arm: run_config(arm, 1, tmp_path, {}) for arm in ARMS}
    assert len({str(c).replace(c.out_dir, "") for c in configs.values()}) == len(ARMS)
    assert len({c.out_dir for c in configs.values()}) == len(ARMS)
    assert configs["curriculum"].masking_warmup_iters == 240
    assert configs["long warmup"].masking_warmup_iters == configs["long warmup"].max_iters == 1200
    assert configs["constant final"].masking_warmup_iters == 0
    plain = configs["constant (1, 1)"]
    assert (plain.penalty_keep_mask, plain.penalty_mask_correct, plain.masking_warmup_iters) == (
        1.0,
        1.0,
        0,
    )
    long = configs["long: constant final"]
    assert (long.max_iters, long.masking_warmup_iters, long.mask_factor) == (3600, 0, 1.0)
    assert configs["long"].masking_warmup_iters == 720
    assert {arm.base for arm in ARMS.values()} == {n for n, arm in ARMS.items() if arm.base == n}
    judge = run_config(JUDGE, 1000, tmp_path, {"max_iters": 10})
    assert (judge.mode, judge.max_iters) == ("gpt2", 20)


def test_it_trains_measures_and_compares_and_a_second_command_only_reads(
    arguments, tmp_path, capsys, monkeypatch
):
    chosen = ["--arms", "curriculum", "masked only"]
    assert curriculum.main([*arguments, *chosen, "--json", str(tmp_path / "all.json")]) == 0
    result = json.loads((tmp_path / "all.json").read_text())
    runs = {run["arm"]: run["figures"] for run in result["runs"]}
    assert list(runs) == ["curriculum", "masked only"]
    assert "random_put_right" in runs["curriculum"]
    assert not [
        name for name in runs["masked only"] if name.startswith(("random", "fluent", "found", "fill"))
    ]
    assert 0 < runs["curriculum"]["bits_per_character"] < 20
    curves = [[step for step, _ in run["curve"]] for run in result["runs"]]
    assert curves == [[0, 1, 2, 3, 4]] * 2
    assert runs["curriculum"]["early_nll_15"] == result["runs"][0]["curve"][1][1] > 0
    text, shuffled = result["references"]["held-out text"], result["references"]["shuffled"]
    assert set(text) == set(shuffled) == {"known_words", "distinct", "judge_nll"}
    assert text["known_words"] == 1.0 > shuffled["known_words"]
    assert result["setting"]["options"]["max_iters"] == 4
    first = capsys.readouterr().out
    assert "| *curriculum* |" in first
    assert "| masked only |" in first

    def refuse(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(curriculum, "train", refuse)
    monkeypatch.setattr(curriculum, "measure", refuse)
    assert curriculum.main([*arguments, *chosen]) == 0
    second = capsys.readouterr().out
    assert second.startswith("\nknowledge")
    assert first.endswith(second)


def test_a_run_that_was_cut_goes_on_and_the_parts_are_disjoint(arguments, tmp_path, capsys, monkeypatch):
    # Three runs: the judge, the one that draws fluent errors, and this arm's.
    chosen = ["--arms", "curriculum"]
    seen = []
    train = curriculum.train

    def cut(config, *, resume):
        seen.append((config.mode, config.recipe, resume))
        cut_amid_its_steps = Listeners(on_step=lambda record: record["step"] == 3)
        train(config, resume=resume, listeners=cut_amid_its_steps if len(seen) == 1 else None)

    monkeypatch.setattr(curriculum, "train", cut)
    assert curriculum.main([*arguments, *chosen, "--part", "1/2"]) == 130
    assert len(seen) == 1
    assert curriculum.main([*arguments, *chosen, "--part", "1/2"]) == 0
    assert seen[:2] == [("gpt2", "specification", False), ("gpt2", "specification", True)]
    assert seen[2] == ("diffusion", "specification", False)
    assert "1 runs are still to be trained by other parts" in capsys.readouterr().out
    assert curriculum.main([*arguments, *chosen, "--part", "2/2"]) == 0
    assert seen[3:] == [("diffusion", "mdlm", False)]
    assert "still to be measured by other parts" in capsys.readouterr().out
    assert curriculum.main([*arguments, *chosen]) == 0
    assert "| *curriculum* |" in capsys.readouterr().out


def test_runs_of_other_options_are_neither_taken_for_these_nor_gone_on_with(
    arguments, tmp_path, capsys, monkeypatch
):
    command = [*arguments, "--arms", "curriculum"]
    assert curriculum.main(command) == 0
    measured = tmp_path / "runs" / "curriculum-1" / "measured.json"
    record = json.loads(measured.read_text())
    measured.write_text(json.dumps(record | {"options": record["options"] | {"n_embd": 8}, "figures": {}}))
    assert curriculum.main(command) == 0  # measured anew: these figures were another run's
    assert json.loads(measured.read_text()) == record

    monkeypatch.setattr(curriculum, "train", lambda *_, **__: pytest.fail("it goes on with another's run"))
    options = tmp_path / "small.toml"
    options.write_text(options.read_text() + "learning_rate = 0.5\n")
    assert curriculum.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"curriculum: {tmp_path}/runs/judge-1000 holds a run of other options (learning_rate"
    )
    assert error.endswith("give another --out\n")


def test_no_run_begins_after_the_time(arguments, tmp_path):
    assert curriculum.main([*arguments, "--most", "0"]) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "3/2"], "--part must be K/N with 1 <= K <= N, got '3/2'"),
        (["--part", "x"], "--part must be K/N with 1 <= K <= N, got 'x'"),
        (["--seeds", "0"], "argument --seeds: must be a number of at least 1, got 0"),
    ],
)
def test_wrong_options_are_said_in_a_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        curriculum.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_options_of_the_trainer_are_said_in_a_line(tmp_path, capsys):
    assert curriculum.main(["--options", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err.startswith("curriculum: configuration file not found")
