"""The results file: one JSON document per GPU and day, filled stage by stage.

    {"format": 1, "environment": {...}, "stages": {"loss": {"environment": {...}, ...}, ...}}

Each stage keeps the environment it was made in, with the digest of the kernels; ``"begun"`` counts how
often each step of a session was begun that has not ended. Nothing shown to a reader may come from a document with
``"sample": true``, made up for tests, or ``"rehearsal": true``, made without a GPU, or of other kernels
than the checkout's.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from measuring.checkout import ROOT, kernels_digest
from measuring.rehearsal import REHEARSED

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
    document = _opened(path, environment)
    document["stages"][stage] = {"environment": environment, **record}
    if "ok" in record:
        document["begun"].pop(stage, None)
    _write(path, document)


def note_begun(path: Path, stage: str, environment: dict[str, str]) -> None:
    """Count that a step is begun, for whoever finds the file without its record.

    Raises:
        ResultError: as :func:`save_stage`.
    """
    document = _opened(path, environment)
    document["begun"][stage] = document["begun"].get(stage, 0) + 1
    _write(path, document)


def _opened(path: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The document to be written next, with what stands in the file."""
    document = {"format": FORMAT, "environment": environment, "begun": {}, "stages": {}}
    if environment["device"] == REHEARSED:
        document = {"rehearsal": True, **document}
    if path.exists():
        before = read_result(path)
        if before.get("sample"):
            raise ResultError(f"{path} is a sample; figures do not go into one")
        if before["environment"]["device"] != environment["device"]:
            raise ResultError(
                f"{path} holds figures of {before['environment']['device']}, these are of {environment['device']}"
            )
        document["stages"], document["begun"] = before["stages"], before.get("begun", {})
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all, whenever this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def current_stage(path: Path, stage: str, environment: dict[str, str]) -> dict[str, Any] | None:
    """A stage's record in the file where it is of the same kernels; None where there is none."""
    if not path.exists():
        return None
    record = read_result(path)["stages"].get(stage)
    return record if record and record["environment"].get("kernels") == environment["kernels"] else None


class Outdated(ResultError):
    """Every figure in a results file is of other kernels than the checkout's."""


def shown_stages(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The stages whose figures a reader may be shown as those of this checkout.

    Raises:
        Outdated: all of them are of other kernels.
        ResultError: the document is a sample or a rehearsal.
    """
    if document.get("sample"):
        raise ResultError(f"{name} is a sample: its figures are made up")
    devices = [part["environment"].get("device") for part in (document, *document["stages"].values())]
    if document.get("rehearsal") or REHEARSED in devices:
        raise ResultError(f"{name} is a rehearsal: its figures are no measurements")
    ours = kernels_digest()
    digests = {stage: r["environment"].get("kernels", "unknown") for stage, r in document["stages"].items()}
    current = {stage: record for stage, record in document["stages"].items() if digests[stage] == ours}
    if digests and not current:
        raise Outdated(f"{name} is of other kernels ({', '.join(set(digests.values()))}; these are {ours})")
    return current


def newest(folder: Path = FOLDER) -> Path | None:
    """The results file with the latest date in its environment; samples, rehearsals and other files do not count."""
    dated = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = read_result(path)
        except ResultError:
            continue
        if not (document.get("sample") or document.get("rehearsal")):
            dated.append((document["environment"]["date"], path))
    return max(dated)[1] if dated else None
