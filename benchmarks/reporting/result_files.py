"""The results file: one JSON document per GPU and day, filled stage by stage.

    {"format": 1, "environment": {...}, "stages": {"loss": {"environment": {...}, ...}, ...}}

Each stage keeps the environment it was made in. A document with ``"sample": true`` is made up, for
tests; nothing shown to a reader may come from one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from measuring.checkout import ROOT

FOLDER = ROOT / "benchmarks" / "results"
FORMAT = 1


class ResultError(ValueError):
    """A results file that cannot be used; its message is one line."""


def default_path(environment: dict[str, str]) -> Path:
    """results/<gpu>-<date>.json."""
    gpu = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return FOLDER / f"{gpu}-{environment['date'][:10]}.json"


def read_result(path: Path) -> dict[str, Any]:
    """A results file's document.

    Raises:
        ResultError: there is none, or it is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ResultError(f"no results file at {path}") from None
    except ValueError as error:
        raise ResultError(f"{path} is not valid JSON: {error}") from None
    is_whole = isinstance(document, dict) and {"format", "stages", "environment"} <= document.keys()
    if not is_whole or document["format"] != FORMAT or not isinstance(document["stages"], dict):
        raise ResultError(f"{path} is not a results file of format {FORMAT}")
    if "loss" in document["stages"] and "entries" not in document["stages"]["loss"]:
        raise ResultError(f"{path} has no entries in its stage loss")
    return document


def save_stage(path: Path, stage: str, record: dict[str, Any], environment: dict[str, str]) -> None:
    """Write a stage's record into the file, in place of an earlier one; other stages stay.

    Raises:
        ResultError: the file is something else, a sample, or another device's.
    """
    document = {"format": FORMAT, "environment": environment, "stages": {}}
    if path.exists():
        before = read_result(path)
        if before.get("sample"):
            raise ResultError(f"{path} is a sample; figures do not go into one")
        if before["environment"]["device"] != environment["device"]:
            raise ResultError(
                f"{path} holds figures of {before['environment']['device']}, these are of {environment['device']}"
            )
        document["stages"] = before["stages"]
    document["stages"][stage] = {"environment": environment, **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def newest(folder: Path = FOLDER) -> Path | None:
    """The results file with the latest date in its environment; samples and other files do not count."""
    dated = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = read_result(path)
        except ResultError:
            continue
        if not document.get("sample"):
            dated.append((document["environment"]["date"], path))
    return max(dated)[1] if dated else None
