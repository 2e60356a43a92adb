import dataclasses
import json
import os
import re
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from difftrain import appearing
from difftrain import loss as loss_module
from difftrain import runtime as runtime_module
from difftrain.checkpoints import writing as writing_module
from difftrain.checkpoints.folder import digest_of
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.errors import UserError
from difftrain.reporting.log import read_metrics
from difftrain.schedule import learning_rate, masking_penalties
from difftrain.training import step as step_module
from difftrain.training import verdict as verdict_module
from difftrain.training.loop import train
from difftrain.training.verdict import TrainingFailed
from launch import obey, train_command
from processes import run_in_processes

TIMES = ("time", "tokens_per_second", "peak_memory_mib")


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


pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_closed_terminal_asks_for_a_stop_unless_it_is_ignored_as_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    with runtime_module.stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested
    assert signal.getsignal(signal.SIGHUP) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime_module.stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_in_the_same_weights_and_metrics(tiny, dropout, monkeypatch):
    straight = tiny(dropout=dropout)
    train(straight)
    broken = dataclasses.replace(straight, out_dir=straight.out_dir + "-broken")
    # A run that dies in its tenth step has saved step 8 and logged beyond it.
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_make_batch", _dies_at(10, step_module._make_batch))
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
    real = step_module._make_batch
    calls = []

    def signals(*arguments):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_make_batch", signals)
        train(stopped)
    assert (
        "stopped after 6 steps; go on with: difftrain train --resume --out_dir" in capsys.readouterr().out
    )
    assert find_checkpoint(Path(stopped.out_dir), "latest").step == 6
    train(stopped, resume=True)
    assert_equal_weights(weights_of(straight), weights_of(stopped))
    assert records_of(straight) == records_of(stopped)


