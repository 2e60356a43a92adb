"""Seed small faults in the loss kernels and the trainer, one at a time, and see that the tests notice each.

    python tests/mutants.py [NUMBER ...]

Not part of the default run (about twenty minutes on one core). Every fault is a replacement of text
in a copy of the repository; the run stops at the first test that fails. Exit code 1 if a fault
survives, or if its text is no longer there.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = [runpy.run_path(str(ROOT / room / "faults.py")) for room in ("tests/kernels", "tests/difftrain")]
# (file, what is wrong, text, replacement); all occurrences are replaced.
MUTANTS = [fault for faults in FAULTS for fault in faults["MUTANTS"]]
# Of each file, the tests that look for its faults, in order: a fault is killed by the first that fails.
STAGES = {file: stages for faults in FAULTS for file, stages in faults["STAGES"].items()}
# The test that should notice a fault whose description begins so, where it is not among the first.
HINTS = {start: hint for faults in FAULTS for start, hint in faults.get("HINTS", {}).items()}


def survives(file: str, fault: str, text: str, replacement: str) -> str:
    """The test that killed the fault, or an empty string."""
    hinted = [
        ["tests/kernels", "tests/difftrain", "-k", hint]
        for start, hint in HINTS.items()
        if fault.startswith(start)
    ]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "difftrain", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py"):  # which tests of the trainer read
            shutil.copy(ROOT / name, copy)
        source = copy / file
        source.write_text(source.read_text().replace(text, replacement))
        for stage in [*hinted, *STAGES[file]]:
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *stage],
                cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
            if run.returncode in (3, 4):  # pytest itself did not run: that kills nothing
                raise RuntimeError(run.stdout[-500:] + run.stderr[-500:])
            if run.returncode not in (0, 5):  # 5: no test has that name
                failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return failed[0].split(" - ")[0].split("::")[-1] if failed else f"exit {run.returncode}"
    return ""


def main() -> int:
    chosen = [int(argument) for argument in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DIFFTRAIN_TEST_CACHE"] = cache  # the runs compile alike, but for the fault
        return run_all(chosen)


def run_all(chosen: Sequence[int]) -> int:
    alive = 0
    for number in chosen:
        file, fault, text, replacement = MUTANTS[number - 1]
        begin = time.monotonic()
        if text not in (ROOT / file).read_text():
            verdict = "GONE"
        else:
            killer = survives(file, fault, text, replacement)
            verdict = f"killed by {killer}" if killer else "SURVIVED"
        alive += not verdict.startswith("killed")
        print(f"{number:3} {fault}: {verdict} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    return alive > 0


if __name__ == "__main__":
    sys.exit(main())
