"""How long calls take on the device, what memory they take, and the limits they are held against.

Calls are queued ahead: before each timed one the device spins for longer than the host needs to
queue it, so that a time is the device's own, as in a training step whose host runs ahead. A call
that itself waits for the device still shows that wait. Inputs are taken in turn from more memory
than the L2 holds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from measuring import device
from measuring.rehearsal import is_rehearsed

FEWEST, MOST = 10, 200  # samples of one measurement
LONGEST_SPIN_MS = 20.0
ROUND_SECONDS = 0.02  # of CPU time, in repeated calls
REST_SECONDS = 0.05


@dataclass(frozen=True)
class Call:
    """What is timed, and what must be done before the same inputs are used again, untimed."""

    run: Callable[[], object]
    restore: Callable[[], object] | None = None


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def cpu_times(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """CPU milliseconds of each call, of all threads, in rounds in turn for so long; five at least.

    A round repeats a short call: what other threads take is added to the clock in steps of milliseconds, and would
    count for whichever call such a step meets. Before each round there is a rest: for some 20 ms after its work an
    OpenMP thread looks for more, and that would count for the call that comes next. After a round it counts for none.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.process_time()
        call()
        repeats[name] = max(1, round(ROUND_SECONDS / max(time.process_time() - began, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            time.sleep(REST_SECONDS)
            began = time.process_time()
            for _ in range(repeats[name]):
                call()
            times[name].append(1e3 * (time.process_time() - began) / repeats[name])
    return times


@lru_cache
def _cycles_per_ms() -> float:
    """Clock cycles that the device's spin counts in a millisecond."""
    cycles = 10_000_000
    for _ in range(2):  # the first one loads the kernel
        begin, end = device.event(), device.event()
        begin.record()
        device.spin(cycles)
        end.record()
        end.synchronize()
    return cycles / begin.elapsed_time(end)


def cuda_times(calls: list[Call]) -> list[float]:
    """Milliseconds of each call on the device, between two events."""
    cycles_per_ms = _cycles_per_ms()
    device.synchronize()
    spin_ms, events = 1.0, []
    for call in calls:
        device.spin(int(min(spin_ms, LONGEST_SPIN_MS) * cycles_per_ms))
        begin, end = device.event(), device.event()
        began = time.perf_counter()
        begin.record()
        call.run()
        end.record()
        # The next call gets a head start of twice what this one took the host to queue.
        spin_ms = 0.1 + 2e3 * (time.perf_counter() - began)
        if call.restore:
            call.restore()
        events.append((begin, end))
    device.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def time_calls(
    calls: list[Call], budget_ms: float, times_of: Callable[[list[Call]], list[float]] | None = None
) -> list[float]:
    """Times of the calls in turn, after two rounds to warm up, for about ``budget_ms`` in all."""
    times_of = times_of or cuda_times
    for call in calls:
        call.run()
        if call.restore:
            call.restore()
    slowest = max(times_of(calls))
    count = min(MOST, max(FEWEST, math.ceil(budget_ms / max(slowest, 1e-3))))
    return times_of([calls[i % len(calls)] for i in range(count)])


def copies_beyond_cache(nbytes: int, cache_bytes: int) -> int:
    """How many inputs to take in turn, so that none is in the cache when it comes up again."""
    return max(2, 1 + math.ceil(2 * cache_bytes / nbytes))


def peak_mib(call: Callable) -> float:
    """Largest memory beside what is held before the call."""
    return device.peak_bytes(call) / 2**20


class Nothing(torch.autograd.Function):
    """A loss of tensors that does nothing: what autograd itself takes for one."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


# Limits -------------------------------------------------------------------------------------------


def copy_bandwidth(budget_ms: float) -> float:
    """Bytes per second that a copy of 1 GiB on the device (1 MiB in a rehearsal) reads and writes."""
    size = 2**20 if is_rehearsed() else 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device.kind()) for _ in range(2))
    source.random_()  # equal bytes can be cheaper to move
    middle, *_ = quantiles(time_calls([Call(lambda: target.copy_(source))], budget_ms))
    return 2 * size / (middle / 1e3)


def product_ms(hidden: Tensor, weight: Tensor, budget_ms: float) -> dict[bool, float]:
    """Time of the plain products of a linear head: the logits alone, and with both gradients."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden @ weight.t()
    alone = Call(lambda: torch.mm(hidden, weight.t(), out=logits))
    rest = Call(lambda: (logits @ weight, logits.t() @ hidden))
    times = [quantiles(time_calls([call], budget_ms))[0] for call in (alone, rest)]
    return {False: times[0], True: sum(times)}
