"""Other processes, which may fail, crash, hang or run out of time without ending the run."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESTART = "restart"  # a worker's word that it goes, and that the next job wants a fresh process
NOT_MEASURED = "not measured"  # how the reason begins why a job was not come to
PYTHON = sys.executable
# Runs a command in a process group of its own that ends with the process that started it, killed or not.
# The group stays in its session, so that whoever ends the session finds it.
LAUNCHER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from measuring.supervision import end_with
os.setpgid(0, 0)
end_with(int(sys.argv[2]))
os.execvp(sys.argv[3], sys.argv[3:])
"""
_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def end_with(parent: int) -> None:
    """Have Linux kill this process when its parent, of this id, ends; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL))
        if os.getppid() != parent:  # it ended before that
            os._exit(1)


def run_command(
    command: list[str],
    seconds: float,
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    grace: float = 0.0,
) -> tuple[int | None, str]:
    """Exit code (None: ended after ``seconds``, with all that it started), and what it printed until then.

    One that takes too long is interrupted as by Ctrl-C, and killed ``grace`` seconds later. On Linux it ends with this process too, so that a session that is killed leaves nothing that computes on.

    Raises:
        OSError: it could not be started.
    """
    # Unbuffered, so that what was printed is there when a program must be ended.
    changes = {"PYTHONUNBUFFERED": "1"} | (environment or {})
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no program {command[0]}")
    launcher = [PYTHON, "-c", LAUNCHER, str(Path(__file__).parents[1]), str(os.getpid())]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*launcher, *command], cwd=cwd, env=os.environ | changes, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            if grace:
                _interrupt(process, grace)
        finally:
            if process.poll() is None:
                _kill_group(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _interrupt(process: subprocess.Popen, grace: float) -> None:
    """Let it say what it has come to."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # the launcher had not come to make it
        process.kill()
    process.wait()


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
        process = context.Process(target=_work, args=(work, os.getpid(), left, theirs))
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
        yield job, None, f"{NOT_MEASURED}: the run's {seconds:g} s were over"


def _work(work: Callable, parent: int, jobs: list, connection: Any) -> None:
    end_with(parent)
    work(jobs, connection)


def run_alone(function: Callable[..., dict[str, Any]], seconds: float, *arguments: Any) -> dict[str, Any]:
    """A record that a function of a module returns, made in a process of its own: what it breaks, ends with it.

    Raises:
        RuntimeError: it raised, crashed, hung or took too long; the message says which.
    """
    ((_, answer, problem),) = run_jobs(_call, [(function, arguments)], job_seconds=seconds, seconds=seconds)
    if answer is None:
        raise RuntimeError(problem)
    record, failure = answer
    if failure:
        raise RuntimeError(failure)
    return record


def _call(jobs: list, connection: Any) -> None:
    for function, arguments in jobs:
        try:
            connection.send((function(*arguments), ""))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {error}"))


def _wait(connection: Any, seconds: float) -> str:
    return "" if connection.poll(max(0.0, seconds)) else f"hung: no answer in {seconds:.0f} s"


def _exit_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
