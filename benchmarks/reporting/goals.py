"""What the loss is to reach on one H100 in bf16, and whether a results file shows it.

Figures come from the entries of stage loss alone. A goal whose contender or peers were not timed is
"not measured", whatever else was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from comparison.entries import ACCUMULATED, BOTH, FORWARD, LIBRARY, NARROW_LOSS, OURS, TIMED

LOSS = "ours"  # the call that people write: from its second step on one pass, as the 4NV limit has it
STATED, NOT_PREDICTED = "ours, upstream stated", "ours, not predicted"
LINEAR = "ours linear"
PLAIN, EAGER, COMPILED = (
    "plain cross-entropy, our kernel",
    "eager reference",
    "torch.compile, tensor penalties",
)
STATES = MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


class NotMeasured(Exception):
    """Why a goal has no figure."""


class Table:
    """The entries of one dtype by shape, contender and measure."""

    def __init__(self, entries: Iterable[dict[str, Any]], dtype: str = "bf16"):
        self.entries = [e for e in entries if e["dtype"] == dtype]

    def of_shape(self, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        return [e for e in self.entries if tuple(e["shape"]) == shape]

    def entry(self, shape: tuple[int, ...], contender: str, measure: str) -> dict[str, Any]:
        """The timed entry; raises NotMeasured with the reason where there is none."""
        named = [e for e in self.of_shape(shape) if e["contender"] == contender]
        for e in named:
            if e["outcome"] == TIMED and e["measure"] == measure:
                return e
        raise NotMeasured(f"{contender}: {named[0]['outcome']}" if named else f"no entry for {contender}")

    def ms(self, shape: tuple[int, ...], contender: str, measure: str = BOTH) -> float:
        return self.entry(shape, contender, measure)["ms"]

    def best_peer(self, shape: tuple[int, ...], measure: str = BOTH) -> dict[str, Any]:
        """The fastest that computes the whole loss and is not ours; another library must be among them.

        One whose loss is as narrow as the logits passes for whole: it saves nothing by that.
        """
        whole = [e for e in self.of_shape(shape) if e["family"] != OURS and is_whole(e)]
        timed = [e for e in whole if e["outcome"] == TIMED and e["measure"] == measure]
        if not any(e["family"] == LIBRARY for e in timed):
            reasons = [f"{e['contender']}: {e['outcome']}" for e in whole if e["family"] == LIBRARY]
            raise NotMeasured("; ".join(reasons) or "no library was compared")
        return min(timed, key=lambda e: e["ms"])


def is_whole(entry: dict[str, Any]) -> bool:
    """Whether it is the loss with its weights."""
    return entry["lacks"] in ("", NARROW_LOSS)


# A figure and a note on what it was taken from.
Figure = Callable[[Table, tuple[int, ...]], tuple[float, str]]


@dataclass(frozen=True)
class Goal:
    """``figure`` on ``shape`` is to be at least ``asked``, or at most."""

    what: str
    shape: tuple[int, ...]
    asked: float
    unit: str
    figure: Figure
    at_least: bool = True

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return (
            f"{self.what} at {size}: {'at least' if self.at_least else 'at most'} {self.asked:g}{self.unit}"
        )


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    value: float | None
    note: str  # what the value was taken from, or why there is none

    @property
    def is_met(self) -> bool:
        value, goal = self.value, self.goal
        return value is not None and (value >= goal.asked if goal.at_least else value <= goal.asked)

    @property
    def state(self) -> str:
        """One of STATES."""
        return NOT_MEASURED if self.value is None else MET if self.is_met else MISSED

    @property
    def outcome(self) -> str:
        """The state, missed by how much, and the figure or why there is none."""
        unit = self.goal.unit
        if self.value is None:
            return f"{NOT_MEASURED} ({self.note})"
        note = f" ({self.note})" if self.note else ""
        by = "" if self.is_met else f" by {abs(self.value - self.goal.asked):.3g}{unit}"
        return f"{self.state}{by}: {self.value:.3g}{unit}{note}"


def evaluate(goals: Iterable[Goal], entries: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Each goal held against a results file's entries."""
    table, verdicts = Table(entries), []
    for goal in goals:
        try:
            verdicts.append(Verdict(goal, *goal.figure(table, goal.shape)))
        except NotMeasured as reason:
            verdicts.append(Verdict(goal, None, str(reason)))
    return verdicts


