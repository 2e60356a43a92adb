"""Tests of the suite in a process of their own, counted from its log even where it does not finish."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from measuring.checkout import ROOT
from measuring.supervision import run_command

# Tests by what breaks first where the kernels do not fit a device. Of a folder, all that no other step names.
KERNEL_TESTS = [
    f"tests/kernels/{name}.py"
    for name in (
        "test_triton_kernels", "test_logits_loss", "test_kernel_terms", "test_kernel_sums",
        "test_kernel_rows_in_place", "test_upstream_prediction", "test_positions", "test_weight_sums",
        "test_grad_accumulation",
    )
] + ["tests/kernels"]  # fmt: skip
COMPILE_TESTS = [f"tests/kernels/{name}.py" for name in ("test_compile", "test_cuda_graphs")]
LINEAR_TESTS = [f"tests/kernels/{name}.py" for name in ("test_linear_loss", "test_terms_fused")]
TRAINER_TESTS = [f"tests/difftrain/{name}.py" for name in ("test_runtime", "test_waits")] + [
    "tests/difftrain",
    "tests/examples",
]
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# `tests/a.py::b PASSED [ 3%]`, or from several processes `[gw0] [ 3%] PASSED tests/a.py::b`.
LINE = re.compile(
    rf"^(?:\[gw\d+\] \[ *\d+%\] (?P<early>{OUTCOMES}) (?P<late_name>\S.*?)|"
    rf"(?P<name>\S+::.*?) (?P<outcome>{OUTCOMES})(?: .*)?)\s*$"
)

SUMMARY = re.compile(r"^(?:FAILED|ERROR) (?P<name>\S+?\.py::.*?) - (?P<why>.*)$")
GRACE = 20.0  # seconds that pytest gets to print its summary
FREE_CORES = 2  # for the device's own threads, and for whoever waits


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


def read_summary(text: str) -> dict[str, str]:
    """Why tests failed, by name, as far as pytest came to print its short summary."""
    return {match["name"]: match["why"] for match in map(SUMMARY.match, text.splitlines()) if match}


def run_suite(
    seconds: float, arguments: list[str] | None = None, paths: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the default suite, or some of its files; record counts, failures and whether it came to its end.

    Args:
        seconds: ends it after this long; what had been tested by then is counted.
        arguments: for pytest, in place of a process for each core but two where pytest-xdist is installed.
        paths: of tests, from the repository's root; a file that others hold too is left out with ``--ignore=``.
    """
    if arguments is None:
        processes = max(1, (os.cpu_count() or 1) - FREE_CORES)
        has_xdist = importlib.util.find_spec("xdist") is not None
        arguments = ["-p", "xdist.plugin", "-n", str(processes)] if has_xdist else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=--strict-markers --import-mode=importlib -m 'not slow'",
        "-W",
        "default",  # of versions that nobody has tried; what they warn of is no failure here
        "-v",
        "-rfE",
        "--color=no",
        "--tb=short",
        *arguments,
        *paths,
    ]
    began = time.perf_counter()
    # Other plugins that lie there have warnings and options of their own.
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "400"}
    code, text = run_command(command, seconds, cwd=ROOT, environment=alone, grace=GRACE)
    counts, failed = read_log(text)
    took = time.perf_counter() - began
    words = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no test run"
    ending = "" if code is not None else ", not finished"
    return {
        "ok": code == 0,
        "summary": f"{words} in {took:.0f} s{ending}",
        "counts": counts,
        "failed": failed,
        "reasons": read_summary(text),
        "exit_code": code,
        "seconds": took,
        "last_lines": [] if code == 0 else text.splitlines()[-400:],
    }
