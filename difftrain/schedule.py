"""Schedules: pure functions of the optimiser step and of what evaluations have set off, and tensors for compiled steps."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch

from difftrain.config import Config
from difftrain.config.schedules import CASE_WEIGHTS, EVERYWHERE, METRICS, PENALTIES, QUANTITIES

# Of each schedule that waits for a metric: on how many values it has moved, and at which step it last did.
Reached = Mapping[str, Sequence[int]]
NOTHING: Reached = MappingProxyType({})


def value_of(name: str, step: int, config: Config, reached: Reached = NOTHING) -> float:
    """What a quantity is at a step: by its table in ``schedules``, else by the options that it always had.

    Args:
        name: one of ``difftrain.config.schedules.QUANTITIES``.
        step: optimiser step, counted from 0.
        config: the run's configuration.
        reached: what :func:`advanced` has given so far.
    """
    if name in config.scheduled:
        return _value(config.scheduled[name], step, *reached.get(name, (0, 0)))
    if name == "learning_rate":
        return _warmed_up_and_decayed(step, config)
    if name in CASE_WEIGHTS:
        return 1.0
    if name in PENALTIES:
        start = {"penalty_keep_mask": 1.0, "penalty_mask_correct": 0.0}[name]
        return _between(start, getattr(config, name), step, config.masking_warmup_iters)
    return cast("float", getattr(config, name))


def _value(table: dict[str, Any], step: int, stage: int, since: int) -> float:
    shape, values = table["shape"], cast("list[float]", table.get("values", [table.get("value")]))
    if shape == "constant":
        return values[0]
    if shape in ("linear", "cosine"):
        is_curved = shape == "cosine"
        return _between(table["from"], table["to"], step - table["after"], table["steps"], is_curved)
    if shape == "metric":
        return (
            _between(values[stage - 1], values[stage], step - since, table["steps"]) if stage else values[0]
        )
    place = bisect.bisect_right(table["at"], step)
    if shape == "step":
        return values[place]
    if place in (0, len(values)):
        return values[min(place, len(values) - 1)]
    first, last = table["at"][place - 1 : place + 1]
    return _between(values[place - 1], values[place], step - first, last - first)


def _between(start: float, end: float, done: int, steps: int, is_curved: bool = False) -> float:
    """From ``start`` to ``end`` in ``steps`` steps, of which some are done; straight, or as half a cosine."""
    if done >= steps:
        return end
    if done <= 0:
        return start
    ratio = done / steps
    if is_curved:
        ratio = 0.5 - 0.5 * math.cos(math.pi * ratio)
    return start + ratio * (end - start)


def advanced(reached: Reached, record: Mapping[str, Any], config: Config) -> dict[str, list[int]]:
    """``reached`` after an evaluation: a schedule moves on where the metric that it waits for is met.

    Each moves one value at a time, not before the last move is done, and once at a step.

    Args:
        reached: what it was; not modified.
        record: the evaluation's, as in ``metrics.jsonl``.
        config: the run's configuration.
    """
    now = {name: list(moves) for name, moves in reached.items()}
    step = record["step"]
    for name, table in config.scheduled.items():
        if table["shape"] != "metric":
            continue
        stage, since = now.get(name, (0, -1))
        is_busy = bool(stage) and step < since + max(1, table["steps"])
        if is_busy or step < table["after"] or stage == len(table["values"]) - 1:
            continue
        figure = metric_of(record, table["metric"])
        below, above = table["below"], table["above"]
        if figure < below[stage] if below else figure > above[stage]:  # NaN is neither
            now[name] = [stage + 1, step]
    return now


def metric_of(record: Mapping[str, Any], name: str) -> float:
    """The figure of an evaluation's record that schedules call ``name``; NaN where it has none."""
    if name == EVERYWHERE:
        return min(metric_of(record, f"cases.{kind}.mask") for kind in ("masked", "intact"))
    value: Any = record
    for key in METRICS[name]:
        value = value.get(key) if isinstance(value, Mapping) else None
    return math.nan if value is None else float(value)


def reached_of(state: Mapping[str, Any], config: Config) -> dict[str, list[int]]:
    """What a checkpoint's state says of the schedules that this configuration has; else raises ValueError or TypeError."""
    found = {}
    for name, (stage, since) in dict(state.get("schedules", {})).items():
        table = config.scheduled.get(name)
        if table and table["shape"] == "metric":
            found[name] = [min(int(stage), len(table["values"]) - 1), int(since)]
    return found


