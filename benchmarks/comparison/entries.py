"""One line of the comparison, and what follows from its time. Needs no torch, for the report."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BOTH, ACCUMULATED = (
    "forward",
    "forward + backward, upstream 1",
    "forward + backward, upstream 1/8",
)
# The upstream gradient of each; None: no gradient is wanted.
MEASURES = {FORWARD: None, BOTH: 1.0, ACCUMULATED: 0.125}
TIMED = "timed"
# Whose a contender is.
OURS, TORCH, LIBRARY = "ours", "torch", "library"
# What a contender may lack.
NO_WEIGHTS = "no weights"  # it is a plain cross-entropy
NARROW_LOSS = "loss in the input's dtype"
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass
class Entry:
    """One contender, shape and measure. Times in ms, memory in MiB above the inputs."""

    shape: list[int]  # (N, V), or (N, D, V) for the linear losses
    dtype: str
    contender: str
    family: str
    lacks: str
    measure: str
    outcome: str  # TIMED, or why not
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    samples: int | None = None
    peak_mib: float | None = None
    gradients_mib: float | None = None  # the share of peak_mib that the gradients of the inputs take
    gb_per_s: float | None = None
    percent_of_limit: float | None = None
    times_the_products: float | None = None
    copy_gb_per_s: float | None = None  # of the process that took the time


def bytes_moved(n: int, vocab_size: int, item_bytes: int, with_gradient: bool) -> int:
    """The least that must move: the logits read once, and their gradient written once."""
    return n * vocab_size * item_bytes * (2 if with_gradient else 1)


def add_rates(entry: Entry, copy_gb_per_s: float, products: dict[bool, float]) -> None:
    """Fill in what follows from an entry's time.

    Args:
        copy_gb_per_s: what a copy on the device reads and writes.
        products: ms of the plain matrix products of a linear shape, without and with gradients.
    """
    with_gradient = entry.measure != FORWARD
    entry.copy_gb_per_s = copy_gb_per_s
    if len(entry.shape) == 2:
        moved = bytes_moved(*entry.shape, ITEM_BYTES[entry.dtype], with_gradient)
        entry.gb_per_s = moved / entry.ms / 1e6
        entry.percent_of_limit = 100 * entry.gb_per_s / copy_gb_per_s
    else:
        entry.times_the_products = entry.ms / products[with_gradient]
