"""Kernels executed as compiled, by the emulator in a process of its own: this one's Triton interprets them."""

import atexit
import multiprocessing
import os
import pickle
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from waiting import PATIENCE


@dataclass
class Executed:
    """What a call returned, and what its launches did (``ptx.device.Launch``)."""

    result: Any
    launches: list
    faults: Counter  # (kernel, kind, segment, where) -> bytes


@dataclass(frozen=True)
class Change:
    """A fault: in the PTX of one kernel one match of a pattern replaced; each, where ``which`` is None."""

    kernel: str
    pattern: str
    replacement: str
    which: int | None = 0

    def __call__(self, kernel: str, ptx: str) -> str:
        if kernel != self.kernel:
            return ptx
        if self.which is None:
            return re.sub(self.pattern, self.replacement, ptx, flags=re.M)
        match = list(re.finditer(self.pattern, ptx, re.M))[self.which]
        return ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]


def execute(
    function, *arguments, overwrites=(), capability=90, seed=1, nudge=0, change=None, **keywords
) -> Executed:
    """Call a function of a module of tests/support; Triton's launches inside it run in the emulator.

    Args:
        overwrites: names of keywords whose tensors may be written; a store to any other's is a fault.
        seed: of the order in which warps and blocks go on.
        nudge: units by which approximate operations are off.
        change: a :class:`Change` of a kernel's PTX.
    """
    options = {"capability": capability, "seed": seed, "nudge": nudge, "change": change}
    call = pickle.dumps((function, arguments, keywords, overwrites, options))
    return pickle.loads(_process().submit(_execute, call).result(timeout=PATIENCE))


def run_clean(function, *arguments, seeds=(1, 2), **options) -> Executed:
    """The same, without any fault, and with the same bits whatever the order of the warps."""
    runs = [execute(function, *arguments, seed=seed, **options) for seed in seeds]
    for run in runs:
        # One value stored by several threads is what one thread would leave.
        found = {key: n for key, n in run.faults.items() if not key[1].startswith("equal store")}
        assert not found, found
    bits = {tuple(_bits(tensor) for tensor in _tensors(run.result)) for run in runs}
    assert len(bits) == 1, "the order of the warps shows in the result"
    return runs[0]


def _tensors(result):
    """All tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = vars(result).values() if hasattr(result, "__dict__") else result
    if isinstance(parts, (str, bytes)) or not hasattr(parts, "__iter__"):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _bits(tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def _process() -> ProcessPoolExecutor:
    """The process, once a session: it starts in seconds and keeps what it has compiled."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with a GPU, Triton would assemble for it
    try:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
        pool.submit(os.getpid).result(timeout=PATIENCE)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
        if devices is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def _execute(call: bytes) -> bytes:
    """In the other process."""
    from difftrain_kernels import triton_kernels, upstream_prediction
    from ptx.device import emulated

    # Calls that look for a GPU are content with the CPU, as where Triton interprets.
    triton_kernels.is_interpreted = lambda: True
    upstream_prediction._expectations.clear()  # what an earlier call has made is foreign to this one
    function, arguments, keywords, overwrites, options = pickle.loads(call)
    written = tuple(keywords[name] for name in overwrites)
    with emulated(overwrites=written, **options) as session:
        result = function(*arguments, **keywords)
    return pickle.dumps(Executed(result, session.launches, session.faults))