def masking_penalties(step: int, config: Config, reached: Reached = NOTHING) -> tuple[float, float]:
    """The penalties of a step: (pk for a kept [MASK], pm for a masked correct word).

    With r = step / masking_warmup_iters they move linearly, pk = 1 + r * (penalty_keep_mask - 1)
    and pm = r * penalty_mask_correct, and stay at their configured values from the end of the
    warmup on; a warmup of 0 means from the first step. One that ``schedules`` names follows its table
    instead. Where no target is [MASK], in gpt2 mode and under the recipes that mask alone, both are 1.

    Args:
        step: optimiser step, counted from 0.
        config: the run's configuration.
        reached: what :func:`advanced` has given so far.

    Source: the specification's ``get_masking_penalties``.
    """
    if not config.has_penalties:
        return 1.0, 1.0
    pk, pm = (value_of(name, step, config, reached) for name in PENALTIES)
    return pk, pm


get_masking_penalties = masking_penalties


def final_penalties(config: Config) -> tuple[float, float]:
    """The penalties that a run is judged at, those of its options, whatever its schedules do."""
    if not config.has_penalties:
        return 1.0, 1.0
    return config.penalty_keep_mask, config.penalty_mask_correct


def case_weights(step: int, config: Config, reached: Reached = NOTHING) -> list[list[float]] | None:
    """All nine weights by case at a step, the penalties among them; None where ``schedules`` names no other."""
    if not config.scheduled.keys() & CASE_WEIGHTS.keys():
        return None
    weights = [[1.0] * 3 for _ in range(3)]
    for name, (kind, answer) in (PENALTIES | CASE_WEIGHTS).items():
        weights[kind][answer] = value_of(name, step, config, reached)
    return weights


def other_values(step: int, config: Config, reached: Reached = NOTHING) -> dict[str, float]:
    """What ``schedules`` moves beside the penalties and the learning rate, by name."""
    told = (*PENALTIES, "learning_rate")
    return {
        name: value_of(name, step, config, reached)
        for name in QUANTITIES
        if name in config.scheduled and name not in told
    }


class PenaltyTensors:
    """The penalties in two 0-d fp32 tensors, for steps that are compiled or captured in a CUDA graph.

    Such a step takes a number for a constant: the graph would be compiled again for another one, or
    replay the one it saw. These tensors stay the same; what they hold changes with the step.

    Args:
        device: where the loss is computed.

    Attributes:
        pk, pm: 0-d fp32 tensors, NaN before the first :meth:`update`.
        case_weights: (3, 3) fp32, all nine weights, NaN before the first :meth:`update_cases`.
    """

    def __init__(self, device: torch.device | str) -> None:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
            self.pk, self.pm, self.case_weights = (
                torch.full(shape, math.nan, dtype=torch.float32, device=device)
                for shape in ((), (), (3, 3))
            )

    def update(
        self, step: int, config: Config, reached: Reached = NOTHING
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Set both to :func:`masking_penalties` of a step, in place, and return (pk, pm).

        Two fills on the device's current stream, which carry the numbers as arguments: nothing is
        copied from the host, and nothing waits.
        """
        pk, pm = masking_penalties(step, config, reached)
        return self.pk.fill_(pk), self.pm.fill_(pm)

    def update_cases(self, weights: Sequence[Sequence[float]]) -> torch.Tensor:
        """Set ``case_weights`` in place, by a fill for each of its nine numbers, and return it."""
        for kind, row in enumerate(weights):
            for answer, weight in enumerate(row):
                self.case_weights[kind, answer].fill_(weight)
        return self.case_weights


def learning_rate(step: int, config: Config, reached: Reached = NOTHING) -> float:
    """The learning rate of a step: linear warmup, cosine decay to ``min_lr``, then constant; or as ``schedules`` has it.

    Source: nanoGPT's ``get_lr``.
    """
    return value_of("learning_rate", step, config, reached)


def _warmed_up_and_decayed(step: int, config: Config) -> float:
    if not config.decay_lr:
        return config.learning_rate
    last = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= last:
        return config.min_lr
    done = (step - config.warmup_iters) / (last - config.warmup_iters)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)
