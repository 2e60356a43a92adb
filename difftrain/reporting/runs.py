"""A run as its folder tells it: configuration, records, sessions, samples. Nothing here loads torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from difftrain.config import Config
from difftrain.config.sources import CONFIG_FILE, read_toml
from difftrain.errors import UserError
from difftrain.reporting.health import Health, HealthWarning
from difftrain.reporting.log import read_metrics
from difftrain.reporting.sessions import is_gone, read_sessions

LARGEST_STEP = 2**53  # what a script's numbers hold
MOST_SAMPLES, LONGEST_SAMPLE = 40, 4000  # texts, and characters of each
PLACES = ("out_dir", "wandb_run_name")  # options that name a run and make no difference to it


@dataclass(frozen=True)
class RunFolder:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        values: the options of ``config.toml`` as they stand there; empty where it cannot be read.
        records: of ``metrics.jsonl``, by step.
        sessions: starts and ends, oldest first.
    """

    path: Path
    values: dict[str, Any]
    records: list[dict[str, Any]]
    sessions: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.name or str(self.path.resolve())

    @cached_property
    def config(self) -> Config | None:
        """The configuration; None where this version does not know it."""
        return config_of(self.values)

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "train"]

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "eval"]

    @cached_property
    def warnings(self) -> list[HealthWarning]:
        health = Health(self.config)
        return [warning for record in self.records for warning in health.see(record)]

    @property
    def validation_ids(self) -> list[str]:
        """Ids of the validation sets that it was measured on, the last one last."""
        ids = [record["validation_id"] for record in self.records if "validation_id" in record]
        return list(dict.fromkeys(map(str, reversed(ids))))[::-1]

    @property
    def step(self) -> int:
        """Steps done, as far as the records tell."""
        return max([r["step"] + (r["kind"] == "train") for r in self.records], default=0)

    @property
    def changes(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        defaults = dataclasses.asdict(Config())
        return {key: value for key, value in self.values.items() if value != defaults.get(key)}

    @property
    def digest(self) -> str:
        """Of the configuration without the run's place and name: equal where runs are to be equal."""
        values = {key: value for key, value in self.values.items() if key not in PLACES}
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @property
    def state(self) -> str:
        """How far it is, in a word or two."""
        if self.config and any(record["step"] >= self.config.max_iters for record in self.evals):
            return "finished"
        if not self.sessions:
            return "not finished"
        if self.sessions[-1]["event"] == "end":
            how = str(self.sessions[-1].get("how", "ended"))
            return "stopped" if how == "ended" else f"ended by {how}"
        return "gone without an end" if is_gone(self.sessions) else "under way"

    @property
    def seconds(self) -> float | None:
        """Wall time of all sessions; None where it is not recorded."""
        total, began, last = 0.0, None, None
        times = [(time, 1, "") for r in self.records if (time := _time(r)) is not None]
        times += [(time, 0, e["event"]) for e in self.sessions if (time := _time(e)) is not None]
        for time, _, event in sorted(times):
            if event == "start":
                if began is not None:
                    total += last - began
                began = time
            last = time
            if event == "end" and began is not None:
                total, began = total + time - began, None
        if began is not None:
            total += last - began
        return total or None

    def samples(self) -> list[tuple[str, str]]:
        """Names and texts of what ``difftrain sample`` has kept, by step, the newest ones where there are many."""
        with contextlib.suppress(OSError):
            files = sorted(
                p for p in (self.path / "samples").iterdir() if p.suffix == ".txt" and p.is_file()
            )
            return [(p.stem, _beginning(p)) for p in files[-MOST_SAMPLES:]]
        return []


def read_run(run_dir: Path) -> RunFolder:
    """A run that is finished, stopped or under way; raises UserError where there are no records."""
    records = [record for record in read_metrics(run_dir) if 0 <= record["step"] < LARGEST_STEP]
    if not records:
        raise UserError(f"{run_dir} has no records yet")
    records.sort(key=lambda record: (record["step"], record["kind"] == "train"))
    return RunFolder(run_dir, read_values(run_dir), records, read_sessions(run_dir))


def read_values(run_dir: Path) -> dict[str, Any]:
    """The options that a run was saved with; none where they cannot be read."""
    try:
        return read_toml(run_dir / CONFIG_FILE)
    except (UserError, OSError):
        return {}


def config_of(values: dict[str, Any]) -> Config | None:
    """The configuration of these options; None where they are none."""
    if not values:
        return None
    try:
        return Config(**values)
    except (UserError, TypeError, ValueError):
        return None


def _time(entry: dict[str, Any]) -> float | None:
    time = entry.get("time")
    return float(time) if isinstance(time, (int, float)) and 0 <= time < LARGEST_STEP else None


def _beginning(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(LONGEST_SAMPLE + 1)
    return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " ..."
