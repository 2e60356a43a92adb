"""Sessions: when a run was started, on what, and how that ended. A run that is resumed has several."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from difftrain import __version__

FILE = "sessions.jsonl"


@contextlib.contextmanager
def session(run_dir: Path, facts: dict[str, Any], step_of: Callable[[], int]) -> Iterator[None]:
    """Within it the run goes on; its start and its end are each a line of ``sessions.jsonl``.

    They are no records of ``metrics.jsonl``, which is the same for a run that was stopped and resumed.

    Args:
        run_dir: the run's folder.
        facts: what the run computes on and with.
        step_of: gives the steps done so far.
    """
    start = {"event": "start", "step": step_of(), "pid": os.getpid(), "host": socket.gethostname()}
    _append(run_dir, start | _versions() | facts)
    how = "ended"
    try:
        yield
    except BaseException as error:
        how = " ".join(f"{type(error).__name__}: {error}".split())
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk, which the run itself tells of
            _append(run_dir, {"event": "end", "step": step_of(), "how": how})


def read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    """All starts and ends, oldest first; what is no such line is passed over."""
    try:
        lines = (run_dir / FILE).read_bytes().splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("event") in ("start", "end"):
                entries.append(entry)
    return entries


def is_gone(entries: list[dict[str, Any]]) -> bool:
    """Whether the process of the last start is seen to be gone without an end: killed, on this machine."""
    if not entries or entries[-1]["event"] == "end":
        return False
    pid, host = entries[-1].get("pid"), entries[-1].get("host")
    if type(pid) is not int or pid < 1 or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)  # signal 0: nothing is sent
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def processor() -> str:
    """The processor's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(named or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    versions = {
        "difftrain": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in ("torch", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _append(run_dir: Path, entry: dict[str, Any]) -> None:
    with (run_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry | {"time": round(time.time(), 3)}) + "\n")