# Figures ------------------------------------------------------------------------------------------


def _share(contender: str, measure: str) -> Figure:
    return lambda table, shape: (table.entry(shape, contender, measure)["percent_of_limit"], "")


def _accumulation_cost(table: Table, shape: tuple[int, ...]) -> tuple[float, str]:
    times = [table.ms(shape, LOSS, m) for m in (ACCUMULATED, BOTH)]
    return 100 * (times[0] / times[1] - 1), ""


def _over_best_peer(table: Table, shape: tuple[int, ...]) -> tuple[float, str]:
    peer = table.best_peer(shape)
    missing = {
        e["contender"]
        for e in table.of_shape(shape)
        if e["family"] == LIBRARY and is_whole(e) and e["outcome"] != TIMED
    }
    note = peer["contender"] + (f"; without {', '.join(sorted(missing))}" if missing else "")
    return peer["ms"] / table.ms(shape, LOSS), note


def _over(contender: str) -> Figure:
    return lambda table, shape: (table.ms(shape, contender) / table.ms(shape, LOSS), "")


def _weights_cost(measure: str, contender: str) -> Figure:
    def figure(table: Table, shape: tuple[int, ...]) -> tuple[float, str]:
        return 100 * (table.ms(shape, contender, measure) / table.ms(shape, PLAIN, measure) - 1), ""

    return figure


def _over_products(table: Table, shape: tuple[int, ...]) -> tuple[float, str]:
    return table.entry(shape, LINEAR, BOTH)["times_the_products"], ""


def _extra_memory(table: Table, shape: tuple[int, ...]) -> tuple[float, str]:
    entry = table.entry(shape, LINEAR, BOTH)
    return entry["peak_mib"] - entry["gradients_mib"], ""


def _rows(vocab_size: int) -> tuple[int, int]:
    return 8192, vocab_size


SHARE = {50304: 90, 50305: 90, 128256: 85, 151936: 85, 262144: 75}  # of the limit, loss and gradient
GOALS = (
    *(Goal("forward", _rows(v), 90, " % of the limit", _share(LOSS, FORWARD)) for v in SHARE),
    *(
        Goal("loss and gradient", _rows(v), share, " % of the limit", _share(LOSS, BOTH))
        for v, share in SHARE.items()
    ),
    Goal("loss and gradient", (262144, 66), 50, " % of the limit", _share(LOSS, BOTH)),
    *(
        Goal("upstream 1/8 slower than 1", _rows(v), 5, " %", _accumulation_cost, at_least=False)
        for v in SHARE
    ),
    Goal("best peer with the same loss", _rows(50304), 2, " x our time", _over_best_peer),
    Goal("best peer with the same loss", _rows(128256), 1.3, " x our time", _over_best_peer),
    Goal("eager", _rows(50304), 6, " x our time", _over(EAGER)),
    Goal("torch.compile, tensor penalties", _rows(50304), 2.5, " x our time", _over(COMPILED)),
    *(
        Goal(f"cost of the weights, {name}", _rows(50304), 2, " %", _weights_cost(m, c), at_least=False)
        for name, m, c in (("forward", FORWARD, LOSS), ("loss and gradient", BOTH, LOSS))
    ),
    Goal("linear", (8192, 768, 50304), 1.25, " x its products", _over_products, at_least=False),
    Goal("linear", (8192, 4096, 128256), 1.10, " x its products", _over_products, at_least=False),
    Goal(
        "linear, memory beside inputs and gradients", (8192, 4096, 128256), 1024, " MiB",
        _extra_memory, at_least=False,
    ),
    Goal(
        "linear, memory beside inputs and gradients", (65536, 768, 50304), 512, " MiB",
        _extra_memory, at_least=False,
    ),
)  # fmt: skip
