"""A budget of minutes: how many steps this machine takes in it, settled before the run begins."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable

import torch

from difftrain.config import Config
from difftrain.config.schedules import scaled
from difftrain.data import Corpus
from difftrain.evaluation import ValidationSet, evaluate
from difftrain.parallel import reshard
from difftrain.runtime import Runtime
from difftrain.schedule import learning_rate
from difftrain.training.step import LiveRun

FIRST_STEPS, TIMED_STEPS = 2, 8  # the first ones set things up: threads, buffers, compiled code
EVALUATED = 4  # batches a process
SHARES = 40  # steps are a fortieth of max_iters or a multiple: a quarter's evaluation stays at a quarter
SCALED = (
    "warmup_iters", "lr_decay_iters", "masking_warmup_iters", "causal_anneal_iters", "eval_interval", "log_interval",
)  # fmt: skip


def fit_to_budget(config: Config, runtime: Runtime, corpus: Corpus, say: Callable[[str], None]) -> Config:
    """The configuration with the steps that fit into its ``budget_minutes`` here, and no budget any more.

    A few steps and evaluations of a model that is then thrown away are timed. Every process must call,
    and gets the main process's answer. What is chosen lies between ``min_iters`` and ``max_iters``, and
    everything that is counted in steps is shortened with it (:func:`shorten`), so that the run is one of
    these numbers, whatever chose them.
    """
    if config.min_iters >= config.max_iters:
        return shorten(config, config.max_iters)
    say(f"timing {FIRST_STEPS + TIMED_STEPS} steps, to fit the run into {config.budget_minutes:g} min")
    step_seconds, evaluation_seconds = _time(config, runtime, corpus)
    evaluations = 1 + math.ceil(config.max_iters / config.eval_interval)
    left = 60 * config.budget_minutes - evaluations * evaluation_seconds
    share = math.floor(SHARES * left / step_seconds / config.max_iters) / SHARES
    steps = min(max(round(share * config.max_iters), config.min_iters), config.max_iters)
    minutes = (steps * step_seconds + evaluations * evaluation_seconds) / 60
    rate = 1 / step_seconds
    bound = {config.min_iters: " (min_iters)", config.max_iters: " (max_iters)"}.get(steps, "")
    say(
        f"this machine does {rate:.{1 if rate >= 1 else 2}f} steps a second: "
        f"{steps} steps{bound}, {f'about {minutes:.0f}' if minutes >= 0.75 else 'under 1'} min"
    )
    return shorten(config, steps)


def shorten(config: Config, steps: int) -> Config:
    """The configuration for this many steps: schedules, evaluations and log lines at the same shares of the run."""
    share = steps / config.max_iters
    changes = {name: max(1, round(share * value)) for name in SCALED if (value := getattr(config, name))}
    changes["schedules"] = scaled(config.schedules, share)
    return dataclasses.replace(config, max_iters=steps, budget_minutes=0.0, **changes)


def _time(config: Config, runtime: Runtime, corpus: Corpus) -> tuple[float, float]:
    """Seconds a step and seconds an evaluation, the main process's on every process."""
    run = LiveRun(config, runtime, corpus, None, lambda _: None)
    lr = learning_rate(0, config)
    steps = []
    for _ in range(FIRST_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        loss_sum, _ = run.gradients(lr, is_logged=False)
        run.settle()
        run.update(loss_sum)
        steps.append(time.perf_counter() - began)
    run.settle()
    batches = run.validation_set.batches
    some = ValidationSet(batches[: EVALUATED * runtime.world_size], run.validation_set.id)
    began = time.perf_counter()
    evaluate(run.compiled, some, run.mask_id, runtime, run.loss_impl)
    evaluation = (time.perf_counter() - began) * len(batches) / len(some.batches)
    reshard(run.model)
    del run
    gc.collect()  # a replica must go before its processes' group, and a model before the next one comes
    measured = [statistics.median(steps[FIRST_STEPS:]), evaluation]
    seconds = torch.tensor(measured, dtype=torch.float64, device="cpu")
    return tuple(runtime.sum_over_processes(seconds * runtime.is_main).tolist())
