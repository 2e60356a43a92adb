"""The device that is measured: a CUDA GPU; in a rehearsal the CPU, whose times and bytes mean nothing.

What the benchmarks ask of CUDA alone stands here, so that a rehearsal walks every other line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from measuring.rehearsal import REHEARSED, is_rehearsed


def is_there() -> bool:
    """Whether there is a device to measure, or to rehearse on."""
    return is_rehearsed() or torch.cuda.is_available()


def name() -> str:
    """As a result says what it was measured on."""
    if is_rehearsed():
        return REHEARSED
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def kind() -> str:
    """Where tensors are made."""
    return "cpu" if is_rehearsed() else "cuda"


class _HostEvent:
    """As a CUDA event, on the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _HostEvent) -> float:
        return max(1e-3, 1e3 * (later.at - self.at))


def event() -> Any:
    """A mark in the queue of the device; ``a.elapsed_time(b)`` are the milliseconds between two."""
    return _HostEvent() if is_rehearsed() else torch.cuda.Event(enable_timing=True)


def spin(cycles: int) -> None:
    """Keep the device busy for so many of its cycles."""
    if not is_rehearsed():
        torch.cuda._sleep(cycles)


def synchronize() -> None:
    """Wait for the device; what failed on it raises here."""
    if not is_rehearsed():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give memory that no tensor holds back to the device."""
    if not is_rehearsed():
        torch.cuda.empty_cache()


def cache_bytes() -> int:
    """Of the L2."""
    return 0 if is_rehearsed() else torch.cuda.get_device_properties().L2_cache_size


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest memory beside what is held before the call; 0 in a rehearsal."""
    if is_rehearsed():
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
