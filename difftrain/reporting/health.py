"""Health: what a run's records show to be wrong. docs/health.md has a section for each warning."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from difftrain.config import Config

INERT_SHARE = 1e-3  # a penalty that weighs fewer answers than this does nothing
DEGENERATE_SHARE = 0.95
RUNAWAY_GAP = 30.0  # nats: softmax gives [MASK] less than 1e-13
COUNTED_SHARE = 0.2  # of the positions; fewer that count make a step a waste
MEMORISING_RISE, MEMORISING_GAP = 1.02, 0.95  # of the lowest validation nll; of the validation nll
MEMORISING_RECORDS = 5  # of training between two evaluations, else their mean says little
USUAL = 20  # training records by which the next one is judged
SPIKE_SIGMAS, SPIKE_RISE = 6.0, 1.3  # above their median: in robust standard deviations, and as a factor
SPIKES, SPIKE_MEMORY = 3, 100  # so many spikes, or steps not applied, in so many records

PAGE = "docs/health.md"


@dataclass(frozen=True)
class Kind:
    """A kind of warning: its heading in docs/health.md as an anchor, what it means, and what to do."""

    anchor: str
    meaning: str
    remedy: str


INERT = Kind(
    "inert-penalty",
    "A penalty weighs answers of [MASK], and the model gives none where it would apply: the curriculum has no effect.",
    "Shorten masking_warmup_iters if it was to act: the model left [MASK] before the penalty moved; else leave it at 1.",
)
EVERYWHERE = Kind(
    "mask-everywhere",
    "The model answers [MASK] to masked and to right words alike: it has found the cheapest answer and learns nothing.",
    "Raise penalty_mask_correct, or reach it sooner with a shorter masking_warmup_iters.",
)
RUNAWAY = Kind(
    "runaway-gap",
    "The logit of [MASK] lies so far below the others that it has no gradient left: it will not come back.",
    "Raise penalty_keep_mask, or bound the logits with softcap or z_loss.",
)
MEMORISING = Kind(
    "memorising",
    "The nll of the validation text rises while that of the training text falls: the model learns the text by heart.",
    "Take more data, a smaller model, dropout or fewer steps; the best checkpoint is kept.",
)
UNCOUNTED = Kind(
    "uncounted-share",
    "Few positions count in the loss: most of each step is computed for nothing, and the gradient is noisy.",
    "Mask a larger share, or check why so many positions are left out.",
)
UNSTEADY = Kind(
    "loss-spikes",
    "The loss jumps, or steps cannot be applied: the learning rate is too high for this model and batch.",
    "Halve learning_rate, lengthen warmup_iters, or leave spikes out with spike_factor 10.",
)
KINDS = {
    "pk": INERT, "pm": INERT, "all": EVERYWHERE, "gap": RUNAWAY, "memorising": MEMORISING, "counted": UNCOUNTED,
    "spikes": UNSTEADY, "skipped": UNSTEADY,
}  # fmt: skip


@dataclass(frozen=True)
class HealthWarning:
    """A warning: the step whose record shows it, its key in ``KINDS``, and the figures."""

    step: int
    key: str
    message: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.key]

    def __str__(self) -> str:
        return f"{self.message} ({PAGE}#{self.kind.anchor})"


def number(record: Any, *keys: str) -> float | None:
    """A finite number of a record, by the keys that lead to it; None where there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, bool) or not isinstance(record, (int, float)):
        return None
    try:
        value = float(record)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


