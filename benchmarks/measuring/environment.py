"""What figures depend on: device, driver, versions, commit, date, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata

import torch

from measuring import device
from measuring.checkout import ROOT, kernels_digest

PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy")


def environment(commit: str | None = None) -> dict[str, str]:
    """Names and values, the most telling first.

    Args:
        commit: what to say where git cannot tell, as in a copy without its folder.
    """
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": device.name(),
        "driver": driver.partition("\n")[0],
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit or _commit(),
        "kernels": kernels_digest(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PEERS},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit + (" with changes" if changes not in ("", "unknown") else "")


def _output(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