def test_a_signal_that_comes_twice_at_once_is_one_and_a_second_one_stops_at_once(monkeypatch):
    now, before = [100.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(runtime_module.time, "monotonic", lambda: now[0])
    with runtime_module.stop_requests() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        now[0] += 0.5  # torchrun passes on what the terminal sent to all
        signal.raise_signal(signal.SIGTERM)
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


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
    real = loss_module.fused_diffusion_loss
    calls = []

    def sometimes_nan(logits, *arguments, **options):
        calls.extend([1] * torch.is_grad_enabled())  # evaluations are none of the steps
        factor = torch.nan if len(calls) in bad and torch.is_grad_enabled() else 1.0
        return real(logits * factor, *arguments, **options)

    monkeypatch.setattr(loss_module, "fused_diffusion_loss", sometimes_nan)
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
    assert "docs/health.md#inert-penalty" in out


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
        ({"block_size": 10**6}, "block_size asks for 1000000 at a time"),
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


def test_metrics_are_valid_json_whatever_happens(tiny):
    config = tiny(max_iters=2, block_size=16, eval_iters=2)
    train(config)
    for line in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_the_saved_configuration_is_the_run(tiny):
    from difftrain.config import Config
    from difftrain.config.sources import read_toml

    config = tiny(max_iters=1)
    train(config)
    assert Config(**read_toml(Path(config.out_dir) / "config.toml")) == config


# What a step is made of -----------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch):
    """Records what reaches the loss and what the optimiser is called with, step by step."""
    seen = {"penalties": [], "x": [], "y": [], "logits_dtype": [], "lr": [], "norm": []}
    real_loss, real_step = loss_module.fused_diffusion_loss, torch.optim.AdamW.step

    def loss(logits, y, x, mask_id, pk, pm, **options):
        if not torch.is_grad_enabled():  # an evaluation
            return real_loss(logits, y, x, mask_id, pk, pm, **options)
        seen["penalties"].append((pk, pm))
        seen["x"].append(x)
        seen["y"].append(y)
        seen["logits_dtype"].append(logits.dtype)
        return real_loss(logits, y, x, mask_id, pk, pm, **options)

    def step(self, *arguments):
        seen["lr"].append(self.param_groups[0]["lr"])
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        seen["norm"].append(norm / getattr(self, "grad_scale", 1.0))  # by which AdamW divides the gradients
        return real_step(self, *arguments)

    monkeypatch.setattr(loss_module, "fused_diffusion_loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def test_every_micro_batch_gets_its_steps_penalties_and_every_step_its_rate(tiny, spied):
    config = tiny(max_iters=8, gradient_accumulation_steps=2)
    train(config)
    assert spied["penalties"] == [masking_penalties(s, config) for s in range(8) for _ in range(2)]
    assert spied["lr"] == [learning_rate(s, config) for s in range(8)]


def test_gradients_are_clipped_and_logged_before_clipping(tiny, spied):
    config = tiny(max_iters=4, grad_clip=0.01)
    train(config)
    assert spied["norm"] == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(r["grad_norm"] > 0.02 for r in records_of(config) if r["kind"] == "train")
    spied["norm"].clear()
    loose = tiny(max_iters=1, grad_clip=0.0, out_dir=config.out_dir + "-2")
    train(loose)
    assert spied["norm"][0] == pytest.approx(records_of(loose)[1]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_computes_in_the_configured_type_and_gradients_come_unscaled(tiny, spied, dtype):
    config = tiny(max_iters=2, dtype=dtype)
    train(config)
    assert set(spied["logits_dtype"]) == {getattr(torch, dtype)}
    wide = tiny(max_iters=1, out_dir=config.out_dir + "-wide")
    train(wide)
    narrow_norm, wide_norm = (records_of(c)[1]["grad_norm"] for c in (config, wide))
    assert narrow_norm == pytest.approx(wide_norm, rel=0.05)


def test_training_corrupts_as_much_as_configured(tiny, spied):
    train(tiny(max_iters=12, guaranteed_correct_factor=0.75))
    x, y = torch.cat(spied["x"]), torch.cat(spied["y"])
    touched = ((x != y) | (x == y.max())).sum(1)
    assert touched.max() <= 0.25 * 16
    assert touched.max() >= 2


def test_gpt2_mode_has_no_weights_even_where_mask_is_answered(tiny, spied):
    train(tiny(mode="gpt2", max_iters=3))
    assert set(spied["penalties"]) == {(1.0, 1.0)}


def test_dropout_differs_by_step_and_rank_and_repeats(tiny):
    draws = {}
    for key in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)):
        step_module._seed_dropout(*key)
        draws[key] = torch.rand(4).tolist()
    assert len({tuple(d) for d in draws.values()}) == 4
    step_module._seed_dropout(1, 0, 0)
    assert torch.rand(4).tolist() == draws[1, 0, 0]


def test_bad_steps_count_only_in_a_row(tiny, monkeypatch, capsys):
    real, calls = loss_module.fused_diffusion_loss, []

    def sometimes_nan(logits, *arguments, **options):
        calls.extend([1] * torch.is_grad_enabled())
        is_bad = torch.is_grad_enabled() and len(calls) in (2, 4, 6)
        return real(logits * (torch.nan if is_bad else 1.0), *arguments, **options)

    monkeypatch.setattr(loss_module, "fused_diffusion_loss", sometimes_nan)
    train(tiny(max_bad_steps=2))
    assert capsys.readouterr().out.count("is not applied") == 3


def test_a_spike_is_left_out_and_a_lasting_change_is_accepted(tiny, monkeypatch, capsys):
    monkeypatch.setattr(verdict_module, "SPIKE_MEMORY", 4)
    real, calls = loss_module.fused_diffusion_loss, []

    def steep(logits, *arguments, **options):
        calls.extend([1] * torch.is_grad_enabled())
        factor = factors.get(len(calls), 1.0) if torch.is_grad_enabled() else 1.0
        if len(calls) > 11 and torch.is_grad_enabled():
            factor = lasting
        loss = real(logits, *arguments, **options)
        return (loss[0] * factor, *loss[1:]) if isinstance(loss, tuple) else loss * factor

    monkeypatch.setattr(loss_module, "fused_diffusion_loss", steep)
    factors, lasting = {2: 50.0, 8: 50.0}, 1.0  # the first one comes before anything is usual
    train(tiny(spike_factor=3.0))
    out = capsys.readouterr().out
    assert out.count("is not applied") == 1
    assert "step 7 is not applied: its gradient's norm" in out
    assert "is a spike" in out

    calls.clear()
    train(tiny(out_dir=tiny().out_dir + "-off"))  # by default nothing is left out
    assert "is not applied" not in capsys.readouterr().out

    calls.clear()
    factors, lasting = {}, 20.0
    train(tiny(spike_factor=3.0, max_iters=24, max_bad_steps=9, out_dir=tiny().out_dir + "-lasting"))
    left_out = [int(n) for n in re.findall(r"step (\d+) is not applied", capsys.readouterr().out)]
    assert left_out
    assert left_out[0] == 11
    assert left_out[-1] < 20

    calls.clear()
    with pytest.raises(TrainingFailed, match="2 steps in a row .* is a spike"):
        train(tiny(spike_factor=3.0, max_iters=24, max_bad_steps=2, out_dir=tiny().out_dir + "-ends"))


def test_deterministic_runs_compute_with_one_thread_and_checked_algorithms(tiny, monkeypatch):
    seen = []
    real = loss_module.fused_diffusion_loss

    def loss(*arguments, **options):
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return real(*arguments, **options)

    monkeypatch.setattr(loss_module, "fused_diffusion_loss", loss)
    torch.set_num_threads(2)
    train(tiny(max_iters=1, deterministic=True))
    assert set(seen) == {(1, True)}
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, False)
    seen.clear()
    train(tiny(max_iters=1), overwrite=True)
    assert set(seen) == {(2, False)}


