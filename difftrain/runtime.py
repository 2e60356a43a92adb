"""Where a run computes: device, number format, and its place among the processes."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from difftrain.config import Config, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """One process's device and its rank; ``world_size`` is 1 without torchrun."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    local_rank: int
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
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the tensor's device; ``values`` may be overwritten."""
        if self.world_size == 1:
            return values
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.to(values.device)

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process; every process gets the same answer."""
        if self.world_size == 1:
            return flag
        return bool(self.sum_over_processes(torch.tensor(float(flag))) > 0)

    def shows_progress(self) -> bool:
        """Whether a progress bar makes sense: the main process on a terminal."""
        return self.is_main and sys.stderr.isatty()

    def peak_memory_mib(self) -> float:
        """Largest memory so far in MiB: of the CUDA allocator, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def resolve_device(name: str) -> torch.device:
    """The device that the option ``device`` names; "auto" takes CUDA, then mps, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UserError(f"device {name} is not available here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device must be one of {torch.cuda.device_count()} CUDA devices, got {name}")
    return device


def start_runtime(config: Config) -> Runtime:
    """Join the processes that torchrun started, if any, and choose device and number format."""
    device = resolve_device(config.device)
    rank, local_rank, world_size = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if config.gradient_accumulation_steps % world_size:
        raise UserError(
            f"gradient_accumulation_steps must be a multiple of the {world_size} processes, "
            f"got {config.gradient_accumulation_steps}"
        )
    if world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local_rank)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = config.dtype
    if dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return Runtime(device, DTYPES[dtype], rank, local_rank, world_size)


def stop_runtime(runtime: Runtime) -> None:
    """Leave the process group."""
    if runtime.world_size > 1:
        dist.destroy_process_group()


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it, Ctrl-C or SIGTERM only asks for a stop; a second one stops at once."""
    stop = StopRequest()

    def request(signum: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
