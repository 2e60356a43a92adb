"""The emulator in the place of the GPU, under Triton's own launcher: a driver whose device executes PTX.

    with emulated(seed=1) as session:
        triton_kernels.launch_loss(logits, ...)     # CPU tensors
    session.faults, session.launches

Triton chooses the variant (types, divisibility by 16, ones, constants), compiles it to PTX and launches it,
as it would for a GPU of that capability; nothing here knows a kernel's signature. Triton must not have been
imported with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ptx.contents import Contents, mark
from ptx.machine import Machine
from ptx.memory import Memory, Segment

SHARED_BYTES = 99 * 1024  # of a block, on the device that has the least: sm_86 and sm_89


@dataclass
class Launch:
    """What one launch did."""

    kernel: str
    grid: tuple[int, ...]
    variant: str  # types and constants of its arguments
    faults: Counter  # (kind, segment, where) -> bytes
    traffic: Counter  # (segment, "load" or "store", bytes wide, "bytes", "sectors" or "instructions") -> n
    touched: dict[
        str, tuple[int, int, int, int]
    ]  # segment -> bytes and sectors read, and written, once each
    instructions: int  # of warps
    threads: int  # of a block
    seconds: float


@dataclass
class Session:
    """All launches made while it lasts.

    Attributes:
        overwrites: tensors from before it that may be written; all others must stay as they are.
        change: what to make of a kernel's PTX before it runs, by its name: to seed a fault.
    """

    capability: int = 90
    seed: int | None = None
    nudge: int = 0
    overwrites: tuple[Tensor, ...] = ()
    change: Callable[[str, str], str] | None = None
    launches: list[Launch] = field(default_factory=list)
    contents: Contents = field(default_factory=Contents)

    @property
    def faults(self) -> Counter:
        """(kernel, kind, segment, where) -> bytes; of the host's operations too."""
        found = Counter({("host", *key): count for key, count in self.contents.faults.items()})
        for launch in self.launches:
            for key, count in launch.faults.items():
                found[(launch.kernel, *key)] += count
        return found


class EmulatedDriver:
    """What Triton asks of a driver; one session's."""

    def __init__(self, session: Session):
        self.session = session
        self.utils = self

    # Kernels are kept by device: each capability is one of its own.
    def get_current_device(self) -> int:
        return self.session.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.session.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        return None, (binary.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        return lambda *launch: _launch(source, *launch)


# A loaded kernel outlives the session in which it was loaded.
_sessions: list[Session] = []
_machines: dict[tuple, Machine] = {}


def machine_of(ptx: str, shared: int, nudge: int) -> Machine:
    """The machine of a kernel, decoded once."""
    if (ptx, nudge) not in _machines:
        _machines[ptx, nudge] = Machine(ptx, shared, nudge)
    return _machines[ptx, nudge]


def _as_ptx(backend=None, stages=None, *_):
    """Triton's hook into the stages of a compilation: the last, which assembles, is left out."""
    if stages is None:
        return "ptx", "ptx"
    if "cubin" in stages:
        stages["cubin"] = lambda text, metadata: text.encode()
    return None


@contextlib.contextmanager
def emulated(**options) -> Iterator[Session]:
    """Inside, every launch of a Triton kernel is executed here; ``options`` are the session's."""
    session = Session(**options)
    runtime, driver = triton.knobs.runtime, triton.runtime.driver
    before = driver._active, runtime.add_stages_inspection_hook, triton.knobs.cache.dir
    # Triton 3.6 would find what was assembled for a GPU: its cache does not ask for the hook.
    triton.knobs.cache.dir = str(Path(before[2]) / "ptx")
    driver.set_active(EmulatedDriver(session))
    runtime.add_stages_inspection_hook = _as_ptx
    _sessions.append(session)
    try:
        with session.contents:
            yield session
        session.contents.check_all_written()
    finally:
        _sessions.pop()
        driver._active, runtime.add_stages_inspection_hook, triton.knobs.cache.dir = before


def _flatten(kind, value, name: str) -> Iterator[tuple[str, object]]:
    """(name, value) of what the compiled kernel takes; constants have gone into its code."""
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for part_kind, part, part_name in zip(kind, value, names, strict=True):
            yield from _flatten(part_kind, part, f"{name}.{part_name}")
    elif kind != "constexpr":
        yield name, value


def _launch(
    source, x: int, y: int, z: int, stream, function, packed, metadata, enter, leave, *arguments
) -> None:
    session, (ptx, shared) = _sessions[-1], function
    begin, memory = time.perf_counter(), Memory()
    named = [
        pair
        for (name, kind), value in zip(source.signature.items(), arguments, strict=True)
        for pair in _flatten(kind, value, name)
    ]
    segments = _map(memory, [(n, v) for n, v in named if isinstance(v, Tensor)], session)
    passed = [_address(segments, v) if isinstance(v, Tensor) else v for _, v in named]
    if session.change is not None:
        ptx = session.change(source.fn.__name__, ptx)
    machine = machine_of(ptx, shared, session.nudge)
    before = machine.executed
    seed = None if session.seed is None else session.seed + len(session.launches)
    machine.launch((x, y, z), passed, memory, seed=seed)
    for start, segment in segments.items():
        session.contents.note_written(start, segment.was_written)
    session.launches.append(
        Launch(
            source.fn.__name__, (x, y, z), f"{source.signature} {source.constants}", memory.faults, memory.traffic,
            {segment.name: _touched(segment) for segment in memory.segments}, machine.executed - before,
            machine.threads, time.perf_counter() - begin,
        )
    )  # fmt: skip


def _map(memory: Memory, tensors: list[tuple[str, Tensor]], session: Session) -> dict[int, Segment]:
    """A segment for each storage, by its address: of its bytes only the tensors' elements are there."""
    segments: dict[int, Segment] = {}
    for name, tensor in tensors:
        start = tensor.untyped_storage().data_ptr()
        if start in segments:
            segments[start].name += f"={name}"
        else:
            memory.add(name, session.contents.bytes_of(tensor), start)
            segments[start] = memory.segments[-1]
            segments[start].readable[:] = segments[start].writable[:] = False
        mark(segments[start].readable, tensor)
        if session.contents.is_new(tensor):
            mark(segments[start].writable, tensor)
        session.contents.note_passed(tensor)
    for start, segment in segments.items():
        segment.readable &= session.contents.known(start)
    for tensor in session.overwrites:
        if (start := tensor.untyped_storage().data_ptr()) in segments:
            mark(segments[start].writable, tensor)
    return segments


def _address(segments: dict[int, Segment], tensor: Tensor) -> int:
    start = tensor.untyped_storage().data_ptr()
    return segments[start].base + tensor.data_ptr() - start


def _touched(segment: Segment) -> tuple[int, int, int, int]:
    figures = []
    for bytes_touched in (segment.was_read, segment.was_written):
        at = np.flatnonzero(bytes_touched)
        figures += [len(at), len(np.unique((at + segment.base) >> 5))]
    return tuple(figures)
