"""The checkout that the benchmarks lie in: what they measure is its code, installed or not.

Every program imports this before our packages. Worker processes inherit the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (str(ROOT), str(ROOT / "kernels"))
sys.path[:0] = SOURCES
