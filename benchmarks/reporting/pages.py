"""Pages of which a part is written by a program, between two markers that readers do not see."""

from __future__ import annotations

from pathlib import Path

from reporting.result_files import ResultError


def updated(page: str, begin: str, end: str, part: str, name: str = "the page") -> str:
    """The page with ``part`` between its markers; raises ResultError where it lacks them."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ResultError(f"{name} lacks the markers {begin} and {end}")
    return f"{before}{begin}\n{part}\n{end}{after}"


def put_between(path: Path, begin: str, end: str, part: str) -> None:
    """Write ``part`` into the file between its markers."""
    page = path.read_text(encoding="utf-8")
    path.write_text(updated(page, begin, end, part, path.name), encoding="utf-8")
