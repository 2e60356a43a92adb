"""Between log lines, evaluations and checkpoints the host never waits for what it has just given the device."""

from functools import partial

import pytest
import torch

from difftrain.data import philox
from difftrain.runtime import Runtime
from difftrain.training import step as step_module
from difftrain.training.loop import train
from processes import run_in_processes
from simulated_device import SimulatedDevice

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("processes")]

FIRST, LAST = 2, 9  # the steps that are watched; 0 and 10 are logged, 0 and 12 evaluated
SHAPE = {
    "max_iters": 12,
    "eval_interval": 12,
    "log_interval": 10,
    "gradient_accumulation_steps": 2,
    "loss_impl": "reference",  # the CPU's own kernels may look at values; tests/kernels watches the losses
    "dropout": 0.1,
    "spike_factor": 3.0,
}
MOVING = {
    name: {"shape": "linear", "from": 0.1, "to": 0.5, "steps": 12}
    for name in (
        "penalty_keep_mask",
        "weight_intact_other",
        "mask_factor",
        "label_smoothing",
        "weight_decay",
    )
}
KINDS = [
    {"dtype": "float32"},
    {"dtype": "bfloat16", "recipe": "llada"},
    {"dtype": "float16"},
    {"dtype": "float32", "mode": "gpt2", "grad_clip": 0.0},
    {"dtype": "float32", "schedules": MOVING},
    {"dtype": "float32", "self_errors": 0.5},
]


def watch(config, rank=0, harm=None):
    """Train on a simulated device: the passes that it was given between each step's verdict and its reading.

    ``harm(run)`` is called in the middle of each step that is watched.
    """
    device, watched, passes = SimulatedDevice(), None, []
    gradients, update = step_module.LiveRun.gradients, step_module.LiveRun.update
    to_device, read_later = Runtime.to_device, Runtime.read_later

    def watched_gradients(run, *arguments, **options):
        nonlocal watched
        if run.step == FIRST:
            device.put([*run.model.parameters(), *run.model.buffers()])
            watched = device.no_waits()
            watched.__enter__()
        if run.step == LAST:
            watched.__exit__(None, None, None)
            watched = None
        found = gradients(run, *arguments, **options)
        if watched and harm:
            harm(run, *found)
        return found

    def sent(runtime, tensor):
        there = to_device(runtime, tensor)
        device.put([there])
        return there

    def read_back(runtime, values):
        is_watched, before = watched, device.operations.count("embedding")
        read = read_later(runtime, device.copy_back(values))

        def reading():
            if is_watched and watched:
                passes.append(device.operations.count("embedding") - before)
            return read()

        return reading

    patches = [
        (step_module.LiveRun, "gradients", watched_gradients, gradients),
        (Runtime, "to_device", sent, to_device),
        (philox, "lies_on_host", lambda tensor: not device.holds(tensor), philox.lies_on_host),
        (Runtime, "read_later", read_back, read_later),
    ]
    for holder, name, new, _ in patches:
        setattr(holder, name, new)
    try:
        train(config)
    finally:
        if watched:
            watched.__exit__(None, None, None)
        for holder, name, _, real in patches:
            setattr(holder, name, real)
    assert step_module.LiveRun.update is update
    return passes


def watch_each(configs, rank):
    return [watch(config, rank) for config in configs]


def test_a_step_waits_for_nothing_and_is_judged_when_the_next_ones_passes_are_under_way(tiny, tmp_path):
    for i, kind in enumerate(KINDS):
        config = tiny(**SHAPE, **kind, out_dir=str(tmp_path / str(i)))
        # Two micro-batches' passes lie between the verdict on a step and its reading.
        passes = 4 if "self_errors" in kind else 2
        assert watch(config) == [passes] * (LAST - FIRST - 1), kind


def test_so_does_a_step_of_two_processes(tiny, tmp_path):
    kinds = [KINDS[0], KINDS[2] | {"parallel": "fsdp"}]
    configs = [tiny(**SHAPE, **kind, out_dir=str(tmp_path / str(i))) for i, kind in enumerate(kinds)]
    for found in run_in_processes(2, partial(watch_each, configs), tmp_path):
        assert found == [[1] * (LAST - FIRST - 1)] * len(configs)


@pytest.mark.parametrize(
    "harm",
    [
        lambda run, loss_sum, tables: loss_sum.item(),
        lambda run, loss_sum, tables: bool(loss_sum > 0),
        lambda run, loss_sum, tables: loss_sum[None].tolist(),
        lambda run, loss_sum, tables: loss_sum.numpy(),
        lambda run, loss_sum, tables: loss_sum[None][loss_sum[None] > 0],
        lambda run, loss_sum, tables: next(run.model.parameters()).grad.isnan().nonzero(),
    ],
    ids=["item", "bool", "tolist", "numpy", "boolean index", "nonzero"],
)
def test_a_wait_in_a_step_is_seen(tiny, harm):
    with pytest.raises(AssertionError, match="would wait for the device"):
        watch(tiny(**SHAPE), harm=harm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_cuda_waits_for_nothing(tiny, kind, monkeypatch):
    real = step_module.LiveRun.gradients

    def gradients(run, *arguments, **options):
        torch.cuda.set_sync_debug_mode("error" if FIRST <= run.step < LAST else "default")
        return real(run, *arguments, **options)

    monkeypatch.setattr(step_module.LiveRun, "gradients", gradients)
    try:
        train(tiny(**SHAPE | {"loss_impl": "auto"}, **kind, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
