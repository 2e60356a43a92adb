"""Tiny trainings with each loss, measured and compared."""

import pytest

from measuring import supervision
from stages import training_runs
from waiting import PATIENCE, popen_whose_time_is_over_when

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 8, "eval_interval": 8,
    "eval_batch_size": 4, "log_interval": 1, "warmup_iters": 2, "masking_warmup_iters": 4, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def in_process(config, seconds, seen=None):
    from difftrain.training.loop import train

    train(config)


def test_a_tiny_training_with_each_loss_is_measured_and_compared(capsys):
    found = training_runs.run_training(60.0, TINY, n_words=40, n_tokens=4000, train=in_process)
    assert list(found["runs"]) == ["reference", "logits", "linear"]
    for run in found["runs"].values():
        assert [step for step, _ in run["curve"]] == list(range(8))
        assert run["tokens_per_second"] > 0
        assert run["peak_memory_mib"] > 0
        assert run["agreement"].startswith("agrees at first: ")
    assert found["ok"]
    assert found["what"] == "8 steps of 64 tokens, 1 layers of width 16, vocabulary 41, float32"
    assert {"max_iters": 8, "dtype": "float32"}.items() <= found["options"].items()


def test_the_trainers_own_command_makes_a_run_and_a_failure_says_why(tmp_path, monkeypatch):
    from difftrain.config import Config

    data = training_runs.write_tokens(tmp_path / "tokens", 40, 4000)
    options = training_runs.GPT2_SMALL | TINY | {"max_iters": 2, "data": str(data)}
    config = Config(**options, out_dir=str(tmp_path / "run"))
    training_runs.train_by_command(config, PATIENCE)
    assert len(training_runs.read_run(config)["curve"]) == 2
    program, hangs = tmp_path / "program", tmp_path / "hangs"
    monkeypatch.setattr(supervision.subprocess, "Popen", popen_whose_time_is_over_when(hangs.exists))
    for body, message in (
        ("echo first; echo the reason >&2; exit 2", "^exit code 2: the reason$"),
        (f"echo begun; touch {hangs}; sleep {PATIENCE}", "^not finished in 1 s: begun$"),
    ):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setattr(training_runs.sys, "executable", str(program))
        with pytest.raises(RuntimeError, match=message):
            training_runs.train_by_command(config, 1.0)


def test_a_run_that_fails_leaves_the_others(capsys):
    def fails_for_logits(config, seconds):
        if config.loss_impl == "logits":
            raise RuntimeError("not finished in 3 s")
        in_process(config, seconds)

    changes = TINY | {"max_iters": 2}
    found = training_runs.run_training(60.0, changes, n_words=40, n_tokens=4000, train=fails_for_logits)
    assert not found["ok"]
    assert found["runs"]["logits"] == {"failure": "RuntimeError: not finished in 3 s"}
    assert found["runs"]["linear"]["agreement"].startswith("agrees")
    assert "logits: RuntimeError: not finished in 3 s" in found["summary"]


def test_steps_of_each_size_are_timed_and_one_that_fails_is_a_result(capsys):
    def hungry(config, seconds):
        if config.loss_impl == "reference" and config.batch_size == 4:
            raise RuntimeError("exit code 1: out of memory")
        in_process(config, seconds)

    changes = TINY | {"max_iters": 4, "eval_interval": 4}
    found = training_runs.run_sizes(60.0, changes, sizes=(2, 4), n_words=40, n_tokens=4000, train=hungry)
    assert found["ok"]
    assert found["summary"] == "5 of 6 runs of 4 steps"
    assert [(row["tokens"], row["impl"]) for row in found["rows"]] == [
        (tokens, impl) for tokens in (32, 64) for impl in ("reference", "logits", "linear")
    ]
    assert found["rows"][3] == {
        "tokens": 64,
        "impl": "reference",
        "failure": "RuntimeError: exit code 1: out of memory",
    }
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 for row in found["rows"] if not row["failure"])


def test_curves_agree_within_rounding_at_first_and_a_hundredth_later():
    steps = list(range(0, 500, 10))
    reference = [[s, 5.0 - s / 500] for s in steps]

    def moved(first=1.0, late=1.0):
        return [[s, loss * (first if s == 0 else late if s > 400 else 1.0)] for s, loss in reference]

    agreement = training_runs.agreement
    assert agreement(reference, reference) == (
        True,
        "agrees: first loss 0 % apart, means of tenths at most 0 %",
    )
    assert agreement(moved(first=1.0005), reference)[0]
    assert not agreement(moved(first=1.002), reference)[0]
    assert agreement(moved(late=1.005), reference)[0]
    assert not agreement(moved(late=1.02), reference)[0]
    assert not agreement([[s, float("nan")] for s in steps], reference)[0]
    with pytest.raises(ValueError, match="other steps"):
        agreement(reference[1:], reference)
    short = [reference[0], [10, 4.0]]
    few = "agrees at first: 0 % apart; too few losses to compare curves"
    assert agreement([reference[0], [10, 4.2]], short) == (True, few)
    assert not agreement([[0, 5.1], [10, 4.0]], short)[0]
    assert not agreement([reference[0], [10, float("nan")]], short)[0]


def test_made_up_tokens_are_there_to_be_learned(tmp_path):
    import numpy as np

    folder = training_runs.write_tokens(tmp_path / "a", 1000, 20_000)
    words = np.fromfile(folder / "train.bin", dtype=np.uint16)
    assert len(words) == 20_000
    assert words.max() < 1000
    first, second = words.reshape(-1, 2).T
    successor = dict(zip(first, second, strict=True))
    assert all(successor[a] == b for a, b in zip(first, second, strict=True))
    assert len(set(successor.values())) == len(successor) > 500
    assert 0.10 < (first == 0).mean() < 0.17, "Zipf's law: 1 / H(1000)"
    again = training_runs.write_tokens(tmp_path / "b", 1000, 20_000)
    assert (again / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()
