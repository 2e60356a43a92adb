"""The checkout that the benchmarks lie in: what they measure is its code, installed or not.

Every program imports this before our packages. Worker processes inherit the path.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (str(ROOT), str(ROOT / "kernels"))
sys.path[:0] = SOURCES


def kernels_digest(root: Path = ROOT) -> str:
    """Of every source file below kernels/, its path and its text: figures of other kernels have another one."""
    digest = hashlib.sha256()
    for path in sorted((root / "kernels").rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