# More of resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_whole_state_of_a_resumed_run_equals_the_uninterrupted_one(tiny, dtype):
    straight = tiny(dtype=dtype, max_iters=8, lr_decay_iters=8)
    train(straight)
    halves = dataclasses.replace(straight, out_dir=straight.out_dir + "-halves")
    train(dataclasses.replace(halves, max_iters=4))
    train(halves, resume=True)
    a, b = (find_checkpoint(Path(c.out_dir), "latest") for c in (straight, halves))
    assert a.state == b.state
    assert bool(a.state["scaler"]) == (dtype == "float16")
    for name in ("model.safetensors", "optimizer/optimizer.safetensors"):
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes()
    assert records_of(straight) == records_of(halves)


def test_resuming_a_finished_run_evaluates_it_and_changes_nothing(tiny, capsys):
    config = tiny(max_iters=4)
    done = train(config)
    before = contents(config.out_dir)
    again = train(config, resume=True)
    assert again["loss_final"] == pytest.approx(done["loss_final"], rel=1e-6)
    assert contents(config.out_dir) == before
    assert capsys.readouterr().out.count("unigram entropy") == 2


def test_decay_and_betas_of_the_command_line_hold_after_a_resume(tiny, monkeypatch):
    config = tiny(max_iters=2)
    train(config)
    used, real = [], torch.optim.AdamW.step

    def step(self, *arguments):
        used.extend((group["weight_decay"], group["betas"]) for group in self.param_groups)
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    changed = dataclasses.replace(config, max_iters=3, weight_decay=0.7, beta2=0.5)
    train(changed, resume=True)
    assert used == [(0.7, (0.9, 0.5)), (0.0, (0.9, 0.5))]


def test_another_measure_starts_a_new_best(tiny):
    config = tiny(max_iters=4)
    train(config)
    changed = dataclasses.replace(config, penalty_keep_mask=2.0, penalty_mask_correct=2.0, max_iters=8)
    train(changed, resume=True)
    new = [r for r in records_of(config) if r["kind"] == "eval" and r["step"] >= 4]
    assert [r["step"] for r in new] == [4, 8]
    best = min(new, key=lambda r: r["loss_final"])
    assert find_checkpoint(Path(config.out_dir), "best").step == best["step"]


def test_a_missing_tracker_is_found_before_anything_is_overwritten(tiny, monkeypatch):
    config = tiny(max_iters=2)
    train(config)
    before = contents(config.out_dir)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="pip install"):
            train(dataclasses.replace(config, wandb_log=True), **options)
    assert contents(config.out_dir) == before


def test_overwriting_removes_the_old_run_but_never_anothers_project(tiny, tmp_path):
    config = tiny(max_iters=9)
    train(config)
    train(dataclasses.replace(config, max_iters=1), overwrite=True)
    assert max(r["step"] for r in records_of(config)) == 1
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000000", "step-00000001"]

    site = tmp_path / "site"
    (site / "plots").mkdir(parents=True)
    (site / "config.toml").write_text('title = "x"\n')
    (site / "plots" / "precious.png").write_text("precious")
    before = contents(site)
    with pytest.raises(UserError, match="not empty and not a run folder"):
        train(dataclasses.replace(config, out_dir=str(site)), overwrite=True)
    assert contents(site) == before


def test_overwriting_a_linked_folder_removes_the_link_alone(tiny, tmp_path):
    train(tiny(max_iters=1))
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / "checkpoints").rename(elsewhere)
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    train(tiny(max_iters=1), overwrite=True)
    assert not (tmp_path / "run" / "checkpoints").is_symlink()
    assert (elsewhere / "latest").exists()