class Health:
    """Watches a run's records as they come, in their order, and tells each warning once.

    Args:
        config: the run's configuration; None where it is not known.
    """

    def __init__(self, config: Config | None):
        self._has_penalties = config is None or config.has_penalties
        # Penalties that can act on nothing by the corruption that was asked for.
        self._idle: set[str] = set()
        if config is not None and config.mask_factor == 0 and "mask_factor" not in config.scheduled:
            self._idle.add("pk")
        if config is not None and (
            config.wrong_target == "token"
            or (config.replace_factor == 0 and "replace_factor" not in config.scheduled)
        ):
            self._idle.add("pm")
        self._told: set[str] = set()
        self._usual: deque[float] = deque(maxlen=USUAL)  # nll of the last training records
        self._was_spike: deque[bool] = deque(maxlen=SPIKE_MEMORY)
        self._skipped: deque[float] = deque(maxlen=SPIKE_MEMORY)
        self._trained: list[float] = []  # nll of training since the last evaluation
        self._lowest, self._trained_at_lowest = math.inf, math.inf

    def see(self, record: dict[str, Any]) -> list[HealthWarning]:
        """The warnings that this record is the first to show."""
        rules = self._evaluation if record["kind"] == "eval" else self._training
        found = [HealthWarning(record["step"], *each) for each in rules(record)]
        new = [warning for warning in found if warning.key not in self._told]
        self._told |= {warning.key for warning in new}
        return new

    def _evaluation(self, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if self._has_penalties and record["step"] != 0:
            yield from (w for w in penalty_warnings(record) if w[0] not in self._idle)
        counted = number(record, "counted")
        if counted is not None and counted < COUNTED_SHARE:
            yield "counted", f"{100 * counted:.0f} % of the positions count in the loss"
        yield from self._memorising(record)

    def _memorising(self, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Validation text corrupted as in training, beside the training text since the last evaluation."""
        nll = number(record, "masked_nll", "training") if "masked_nll" in record else number(record, "nll")
        trained, self._trained = self._trained, []
        if nll is None or len(trained) < MEMORISING_RECORDS:
            return
        mean = statistics.fmean(trained)
        if nll <= self._lowest:
            self._lowest, self._trained_at_lowest = nll, mean
        elif (
            nll > MEMORISING_RISE * self._lowest
            and mean < MEMORISING_GAP * nll
            and mean < self._trained_at_lowest
        ):
            yield (
                "memorising",
                f"validation nll has risen from {self._lowest:.3f} to {nll:.3f}, while training is at {mean:.3f}",
            )

    def _training(self, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
        nll = number(record, "nll")
        masked = number(record, "cases", "masked", "nll") if "cases" in record else nll
        if masked is not None:
            self._trained.append(masked)
        self._was_spike.append(nll is not None and self._is_spike(nll))
        if nll is not None:
            self._usual.append(nll)
        self._skipped.append(number(record, "skipped_steps") or 0.0)
        if sum(self._was_spike) >= SPIKES:
            yield "spikes", f"the loss has jumped {sum(self._was_spike)} times, to {nll:.3f} now"
        skipped = self._skipped[-1] - self._skipped[0]
        if skipped >= SPIKES:
            yield "skipped", f"{skipped:.0f} steps were not applied: their loss or gradient was no good"

    def _is_spike(self, nll: float) -> bool:
        if len(self._usual) < USUAL:
            return False
        median = statistics.median(self._usual)
        sigma = 1.4826 * statistics.median(abs(value - median) for value in self._usual)
        return nll > SPIKE_RISE * median and nll > median + SPIKE_SIGMAS * sigma


def penalty_warnings(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What an evaluation shows to be wrong with the penalties: (key, message) each."""
    masked, intact = (number(record, "cases", kind, "mask") for kind in ("masked", "intact"))
    for key, name, share, where in (
        ("pk", "penalty_keep_mask", masked, "masked positions"),
        ("pm", "penalty_mask_correct", intact, "correct words"),
    ):
        if record.get(key) != 1.0 and share is not None and share < INERT_SHARE:
            yield key, f"{name} acts on nothing: {where} are not answered [MASK]"
    if masked is not None and intact is not None and min(masked, intact) > DEGENERATE_SHARE:
        yield "all", "the model answers [MASK] nearly everywhere"
    gap = number(record, "cases", "masked", "gap")
    if gap is not None and gap > RUNAWAY_GAP:
        yield "gap", f"[MASK]'s logit lies {gap:.0f} below the maximum on masked positions"
