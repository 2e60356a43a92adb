"""Tests of the suite in a process of their own, counted from its log even where it does not finish."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from measuring.checkout import ROOT
from measuring.supervision import run_command

OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# `tests/a.py::b PASSED [ 3%]`, or from several processes `[gw0] [ 3%] PASSED tests/a.py::b`.
LINE = re.compile(
    rf"^(?:\[gw\d+\] \[ *\d+%\] (?P<early>{OUTCOMES}) (?P<late_name>\S.*?)|"
    rf"(?P<name>\S+::.*?) (?P<outcome>{OUTCOMES})(?: .*)?)\s*$"
)


def read_log(text: str) -> tuple[dict[str, int], list[str]]:
    """How many tests came to each outcome, and the names of those that failed."""
    counts: Counter[str] = Counter()
    failed = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match:
            outcome = (match["early"] or match["outcome"]).lower()
            counts[outcome] += 1
            if outcome in ("failed", "error"):
                failed.append(match["late_name"] or match["name"])
    return dict(counts), failed


def run_suite(
    seconds: float, arguments: list[str] | None = None, paths: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the default suite, or some of its files; record counts, failures and whether it came to its end.

    Args:
        seconds: ends it after this long; what had been tested by then is counted.
        arguments: for pytest, in place of several processes where pytest-xdist is installed.
        paths: of tests, from the repository's root; a file that others hold too is left out with ``--ignore=``.
    """
    if arguments is None:
        arguments = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=--strict-markers -m 'not slow'",
        "-v",
        "--color=no",
        *arguments,
        *paths,
    ]
    began = time.perf_counter()
    code, text = run_command(command, seconds, cwd=ROOT)
    counts, failed = read_log(text)
    took = time.perf_counter() - began
    words = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no test run"
    ending = "" if code is not None else ", not finished"
    return {
        "ok": code == 0,
        "summary": f"{words} in {took:.0f} s{ending}",
        "counts": counts,
        "failed": failed,
        "exit_code": code,
        "seconds": took,
        "last_lines": [] if code == 0 else text.splitlines()[-60:],
    }