def test_gpt2_mode_needs_one_token_more_than_block_size(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 80)  # 16 characters held out
    with pytest.raises(UserError, match="has 16 tokens, and block_size asks for 17"):
        train(tiny(mode="gpt2", data=str(tmp_path / "a.txt")))
    train(tiny(data=str(tmp_path / "a.txt"), max_iters=1))


def fill_disk(config, writer, limit, rank):
    """Train where from the second checkpoint on no file may exceed a limit: how the command ended."""
    holder = {"save_file": writing_module, "write_text": Path}[writer]
    real = getattr(holder, writer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments, **options):
        if "step-00000002" in str(arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return real(*arguments, **options)

    setattr(holder, writer, limited)
    try:
        return obey(train_command(config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("writer", "limit"), [("save_file", 3 << 20), ("write_text", 16)])
def test_a_full_disk_says_so_and_leaves_no_half_checkpoint(tiny, tmp_path, writer, limit):
    # The second checkpoint's moments, or its configuration, fail. 3 MiB is less than the moments and leaves
    # room for anything small.
    config = tiny(n_embd=256, max_iters=4, eval_interval=2, eval_iters=2)
    ((code, _, err),) = run_in_processes(1, partial(fill_disk, config, writer, limit), tmp_path)
    assert code == 1, err
    assert err.count("\n") == 1
    assert "the disk is full or a quota is reached" in err
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["best", "latest", "step-00000000"]
    assert find_checkpoint(tmp_path / "run", "latest").step == 0


# What harm a resume survives --------------------------------------------------------------------------


def test_the_best_pointer_is_put_right_by_a_resume_and_its_checkpoint_never_deleted(tiny):
    config = tiny(max_iters=4, eval_interval=1, keep_checkpoints=1, learning_rate=0.5, min_lr=0.5)
    train(config)
    home = Path(config.out_dir) / "checkpoints"
    best = find_checkpoint(Path(config.out_dir), "best").step
    assert best < 4, "the case in which keeping the newest does not keep the best"
    for harm in (lambda p: p.unlink(), lambda p: p.write_bytes(b"\0" * 30)):
        harm(home / "best")
        train(config, resume=True)  # a finished run saves nothing more
        assert find_checkpoint(Path(config.out_dir), "best").step == best
        config = dataclasses.replace(config, max_iters=config.max_iters + 2)
        train(config, resume=True)
        evals = [r for r in records_of(config) if r["kind"] == "eval"]
        best = min(evals, key=lambda r: r["loss_final"])["step"]
        assert find_checkpoint(Path(config.out_dir), "best").step == best


@pytest.mark.parametrize(
    "harm", [b"\xff\xfe{", b'{"stop": 1, "kind": "eval"}\n', b"5\n", b"[" * 100_000 + b"\n", None]
)
def test_a_harmed_log_never_blocks_a_resume(tiny, harm):
    config = tiny(max_iters=4)
    train(config)
    path = Path(config.out_dir) / "metrics.jsonl"
    if harm is None:
        path.write_bytes(bytes(path.stat().st_size))
    else:
        with path.open("ab") as file:
            file.write(harm)
    train(dataclasses.replace(config, max_iters=6), resume=True)
    assert records_of(config)[-1]["step"] == 6


def test_what_a_resume_changes_is_said(tiny, capsys):
    config = tiny(max_iters=2)
    train(config)
    train(dataclasses.replace(config, max_iters=4, learning_rate=2e-2), resume=True)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert notes == [
        "note: max_iters was 2 in step-00000002 and is 4 from here on",
        "note: learning_rate was 0.01 in step-00000002 and is 0.02 from here on",
    ]


def test_two_runs_never_write_one_folder(tiny, monkeypatch):
    config = tiny()
    real, told = step_module.LiveRun.gradients, []

    def starts_another(self, *arguments, **options):
        if self.step == 5:  # the first checkpoint is there
            told.append(1)
            with pytest.raises(UserError, match="is in use by another process"):
                train(config, resume=True)
        return real(self, *arguments, **options)

    monkeypatch.setattr(step_module.LiveRun, "gradients", starts_another)
    train(config)
    assert told
    train(dataclasses.replace(config, max_iters=13), resume=True)


@pytest.mark.parametrize("state", ["[]", "{}", '{"scaler": 5}', "[" * 100_000])
def test_a_state_that_fits_its_digest_but_no_run_is_refused_in_one_line(tiny, state):
    config = tiny(max_iters=2)
    train(config)
    folder = Path(config.out_dir) / "checkpoints" / "step-00000002"
    (folder / "state.json").write_text(state)
    digests = json.loads((folder / "digests.json").read_text())
    digests["state.json"] = digest_of(folder / "state.json")
    (folder / "digests.json").write_text(json.dumps(digests))
    if len(state) > 100:  # no JSON that can be read: as good as damaged
        train(config, resume=True)
        return
    with pytest.raises(UserError, match="does not fit this version of difftrain"):
        train(config, resume=True)


# Which loss runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["linear", "logits", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_of_the_loss_trains_the_same_model(tiny, impl, dtype, monkeypatch):
    used = []
    real = loss_module.fused_linear_diffusion_loss
    monkeypatch.setattr(
        loss_module, "fused_linear_diffusion_loss", lambda *a, **o: (used.append(1), real(*a, **o))[1]
    )
    usual = tiny(max_iters=6, gradient_accumulation_steps=2, dtype=dtype)
    train(usual)
    assert not used
    other = dataclasses.replace(usual, loss_impl=impl, out_dir=usual.out_dir + "-other")
    train(other)
    assert bool(used) == (impl == "linear")
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for a, b in zip(records_of(usual), records_of(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["nll"] == pytest.approx(b["nll"], rel=tolerance)
    for name, value in weights_of(usual).items():
        torch.testing.assert_close(value, weights_of(other)[name], rtol=0.1, atol=tolerance)


TERMS = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 1e-3}


MOVING = {
    "penalty_keep_mask": {"shape": "cosine", "from": 2, "steps": 9},
    "weight_masked_other": {"shape": "linear", "from": 1, "to": 3, "steps": 12},
    "mask_factor": {"shape": "linear", "from": 0.2, "steps": 12},
}


@pytest.mark.parametrize("impl", ["linear", "logits"])
@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("model", {}),
        ("step", {}),
        ("step", {"gate": "probability", **TERMS}),
        ("step", {"recipe": "mdlm", **TERMS}),
        ("step", {"schedules": MOVING}),
        ("step", {"self_errors": 0.5}),
    ],
)
def test_a_compiled_run_trains_the_same_model_and_its_curriculum_compiles_nothing_anew(
    tiny, how, impl, changes, monkeypatch
):
    compiled, real = [], torch.compile

    def compile_without_code(function):
        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        return real(function, backend=backend)

    usual = tiny(loss_impl=impl, max_iters=12, log_interval=5, gradient_accumulation_steps=2, **changes)
    train(usual)
    monkeypatch.setattr(step_module.torch, "compile", compile_without_code)
    torch._dynamo.reset()
    other = dataclasses.replace(usual, compile=how, out_dir=usual.out_dir + "-compiled")
    counts = []
    real_update = step_module.LiveRun.update
    monkeypatch.setattr(
        step_module.LiveRun,
        "update",
        lambda self, *a: (counts.append(len(compiled)), real_update(self, *a))[1],
    )
    train(other)
    torch._dynamo.reset()
    assert counts[-1] == counts[0] > 0, "graphs after the first step and after the last"
    if how == "step":
        assert len(compiled) == 1
    for a, b in zip(records_of(usual), records_of(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
        assert a["pk"] == b["pk"]


def test_auto_takes_the_linear_loss_where_logits_are_large_on_cuda(tiny):
    from difftrain.loss import choose_loss
    from difftrain.runtime import Runtime

    def chosen(device, vocab_size, **changes):
        config = tiny(batch_size=64, block_size=1024, **changes)
        return choose_loss(config, vocab_size, Runtime(torch.device(device), torch.bfloat16, 0, 1))

    assert chosen("cuda", 50304) == "linear"  # 6.3 GiB of logits
    assert chosen("cuda", 66) == "logits"
    assert chosen("cpu", 50304) == "logits"
    assert chosen("cuda", 50304, loss_impl="reference") == "reference"


def test_a_disk_that_fills_while_resuming_leaves_the_old_configuration(tiny, tmp_path, monkeypatch):
    import errno

    config = tiny(max_iters=2)
    train(config)
    before = contents(config.out_dir)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(appearing, "flush", full)
        with pytest.raises(OSError, match="No space left"):
            train(dataclasses.replace(config, max_iters=4), resume=True)
    assert contents(config.out_dir) == before


def test_an_fp32_run_can_go_on_in_fp16(tiny):
    config = tiny(max_iters=2)
    train(config)
    train(dataclasses.replace(config, dtype="float16", max_iters=3), resume=True)
    assert find_checkpoint(Path(config.out_dir), "latest").state["scaler"]
