"""Where a run computes: device, number format, and its place among the processes."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from difftrain import progress
from difftrain.config import Config
from difftrain.errors import FailedElsewhere, UserError, plain_text

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ONE_KEYSTROKE = 1.0  # seconds; torchrun passes on the Ctrl-C that the terminal sent to its processes too
Result = TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """One process's device and its rank; ``world_size`` is 1 without torchrun."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """The context in which the model computes."""
        if self.dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; the host waits for no copy."""
        if self.device.type == "cuda":  # from pageable memory the copy would wait for its turn
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def read_later(self, values: Tensor) -> Callable[[], list[float]]:
        """Begin to copy a vector to the host: a function that returns its numbers, and waits for it alone.

        What the device was given after this call goes on meanwhile.
        """
        if self.device.type != "cuda":
            return values.tolist
        copy, done = values.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
        done.record()

        def read() -> list[float]:
            done.synchronize()
            return copy.tolist()

        return read

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the tensor's device; ``values`` may be overwritten."""
        if self.world_size == 1:
            return values
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.to(values.device)

    def any_process(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any process; every process gets the same answer."""
        if self.world_size == 1:
            return list(flags)
        flags = torch.tensor(flags, dtype=torch.float32, device="cpu")
        return (self.sum_over_processes(flags) > 0).tolist()

    def main_first(self, action: Callable[[], Result]) -> Result:
        """The action's result, computed on the main process and then, unless it failed there, on the others."""
        if not self.is_main:
            self._stop_if_any(False)
            return action()
        try:
            result = action()
        except BaseException:
            self.any_process(True)
            raise
        self._stop_if_any(False)
        return result

    def _stop_if_any(self, failed: bool) -> None:
        if self.any_process(failed)[0]:
            raise FailedElsewhere("another process failed")

    def shows_progress(self) -> bool:
        """Whether a progress bar makes sense: the main process on a terminal."""
        return self.is_main and progress.is_shown()

    def peak_memory_mib(self) -> float:
        """Largest memory so far in MiB: of the CUDA allocator, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def resolve_device(name: str) -> torch.device:
    """The device that the option ``device`` names; "auto" takes CUDA, then mps, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return _with_number(torch.device("cuda"))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UserError(f"device {name} is not available here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device must be one of {torch.cuda.device_count()} CUDA devices, got {name}")
    return _with_number(device)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What the option ``dtype`` names; "auto" takes bfloat16 on a CUDA device that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    if plain_text("dtype", name) not in DTYPES:
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _with_number(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda" alone is refused by ``set_device`` and equals no tensor's device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 itself; torch also counts those on which it only emulates."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def start_runtime(config: Config) -> Iterator[Runtime]:
    """Within it, this process has its device, its number format and its place among torchrun's processes."""
    device = resolve_device(config.device)
    rank, local_rank, world_size = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    config.micro_batches(world_size)  # that they can be shared out
    if device.type == "cuda" and world_size > 1:
        device = torch.device("cuda", local_rank)
    dtype = resolve_dtype(config.dtype, device)
    with _deterministic() if config.deterministic else nullcontext():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        runtime = Runtime(device, dtype, rank, world_size)
        if world_size == 1 or dist.is_initialized():  # then the group is the caller's
            yield runtime
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield runtime
        except BaseException as error:
            # What still holds the group, such as a replica in a dead frame, must go first: freed after
            # the group it can wait for a thread of it for ever.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this is the process that speaks, before and after :func:`start_runtime` too."""
    return os.environ.get("RANK", "0") == "0"


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo says so in its text alone."""
    lost = ("closed by peer", "reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(words in str(error) for words in lost)


@contextmanager
def _deterministic() -> Iterator[None]:
    """One CPU thread (which thread adds what decides the last bit), and no algorithm that varies."""
    threads, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills, benchmarks = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # everything we allocate is written
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = benchmarks


@dataclass
class StopRequest:
    """Set by the first Ctrl-C, SIGTERM or SIGHUP."""

    requested_at: float | None = None  # seconds of the monotonic clock

    @property
    def requested(self) -> bool:
        return self.requested_at is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it, Ctrl-C, SIGTERM or SIGHUP only asks for a stop; a second one, a second later, stops at once.

    A SIGHUP that is ignored, as under nohup, stays so. Outside the main thread, which alone hears of signals,
    nothing is changed.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: Any) -> None:
        if stop.requested_at is None:
            stop.requested_at = time.monotonic()
        elif time.monotonic() - stop.requested_at > ONE_KEYSTROKE:
            if dist.is_initialized():  # an exception would wait for the others in a collective
                os._exit(130)
            raise KeyboardInterrupt

    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    previous = {s: signal.signal(s, request) for s in signals}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
