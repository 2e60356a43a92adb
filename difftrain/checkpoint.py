"""Checkpoints: a folder appears under its name only when complete, and is read only when unharmed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from difftrain.config import Config, UserError, is_run_folder
from difftrain.model import Transformer
from difftrain.vocabulary import Vocabulary, from_meta

WEIGHTS, STATE, CONFIG, DIGESTS = "model.safetensors", "state.pt", "config.json", "digests.json"
CONTENT = (WEIGHTS, STATE, CONFIG)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder.

    Attributes:
        folder: where it lies.
        step: optimiser steps taken.
        config: configuration of the run that wrote it.
        vocabulary: vocabulary of its data.
    """

    folder: Path
    step: int
    config: Config
    vocabulary: Vocabulary

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into ``model``; raises UserError where names or shapes differ."""
        try:
            load_model(model, self.folder / WEIGHTS)
        except (RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.folder} does not fit this model: {reason[:200]}") from None

    def load_state(self) -> dict[str, Any]:
        """Optimiser, scaler and bookkeeping, on the CPU; loading it executes no code."""
        return torch.load(self.folder / STATE, map_location="cpu", weights_only=True)

    def make_model(self, device: torch.device) -> Transformer:
        """The model with these weights, in evaluation mode."""
        model = Transformer(self.config, self.vocabulary.vocab_size)
        self.load_weights(model)
        return model.to(device).eval()


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    config: Config,
    vocabulary: Vocabulary,
    *,
    is_best: bool,
) -> Path:
    """Write ``checkpoints/step-N`` aside, flush it, rename it into place; then move the pointers.

    Older checkpoints go only after the new one has been read back and verified: the newest
    ``keep_checkpoints`` and the best one stay. On an error (disk full) nothing that was there
    before is touched and nothing half written stays.

    Args:
        run_dir: the run's folder.
        step: optimiser steps taken.
        model: its weights are written, shared ones once.
        state: what :meth:`Checkpoint.load_state` returns; tensors, containers and numbers.
        is_best: whether the pointer ``best`` moves here too.
    """
    home = run_dir / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(home)
    folder = home / f"step-{step:08d}"
    aside = home / f".writing-{folder.name}"
    description = {
        "step": step,
        "config": dataclasses.asdict(config),
        "vocabulary": vocabulary.to_meta(),
    }
    try:
        aside.mkdir()
        with _reason_from(aside / WEIGHTS):
            save_model(model, str(aside / WEIGHTS))
        with _reason_from(aside / STATE):
            torch.save(state, aside / STATE)
        (aside / CONFIG).write_text(json.dumps(description), encoding="utf-8")
        digests = {name: _digest(aside / name) for name in CONTENT}
        (aside / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        for name in (*CONTENT, DIGESTS):
            _flush(aside / name)
        _flush(aside)
        open_checkpoint(aside)
        if folder.exists():  # a fallback run comes by this step again
            folder.rename(home / f".old-{folder.name}")
        aside.rename(folder)
        _flush(home)
        _point(home, "latest", folder.name)
        if is_best:
            _point(home, "best", folder.name)
    finally:
        _remove_leftovers(home)
    kept = {read_pointer(home, "best"), read_pointer(home, "latest")}
    for old in _step_folders(home)[: -config.keep_checkpoints]:
        if old.name not in kept:
            shutil.rmtree(old)
    return folder


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder and read its description.

    Raises:
        UserError: a file is missing or does not match its digest; the message names it.
    """
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        for name in CONTENT:
            if _digest(folder / name) != digests[name]:
                raise UserError(f"{folder / name} is damaged: its digest does not match")
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return Checkpoint(
            folder,
            description["step"],
            Config(**description["config"]),
            from_meta(description["vocabulary"], str(folder / CONFIG)),
        )
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing, so {folder} is no whole checkpoint") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is damaged: {error!r}") from None


def find_checkpoint(run_dir: Path, which: str) -> Checkpoint:
    """The checkpoint of a run by name: "latest", "best" or a step's number.

    Raises:
        UserError: not a run folder, no such checkpoint, or a damaged one.
    """
    home = run_dir / "checkpoints"
    if not is_run_folder(run_dir):
        raise UserError(f"{run_dir} is not a run folder")
    is_step = which.isascii() and which.isdecimal()
    name = f"step-{int(which):08d}" if is_step else read_pointer(home, which)
    if name is None or not (home / name).is_dir():
        known = ", ".join(str(int(p.name[5:])) for p in _step_folders(home)) or "none"
        raise UserError(f"{run_dir} has no checkpoint {which!r}; steps there: {known}")
    return open_checkpoint(home / name)


def find_newest_good(run_dir: Path) -> tuple[Checkpoint, list[str]]:
    """The newest unharmed checkpoint of a run, and why each newer one was passed over."""
    problems: list[str] = []
    _put_back_replaced(run_dir / "checkpoints")
    for folder in reversed(_step_folders(run_dir / "checkpoints")):
        try:
            return open_checkpoint(folder), problems
        except UserError as error:
            problems.append(str(error))
    reason = f": {problems[0]}" if problems else ""
    raise UserError(f"{run_dir} has no checkpoint to resume from{reason}")


def read_pointer(home: Path, name: str) -> str | None:
    """The folder name that ``latest`` or ``best`` points to; None without a valid one."""
    try:
        target = (home / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return target if target.startswith("step-") and Path(target).name == target else None


def _step_folders(home: Path) -> list[Path]:
    return sorted(p for p in home.glob("step-*") if p.is_dir())


def _point(home: Path, name: str, target: str) -> None:
    aside = home / f".writing-{name}"
    aside.write_text(target + "\n", encoding="utf-8")
    _flush(aside)
    aside.replace(home / name)
    _flush(home)


def _remove_leftovers(home: Path) -> None:
    """Remove what a killed or failed save left."""
    _put_back_replaced(home)
    for leftover in [*home.glob(".writing-*"), *home.glob(".old-*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _put_back_replaced(home: Path) -> None:
    """Put back a checkpoint that was moved away and whose replacement never came."""
    for old in home.glob(".old-*"):
        original = home / old.name.removeprefix(".old-")
        if not original.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                old.rename(original)


@contextlib.contextmanager
def _reason_from(path: Path) -> Iterator[None]:
    """Let a writer whose own error hides the reason fail with the file system's OSError."""
    try:
        yield
    except (safetensors.SafetensorError, RuntimeError):
        with path.open("ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        raise


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems refuse to flush a folder; the rename is still atomic there.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
