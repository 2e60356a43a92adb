import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.data import open_corpus, sample_indices
from difftrain.runtime import Runtime
from difftrain.training import verdict as verdict_module
from difftrain.training.loop import train
from difftrain.training.step import LiveRun, _make_batch
from resume_runs import resume_all, train_all, train_with_stop
from run_digests import digests_of

# Evaluations and saves at 0, 5, 10 and 13; the penalties' warmup ends at 6: stops lie before, at and after each.
STOPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
SOME = (4, 5, 11)  # before, at and after a save
# Where no line is logged, a step's verdict is read in the next step.
SCHEDULE = {
    "max_iters": 13, "eval_interval": 5, "log_interval": 3, "masking_warmup_iters": 6, "dropout": 0.1, "batch_size": 2,
}  # fmt: skip


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("processes")]


@pytest.mark.parametrize(
    ("dtype", "accumulation", "stops"),
    [
        ("float32", 1, STOPS),
        ("bfloat16", 4, SOME),
        *(
            pytest.param(dtype, accumulation, STOPS, marks=pytest.mark.slow)
            for dtype, accumulation in (("float32", 4), ("bfloat16", 1), ("bfloat16", 4))
        ),
    ],
)
def test_a_run_stopped_after_any_step_and_resumed_ends_in_the_same_bits(tiny, dtype, accumulation, stops):
    straight = tiny(**SCHEDULE, dtype=dtype, gradient_accumulation_steps=accumulation)
    train(straight)
    expected = digests_of(straight)
    for stop_at in stops:
        stopped = dataclasses.replace(straight, out_dir=f"{straight.out_dir}-{stop_at}")
        train_with_stop(stopped, stop_at)
        assert digests_of(stopped) == expected, stop_at


@pytest.mark.parametrize("stops", [SOME, pytest.param(STOPS, marks=pytest.mark.slow)])
def test_so_does_one_of_two_processes(tiny, tmp_path, stops):
    runs = []
    for dtype, accumulation in (("float32", 2), ("bfloat16", 4)):
        straight = tiny(
            **SCHEDULE, dtype=dtype, gradient_accumulation_steps=accumulation, out_dir=str(tmp_path / dtype)
        )
        runs.append((straight, None))
        for stop_at in stops:
            runs.append((dataclasses.replace(straight, out_dir=f"{straight.out_dir}-{stop_at}"), stop_at))
    train_all(runs, 2, tmp_path)
    for config, stop_at in runs:
        if stop_at is None:
            expected = digests_of(config)
        assert digests_of(config) == expected, config.out_dir


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_so_does_one_with_bad_steps_and_spikes_wherever_it_stops(tiny, dtype, monkeypatch, capsys):
    bad, spikes = {3, 4, 8}, {9}
    real = LiveRun.gradients

    def gradients(self, *arguments, **options):
        loss_sum, tables = real(self, *arguments, **options)
        if self.step in spikes:
            for parameter in self.model.parameters():
                parameter.grad *= 100
        return loss_sum * (torch.nan if self.step in bad else 1.0), tables

    monkeypatch.setattr(LiveRun, "gradients", gradients)
    monkeypatch.setattr(verdict_module, "SPIKE_MEMORY", 4)
    straight = tiny(**SCHEDULE, dtype=dtype, spike_factor=9.0)
    train(straight)
    left_out = [f"warning: step {step} is not applied" for step in sorted(bad | spikes)]

    def warnings():
        lines = capsys.readouterr().out.splitlines()
        return [
            line.split(":")[0] + ":" + line.split(":")[1] for line in lines if " is not applied" in line
        ]

    assert warnings() == left_out
    state = find_checkpoint(Path(straight.out_dir), "latest").state
    assert (state["bad_steps"], state["skipped_steps"]) == (0, 4)
    moments = load_file(
        find_checkpoint(Path(straight.out_dir), "latest").folder / "optimizer/optimizer.safetensors"
    )
    assert {t.item() for name, t in moments.items() if name.endswith(".step")} == {13.0 - 4.0}
    for stop_at in (3, 4, 5, 9, 10):
        stopped = dataclasses.replace(straight, out_dir=f"{straight.out_dir}-{stop_at}")
        train_with_stop(stopped, stop_at)
        assert digests_of(stopped) == digests_of(straight), stop_at
        assert warnings() == left_out, "each once, in order"


# Another number of processes ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["specification", "llada"])
def test_any_number_of_processes_sees_the_same_samples_corrupted_alike(tiny, recipe):
    config = tiny(batch_size=2, gradient_accumulation_steps=4, recipe=recipe)
    n_parts = 2 if recipe == "specification" else 3  # with token weights
    corpus = open_corpus(config.data)

    def inputs(world_size, step):
        batches = [
            _make_batch(
                corpus,
                sample_indices(step, micro_step, rank, world_size, config),
                config,
                Runtime(torch.device("cpu"), torch.float32, rank, world_size),
            )
            for rank in range(world_size)
            for micro_step in range(4 // world_size)
        ]
        parts = list(zip(*batches, strict=True))[:n_parts]
        return torch.stack([torch.cat(part).double() for part in parts])

    for step in (0, 7):
        alone = inputs(1, step)
        assert alone.shape == (n_parts, 8, config.block_size)
        assert torch.equal(inputs(2, step), alone)
        assert torch.equal(inputs(4, step), alone)
    assert not torch.equal(inputs(1, 0), inputs(1, 7))


def test_a_run_that_goes_on_with_two_and_then_four_processes_in_shards_ends_as_one_would(tiny, tmp_path):
    straight = tiny(
        max_iters=9,
        lr_decay_iters=9,
        dtype="float64",
        batch_size=2,
        gradient_accumulation_steps=4,
        n_layer=2,
    )
    train(straight)
    moved = dataclasses.replace(straight, out_dir=str(tmp_path / "moved"))
    train(dataclasses.replace(moved, max_iters=3))
    for processes, steps, parallel in ((2, 6, "ddp"), (4, 9, "fsdp")):
        longer = dataclasses.replace(moved, max_iters=steps, parallel=parallel)
        resume_all([longer], processes, tmp_path)
    a, b = (find_checkpoint(Path(c.out_dir), "latest") for c in (straight, moved))
    assert len(list((b.folder / "optimizer").iterdir())) == 4, "each process has written its share"
    assert_close(a.folder / "model.safetensors", b.folder / "model.safetensors")
    # Back to one process: the shares of four are read as one.
    train(dataclasses.replace(moved, max_iters=11, parallel="ddp"), resume=True)
    train(dataclasses.replace(straight, max_iters=11), resume=True)
    a, b = (find_checkpoint(Path(c.out_dir), "latest") for c in (straight, moved))
    for name in ("model.safetensors", "optimizer/optimizer.safetensors"):
        assert_close(a.folder / name, b.folder / name)


def assert_close(path, other):
    a, b = load_file(path), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12)
