"""What docs/scale.md promises: any number of processes goes on, no sample twice, and what a process does stays the same."""

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.config import Config
from difftrain.data import sample_indices
from difftrain.reporting.log import read_metrics
from difftrain.training.loop import train
from processes import run_in_processes
from resume_runs import resume_all, train_all

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("processes")]


@pytest.mark.parametrize("batch", [(12, 1), (3, 4), (1, 12), (6, 4), (24, 1)])
def test_no_two_processes_ever_take_a_sample_twice(batch):
    """Over steps, micro-batches and ranks, while the number of processes changes from step to step."""
    config = Config(batch_size=batch[0], gradient_accumulation_steps=batch[1])
    taken = []
    for step, world_size in enumerate((4, 3, 2, 1, 6, 4, 12)):
        micro_steps, _ = config.micro_batches(world_size)
        for rank in range(world_size):
            for micro_step in range(micro_steps):
                taken += sample_indices(step, micro_step, rank, world_size, config).tolist()
    assert len(taken) == 7 * batch[0] * batch[1]
    assert sorted(taken) == list(range(len(taken)))


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_run_of_four_processes_goes_on_with_three_and_then_two(tiny, tmp_path, parallel):
    last = tiny(
        max_iters=6, lr_decay_iters=6, batch_size=12, dtype="float64", parallel=parallel, eval_interval=100, eval_iters=2,
        out_dir=str(tmp_path / "many"),
    )  # fmt: skip
    train_all([(dataclasses.replace(last, max_iters=2), None)], 4, tmp_path)
    resume_all([dataclasses.replace(last, max_iters=4)], 3, tmp_path)
    resume_all([last], 2, tmp_path)
    one = dataclasses.replace(last, out_dir=str(tmp_path / "one"))
    train(one)
    many, alone = (
        load_file(find_checkpoint(Path(config.out_dir), "latest").folder / "model.safetensors")
        for config in (last, one)
    )
    assert many.keys() == alone.keys()
    for name, tensor in many.items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-12)
    losses = [
        [r["loss"] for r in read_metrics(Path(c.out_dir)) if r["kind"] == "train"] for c in (last, one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert len(losses[0]) == 6


class Counting(TorchDispatchMode):
    """Counts what torch is asked for: operations, and of collectives each one and its bytes."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            name = func.__name__.split(".")[0]
            tensors = [t for each in args for t in (each if isinstance(each, list | tuple) else [each])]
            self.found[name] += 1
            self.found[f"{name} bytes"] += sum(
                t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)
            )
        else:
            self.found["operations"] += 1
        return func(*args, **(kwargs or {}))


def count(config, rank):
    with Counting() as counting:
        train(config)
    return counting.found


def counted_in_a_step(config, processes, folder):
    """What each process did in a step of the middle: of runs of unequal length the difference, by step."""
    short, long = (
        run_in_processes(
            processes,
            partial(
                count, dataclasses.replace(config, max_iters=n, out_dir=f"{config.out_dir}-{processes}-{n}")
            ),
            folder,
        )
        for n in (2, 4)
    )
    found = []
    for a, b in zip(short, long, strict=True):
        each = {name: (b[name] - a[name]) / 2 for name in b}
        found.append({name: value for name, value in each.items() if value})
    return found


def test_what_a_process_does_in_a_step_does_not_grow_with_the_number_of_processes(tiny, tmp_path):
    """With as many sequences in each process. Counted, so that no clock decides."""
    config = tiny(batch_size=2, eval_interval=100, lr_decay_iters=4, log_interval=100)
    of = {}
    for n in (1, 2, 4):
        (of[n], *others) = counted_in_a_step(
            dataclasses.replace(config, gradient_accumulation_steps=n), n, tmp_path
        )
        assert all(other == of[n] for other in others)
    assert not any("reduce" in name for name in of[1])
    assert any("reduce" in name for name in of[2])
    assert of[4] == of[2]
