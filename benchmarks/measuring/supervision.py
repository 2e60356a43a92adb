"""Other processes, which may fail, crash, hang or run out of time without ending the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESTART = "restart"  # a worker's word that it goes, and that the next job wants a fresh process


def run_command(
    command: list[str],
    seconds: float,
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int | None, str]:
    """Exit code (None: ended after ``seconds``, with all that it started), and what it printed until then.

    Raises:
        OSError: it could not be started.
    """
    # Unbuffered, so that what was printed is there when a program must be ended.
    changes = {"PYTHONUNBUFFERED": "1"} | (environment or {})
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=os.environ | changes, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def run_jobs(
    work: Callable, jobs: Sequence, *, job_seconds: float, seconds: float
) -> Iterator[tuple[Any, Any, str]]:
    """(job, what the worker sent for it or None, why there is nothing) for each job in order.

    Args:
        work: called as ``work(jobs, connection)`` in a fresh process, with the jobs still to be
            done. It sends one object per job, and RESTART where it gives up after one.
        job_seconds: a worker silent for longer is ended, and its job given up.
        seconds: the whole run's; jobs not done by then are given up.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    end = time.monotonic() + seconds
    left = list(jobs)
    while left and time.monotonic() < end:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(left, theirs))
        process.start()
        theirs.close()
        try:
            while left:
                given_up = _wait(ours, min(job_seconds, end - time.monotonic()))
                message = None
                if not given_up:
                    try:
                        message = ours.recv()
                    except EOFError:
                        process.join()
                        given_up = f"crashed: {_exit_of(process.exitcode)}"
                elif time.monotonic() >= end:
                    break
                if message == RESTART:
                    break
                yield left.pop(0), message, given_up
                if given_up:
                    break
        finally:
            process.kill()
            process.join()
            ours.close()
    for job in left:
        yield job, None, f"not measured: the run's {seconds:g} s were over"


def _wait(connection: Any, seconds: float) -> str:
    return "" if connection.poll(max(0.0, seconds)) else f"hung: no answer in {seconds:.0f} s"


def _exit_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
