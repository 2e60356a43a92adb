"""A run in hand, as its folder tells it: figures as columns, warnings, checkpoints and whether these are unharmed."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from difftrain.checkpoints.folder import damage_of, read_pointer, step_folders, step_of
from difftrain.config import Config
from difftrain.config.paths import path_of
from difftrain.config.sources import is_run_folder
from difftrain.errors import UserError
from difftrain.reporting.columns import Columns
from difftrain.reporting.runs import RunFolder, read_run, read_values
from difftrain.reporting.sessions import read_sessions


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint of a run; :func:`difftrain.load` takes it as it takes a path.

    Attributes:
        path: its folder.
        step: optimiser steps taken.
        is_best: whether it has the lowest loss at the final penalties.
        is_latest: whether it is the newest.
    """

    path: Path
    step: int
    is_best: bool
    is_latest: bool

    def __fspath__(self) -> str:
        return str(self.path)


class Run:
    """What a run's folder holds at the moment of asking, whether the run is finished, stopped or under way.

    Records, state and step are those of the moment at which ``Run(path)`` was called, so that columns fit each other;
    another ``Run(path)`` sees what came later. Lines of a record file that are no records are passed over. Nothing
    here loads torch. A run can be given to :func:`difftrain.load` in the place of its path.

    Attributes:
        path: the folder.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]):
        """Read a run.

        Args:
            path: its folder; ``~`` and variables are expanded.

        Raises:
            UserError: there is no run.
        """
        self.path = path_of("path", path)
        self._folder = _read(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.state}, {self.step} steps>"

    @cached_property
    def config(self) -> Config:
        """The configuration, with the folder as it is called now; ``train(run.config, resume=True)`` goes on.

        Raises:
            UserError: it is gone, or another version of difftrain wrote it.
        """
        config = self._folder.config
        if config is None:
            raise UserError(f"{self.path} has no configuration that this version of difftrain knows")
        return dataclasses.replace(config, out_dir=str(self.path))

    @property
    def state(self) -> str:
        """How far it is: "finished", "stopped", "under way", "gone without an end", "not finished" or "ended by ..."."""
        return self._folder.state

    @property
    def step(self) -> int:
        """Optimiser steps done, as far as the records tell."""
        return self._folder.step

    @cached_property
    def training(self) -> Columns:
        """The records of training steps, one every ``log_interval``: "step", "loss", "pk", "grad_norm", and so on."""
        return Columns(self._folder.train)

    @cached_property
    def evaluations(self) -> Columns:
        """The records of evaluations: "step", "loss", "loss_final", "nll", "masked_nll.15", and so on."""
        return Columns(self._folder.evals)

    @property
    def warnings(self) -> list[str]:
        """What the records show to be wrong, each once a line; docs/health.md says what to do."""
        return [str(warning) for warning in self._folder.warnings]

    @property
    def checkpoints(self) -> list[SavedCheckpoint]:
        """The checkpoints that are there now, oldest first."""
        home = self.path / "checkpoints"
        best, latest = (read_pointer(home, name) for name in ("best", "latest"))
        return [
            SavedCheckpoint(folder, step_of(folder), folder.name == best, folder.name == latest)
            for folder in step_folders(home)
        ]

    def verify(self) -> dict[int, str]:
        """What is wrong with a checkpoint's files, by its step; empty where all are there and have their digests.

        Every file is read. A checkpoint that a run under way removes meanwhile is none.
        """
        damages = {saved.step: _damage_of(saved.path) for saved in self.checkpoints}
        there = {saved.step for saved in self.checkpoints}
        return {step: damage for step, damage in damages.items() if damage and step in there}


def _read(path: Path) -> RunFolder:
    try:
        return read_run(path)
    except UserError:
        if not is_run_folder(path):
            raise UserError(f"{path} is not a run folder") from None
        return RunFolder(path, read_values(path), [], read_sessions(path))


def _damage_of(folder: Path) -> str:
    try:
        return damage_of(folder)
    except OSError as error:  # a file that cannot be read, or has just been removed
        return str(error)
