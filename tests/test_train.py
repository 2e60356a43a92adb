import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from difftrain import train as train_module
from difftrain.checkpoint import find_checkpoint
from difftrain.config import UserError
from difftrain.metrics import read_metrics
from difftrain.schedule import learning_rate, masking_penalties
from difftrain.train import TrainingFailed, train

TIMES = ("tokens_per_second", "peak_memory_mib")


def weights_of(config, which="latest"):
    return dict(
        find_checkpoint(Path(config.out_dir), which).make_model(torch.device("cpu")).named_parameters()
    )


def records_of(config):
    records = read_metrics(Path(config.out_dir))
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(autouse=True)
def one_thread():
    # Which thread adds up what decides the last bit.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_takes_exactly_max_iters_updates_and_saves_the_last_state(tiny, monkeypatch):
    config = tiny(max_iters=7, eval_interval=5)
    updates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (updates.append(1), step(self, *a))[1])
    train(config)
    assert len(updates) == 7
    assert find_checkpoint(Path(config.out_dir), "latest").step == 7
    assert [r["step"] for r in records_of(config) if r["kind"] == "eval"] == [0, 5, 7]
    assert [r["step"] for r in records_of(config) if r["kind"] == "train"] == list(range(7))


def test_every_record_carries_penalties_rate_losses_and_cases(tiny):
    config = tiny()
    train(config)
    for record in records_of(config):
        assert (record["pk"], record["pm"]) == masking_penalties(record["step"], config)
        assert record["lr"] == learning_rate(record["step"], config)
        assert record["loss"] <= record["nll"] + 1e-6
        assert set(record["cases"]) == {"masked", "intact", "corrupted"}
        assert record["validation_id"]
        if record["kind"] == "eval":
            assert set(record["masked_nll"]) == {"15", "50", "85", "training"}


def test_training_lowers_the_loss(tiny):
    config = tiny(max_iters=60, eval_interval=60, log_interval=60, masking_warmup_iters=0)
    train(config)
    first, last = (r for r in records_of(config) if r["kind"] == "eval")
    assert last["loss_final"] < 0.8 * first["loss_final"]


