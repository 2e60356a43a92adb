"""compute-sanitizer over small launches: memory errors, and races in shared memory.

PyTorch's caching allocator is switched off, since it hands out pieces of large blocks, beyond whose
ends an access would pass as valid. racecheck sees shared memory alone.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import sysconfig
import time
from typing import Any

from measuring.checkout import ROOT
from measuring.supervision import run_command

TOOLS = ("memcheck", "racecheck")
PROGRAM = "stages.small_launches"
KEPT_LINES = 60  # of a report with errors


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, in a CUDA toolkit, or in an installed CUDA or Triton package."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    packages = sysconfig.get_paths()["purelib"]
    toolkits = [os.environ.get("CUDA_HOME", ""), *sorted(glob.glob("/usr/local/cuda*"), reverse=True)]
    candidates = [f"{toolkit}/bin/compute-sanitizer" for toolkit in toolkits if toolkit]
    candidates += [f"{toolkit}/compute-sanitizer/compute-sanitizer" for toolkit in toolkits if toolkit]
    for package in ("nvidia", "triton"):
        candidates += sorted(glob.glob(f"{packages}/{package}/**/compute-sanitizer", recursive=True))
    return next((c for c in candidates if os.path.isfile(c) and os.access(c, os.X_OK)), None)


def read_report(text: str) -> tuple[int | None, list[str]]:
    """Errors and hazards that the tool counts (None: it gave no summary), and its own lines."""
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if summary:
        return int(summary[1]), lines
    # racecheck counts warnings too: a hazard is one whatever its grade.
    summary = re.search(
        r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text
    )
    return (max(int(summary[1]), int(summary[2]) + int(summary[3])) if summary else None), lines


def run_tool(sanitizer: str, tool: str, seconds: float, program: list[str] | None = None) -> dict[str, Any]:
    """One tool over the small launches: its count, its report, and whether results were right."""
    program = program or [sys.executable, "-m", PROGRAM]
    command = [sanitizer, "--tool", tool, "--print-limit", "20", *program]
    began = time.perf_counter()
    try:
        code, text = run_command(
            command, seconds, cwd=ROOT / "benchmarks", environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )
    except OSError as error:
        return {"ok": False, "summary": f"could not be started: {error}"}
    if code is None:
        return {
            "ok": False,
            "summary": f"not finished in {seconds:.0f} s",
            "report": text.splitlines()[-20:],
        }
    errors, lines = read_report(text)
    checked = re.search(r"(\d+) results checked, (\d+) wrong", text)
    parts = ["no summary" if errors is None else f"{errors} errors"]
    parts.append(checked[0] if checked else "the program did not finish")
    ok = errors == 0 and bool(checked) and checked[2] == "0" and int(checked[1]) > 0
    return {
        "ok": ok,
        "summary": ", ".join(parts),
        "seconds": time.perf_counter() - began,
        "report": [] if ok else (lines or text.splitlines())[:KEPT_LINES],
    }


def run_sanitizer(seconds: float, sanitizer: str | None = None) -> dict[str, Any]:
    """Every tool in turn; where compute-sanitizer is missing, that is the record."""
    sanitizer = sanitizer or find_sanitizer()
    if sanitizer is None:
        return {"ok": False, "summary": "compute-sanitizer is not installed", "tools": {}}
    end = time.monotonic() + seconds
    tools = {}
    for i, tool in enumerate(TOOLS):  # each gets its share of what is left
        tools[tool] = run_tool(sanitizer, tool, max(1.0, (end - time.monotonic()) / (len(TOOLS) - i)))
    summary = "; ".join(f"{name}: {found['summary']}" for name, found in tools.items())
    return {"ok": all(found["ok"] for found in tools.values()), "summary": summary, "tools": tools}
