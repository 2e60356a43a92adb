"""Where records go: ``metrics.jsonl``, W&B and TensorBoard; and how they are read back."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from difftrain.appearing import write_whole
from difftrain.config import Config
from difftrain.errors import UserError, import_extra

FILE = "metrics.jsonl"


def check_trackers(config: Config) -> None:
    """Raise UserError where a tracker is asked for and not installed."""
    if config.wandb_log:
        import_extra("wandb", "wandb")
    if config.tensorboard:
        import_extra("torch.utils.tensorboard", "tb")


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, where configured, to W&B and TensorBoard.

    A context manager. With ``is_writing`` false (every process but the main one) it does nothing.
    """

    def __init__(self, run_dir: Path, config: Config, *, is_writing: bool):
        self._file = self._wandb = self._tensorboard = None
        if not is_writing:
            return
        if config.wandb_log:
            wandb = import_extra("wandb", "wandb")
            name = config.wandb_run_name or run_dir.name
            self._wandb = wandb.init(project=config.wandb_project, name=name, dir=run_dir)
        if config.tensorboard:
            module = import_extra("torch.utils.tensorboard", "tb")
            self._tensorboard = module.SummaryWriter(str(run_dir / "tensorboard"))
        self._file = (run_dir / FILE).open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and the ``time`` in seconds since 1970; ``step`` and ``kind`` are among its keys.

        Non-finite numbers become null.
        """
        if self._file is None:
            return
        self._file.write(
            json.dumps(_finite_or_null(record) | {"time": round(time.time(), 3)}, allow_nan=False) + "\n"
        )
        self._file.flush()
        if self._wandb or self._tensorboard:
            scalars = dict(_flatten(f"{record['kind']}/", record))
            if self._wandb:
                self._wandb.log(scalars, step=record["step"])
            if self._tensorboard:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, record["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, oldest first; raises UserError when there are none.

    A line that is no record is passed over: a killed process may have left one unfinished.
    """
    path = run_dir / FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {FILE}")
    records = _read_records(path)
    if not records:
        raise UserError(f"{path} has no records yet")
    return records


def _read_records(path: Path) -> list[dict[str, Any]]:
    return list(filter(None, map(parse_record, path.read_bytes().splitlines())))


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record that a line of the file holds; None where it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record
    return record if is_record else None


def drop_records_after(run_dir: Path, step: int, *, is_evaluated: bool) -> None:
    """Forget the records that a run resumed at ``step`` will write again.

    Args:
        run_dir: the run's folder.
        step: steps done; later records go, and so does the training record of this step.
        is_evaluated: whether the evaluation of this step is done and stays.
    """
    path = run_dir / FILE
    if not path.is_file():
        return
    keep = [r for r in _read_records(path) if (r["step"], r["kind"] == "train") < (step, is_evaluated)]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in keep))


def _flatten(prefix: str, value: dict[str, Any]) -> list[tuple[str, float]]:
    pairs = []
    for key, item in value.items():
        if isinstance(item, dict):
            pairs += _flatten(f"{prefix}{key}/", item)
        elif isinstance(item, (int, float)):
            pairs.append((prefix + key, item))
    return pairs


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
