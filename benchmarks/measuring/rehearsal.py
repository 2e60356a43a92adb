"""A rehearsal of a GPU session: the same steps on the CPU with tiny shapes, killed at random moments.

It finds what would fail for other reasons than the GPU. Its times mean nothing; the file it writes says
what it is, and is refused wherever figures are shown.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Set where a session is rehearsed, to the id of who rehearses; processes that it starts inherit it.
REHEARSAL = "DIFFTRAIN_REHEARSAL"
REHEARSED = "rehearsal on the CPU"  # in place of a device's name
STAND_IN_SANITIZER = """#!/bin/sh
tool=$2
shift 4
"$@" && case $tool in
racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
*) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


def is_rehearsed() -> bool:
    """Whether nothing is measured here: a session is tried out without a GPU."""
    return bool(os.environ.get(REHEARSAL))


def write_sanitizer(folder: Path) -> Path:
    """A program in place of compute-sanitizer, which runs what it is given and finds nothing."""
    path = folder / "compute-sanitizer"
    path.write_text(STAND_IN_SANITIZER, encoding="utf-8")
    path.chmod(0o755)
    return path


def run_with_cuts(
    command: list[str],
    file: Path,
    cuts: int,
    *,
    longest: float,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Run a session's command until it ends by itself, killed ``cuts`` times before.

    Args:
        command: what is started, and started again after each kill.
        file: the results file that it writes.
        longest: seconds after which a kill comes at the latest; when exactly is random.

    Returns:
        What was wrong: a file that cannot be read, a record that was there and is gone or changed, or a
        process that outlived the session; and a last run that did not end with 0.
    """
    moments, wrong, kept = random.Random(seed), [], {}
    environment = os.environ | {REHEARSAL: str(os.getpid())}
    left = cuts
    while True:
        seconds = moments.uniform(0, longest) if left else None
        began, process = time.monotonic(), subprocess.Popen(command, env=environment)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # it alone: what it started must end with it
            code = process.wait()
        wrong += [f"after a kill {pid} ran on" for pid in _left_over()]
        try:
            found = _finished(file)
        except ValueError as error:
            return [*wrong, f"{file.name} cannot be read: {error}"]
        wrong += [
            f"the record of {name} is not what it was" for name in kept if found.get(name) != kept[name]
        ]
        kept = found
        if code != -signal.SIGKILL or not left:
            return wrong if code == 0 else [*wrong, f"it ended with {code}"]
        left -= 1
        say(
            f"cut {cuts - left} of {cuts}, after {time.monotonic() - began:.1f} s: {len(found)} steps are recorded"
        )


def _finished(file: Path) -> dict[str, Any]:
    """The records of the steps that came to their end."""
    if not file.exists():
        return {}
    stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
    return {name: record for name, record in stages.items() if "ok" in record}


def _left_over(patience: float = 300.0) -> list[int]:
    """Processes of a rehearsal that are still there although its session is not, after some patience.

    A compiler's worker looks for its parent only once it has imported torch, which a busy machine makes long.
    """
    until = time.monotonic() + patience
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                is_ours = f"{REHEARSAL}={os.getpid()}".encode() in path.read_bytes().split(b"\0")
            except OSError:  # gone meanwhile, or somebody else's
                continue
            if is_ours and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)