def test_the_logged_loss_is_the_mean_over_all_micro_batches(tiny):
    whole = tiny(max_iters=1, batch_size=8, gradient_accumulation_steps=1)
    split = tiny(max_iters=1, batch_size=2, gradient_accumulation_steps=4, out_dir=whole.out_dir + "-split")
    train(whole)
    train(split)
    a, b = (next(r for r in records_of(c) if r["kind"] == "train") for c in (whole, split))
    for key in ("loss", "loss_final", "nll", "grad_norm"):
        assert a[key] == pytest.approx(b[key], rel=1e-5)
    assert a["cases"]["masked"]["n"] == b["cases"]["masked"]["n"]
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(value, weights_of(split)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_in_the_same_weights_and_metrics(tiny, dropout, monkeypatch):
    straight = tiny(dropout=dropout)
    train(straight)
    broken = dataclasses.replace(straight, out_dir=straight.out_dir + "-broken")
    # A run that dies in its tenth step has saved step 8 and logged beyond it.
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_make_batch", _dies_at(10, train_module._make_batch))
        with pytest.raises(RuntimeError, match="killed"):
            train(broken)
    assert records_of(broken)[-1]["step"] == 8
    train(broken, resume=True)
    assert_equal_weights(weights_of(straight), weights_of(broken))
    assert records_of(straight) == records_of(broken)


def _dies_at(nth, function):
    """The function, until its nth call raises."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == nth:
            raise RuntimeError("killed")
        return function(*arguments)

    return counted


def test_a_stop_signal_finishes_the_step_saves_and_the_run_goes_on_as_if_never_stopped(
    tiny, capsys, monkeypatch
):
    straight = tiny()
    train(straight)
    stopped = dataclasses.replace(straight, out_dir=straight.out_dir + "-stopped")
    real = train_module._make_batch
    calls = []

    def signals(*arguments):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_make_batch", signals)
        train(stopped)
    assert (
        "stopped after 6 steps; go on with: difftrain train --resume --out_dir" in capsys.readouterr().out
    )
    assert find_checkpoint(Path(stopped.out_dir), "latest").step == 6
    train(stopped, resume=True)
    assert_equal_weights(weights_of(straight), weights_of(stopped))
    assert records_of(straight) == records_of(stopped)


def test_the_best_checkpoint_is_chosen_at_the_final_penalties(tiny):
    config = tiny(
        max_iters=60, masking_warmup_iters=60, eval_interval=6, learning_rate=3e-2, penalty_mask_correct=1.0
    )
    train(config)
    evals = [r for r in records_of(config) if r["kind"] == "eval"]
    best = min(evals, key=lambda r: r["loss_final"])
    assert find_checkpoint(Path(config.out_dir), "best").step == best["step"]
    assert best["step"] != min(evals, key=lambda r: r["loss"])["step"], "the case that misled must occur"


def test_without_always_save_only_improvements_and_the_end_are_saved(tiny, monkeypatch):
    config = tiny(always_save_checkpoint=False, learning_rate=0.0, min_lr=0.0, keep_checkpoints=9)
    train(config)
    steps = sorted(int(p.name[5:]) for p in (Path(config.out_dir) / "checkpoints").glob("step-*"))
    assert steps == [0, 12]


def test_eval_only_evaluates_once_and_writes_nothing(tiny):
    config = tiny()
    record = train(config, eval_only=True)
    assert record["step"] == 0
    assert not Path(config.out_dir).exists()
    train(config)
    before = {p: p.stat().st_mtime_ns for p in Path(config.out_dir).rglob("*")}
    resumed = train(config, resume=True, eval_only=True)
    assert resumed["step"] == 12
    assert resumed["loss"] == pytest.approx(records_of(config)[-1]["loss"], rel=1e-6)
    assert {p: p.stat().st_mtime_ns for p in Path(config.out_dir).rglob("*")} == before


def test_gpt2_mode_is_plain_next_token_cross_entropy(tiny):
    config = tiny(mode="gpt2", max_iters=30, eval_interval=30)
    train(config)
    first, last = (r for r in records_of(config) if r["kind"] == "eval")
    assert first["loss"] == first["nll"] == first["loss_final"]
    assert "cases" not in first
    assert last["nll"] < first["nll"]


def test_a_bad_step_is_skipped_and_too_many_end_the_run_with_its_checkpoint_unharmed(
    tiny, monkeypatch, capsys
):
    config = tiny(max_bad_steps=3, eval_interval=4)
    real = train_module.fused_diffusion_loss
    calls = []

    def sometimes_nan(logits, *arguments, **options):
        calls.append(1)
        factor = torch.nan if len(calls) in bad else 1.0
        return real(logits * factor, *arguments, **options)

    monkeypatch.setattr(train_module, "fused_diffusion_loss", sometimes_nan)
    bad = {3, 4}
    train(config)
    assert capsys.readouterr().out.count("is not applied") == 2
    assert all(p.isfinite().all() for p in weights_of(config).values())

    calls.clear()
    bad = set(range(6, 100))
    again = dataclasses.replace(config, out_dir=config.out_dir + "-2")
    with pytest.raises(TrainingFailed, match="3 steps in a row had a non-finite loss"):
        train(again)
    assert find_checkpoint(Path(again.out_dir), "latest").step == 4
    assert all(p.isfinite().all() for p in weights_of(again).values())


def test_an_inert_penalty_and_a_degenerate_model_are_reported(tiny, capsys):
    train(tiny(max_iters=8, learning_rate=0.0, min_lr=0.0))
    out = capsys.readouterr().out
    assert out.count("penalty_mask_correct acts on nothing") == 1


def test_bfloat16_autocast_trains(tiny):
    config = tiny(dtype="bfloat16", max_iters=3)
    train(config)
    assert all(p.dtype == torch.float32 for p in weights_of(config).values())


# What must not be lost ----------------------------------------------------------------------------


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_run_is_neither_overwritten_nor_resumed_unasked(tiny):
    config = tiny(max_iters=2)
    train(config)
    before = contents(config.out_dir)
    with pytest.raises(UserError, match="already holds a run; give --resume, --overwrite or another"):
        train(config)
    assert contents(config.out_dir) == before
    train(tiny(max_iters=3), overwrite=True)
    assert find_checkpoint(Path(config.out_dir), "latest").step == 3


def test_a_folder_that_is_no_run_is_never_touched(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="is not empty and not a run folder"):
            train(tiny(), **options)
    assert contents(tmp_path / "run") == {tmp_path / "run" / "thesis.txt": b"precious"}


def test_overwriting_leaves_what_is_not_the_runs(tiny, tmp_path):
    train(tiny(max_iters=1))
    (tmp_path / "run" / "notes.txt").write_text("precious")
    train(tiny(max_iters=1), overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 2}, "n_layer must be 1 to resume .*, got 2"),
        ({"position": "learned"}, "position must be 'rotary' to resume"),
        ({"max_iters": 3}, "max_iters must be at least the 4 steps done, got 3"),
        ({"block_size": 10**6}, "block_size 1000000 is longer than the train split"),
    ],
)
def test_a_resume_that_does_not_fit_is_refused_and_nothing_changes(tiny, changes, message):
    config = tiny(max_iters=4)
    train(config)
    before = contents(config.out_dir)
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config, **changes), resume=True)
    assert contents(config.out_dir) == before


def test_a_checkpoint_of_another_vocabulary_is_refused(tiny, tmp_path):
    config = tiny(max_iters=2)
    train(config)
    other = tmp_path / "other.txt"
    other.write_text("abc abd " * 100)
    with pytest.raises(UserError, match=r"another vocabulary of \d+ words, the data .* has 5"):
        train(dataclasses.replace(config, data=str(other)), resume=True)


def test_resume_falls_back_to_the_last_good_checkpoint_with_a_warning(tiny, capsys):
    config = tiny(max_iters=8)
    train(config)
    expected = weights_of(config)
    path = Path(config.out_dir) / "checkpoints" / "step-00000008" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    train(config, resume=True)
    assert "warning: " + str(path) + " is damaged" in capsys.readouterr().out
    assert_equal_weights(weights_of(config), expected)


def test_an_unwritable_place_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out_dir .* is not writable: Not a directory"):
        train(tiny(out_dir=str(tmp_path / "file" / "run")))


# Several processes --------------------------------------------------------------------------------


def test_two_processes_train_as_one(tiny, tmp_path):
    one = tiny(max_iters=6, batch_size=4, gradient_accumulation_steps=2, out_dir=str(tmp_path / "one"))
    train(one)
    two = dataclasses.replace(one, out_dir=str(tmp_path / "two"))
    (tmp_path / "two.toml").write_text(two.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "difftrain", "train", "--config", str(tmp_path / "two.toml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for a, b in zip(records_of(one), records_of(two), strict=True):
        assert a["step"] == b["step"]
        for key in ("loss", "loss_final", "nll"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
        assert [a["cases"][k]["n"] for k in a["cases"]] == [b["cases"][k]["n"] for k in b["cases"]]
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(two)[name], rtol=1e-3, atol=1e-4)


def test_metrics_are_valid_json_whatever_happens(tiny):
    config = tiny(max_iters=2, block_size=16, eval_iters=1)
    train(config)
    for line in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_the_saved_configuration_is_the_run(tiny):
    from difftrain.config import Config, read_toml

    config = tiny(max_iters=1)
    train(config)
    assert Config(**read_toml(Path(config.out_dir) / "config.toml")) == config
