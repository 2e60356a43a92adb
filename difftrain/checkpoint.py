"""Checkpoints: a folder appears under its name only when complete, and is read only when unharmed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from difftrain.config import Config, UserError, is_run_folder
from difftrain.model import Transformer
from difftrain.vocabulary import Vocabulary, from_meta

WEIGHTS, STATE, CONFIG, DIGESTS = "model.safetensors", "state.json", "config.json", "digests.json"
OPTIMIZER = (
    "optimizer"  # a folder of safetensors: one file, or one of each process where state is shared out
)
CONTENT = (WEIGHTS, STATE, CONFIG)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder. Nothing in it can execute code: it holds safetensors and JSON.

    Attributes:
        folder: where it lies.
        step: optimiser steps taken.
        config: configuration of the run that wrote it.
        vocabulary: vocabulary of its data.
        state: what else the run needs to go on as if never stopped.
    """

    folder: Path
    step: int
    config: Config
    vocabulary: Vocabulary
    state: dict[str, Any]

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into ``model``; raises UserError where names or shapes differ."""
        try:
            load_model(model, self.folder / WEIGHTS)
        except (RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.folder} does not fit this model: {reason[:200]}") from None

    def read_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors with the optimiser's saved ones of the same names; each process its own part.

        Raises UserError where they do not fit.
        """
        from torch.distributed import checkpoint, is_initialized

        saved: set[str] = set()
        for file in (self.folder / OPTIMIZER).iterdir():
            try:
                with safetensors.safe_open(file, "pt") as content:
                    saved |= set(content.keys())
            except safetensors.SafetensorError as error:
                raise UserError(f"{file} does not fit this model: {error}") from None
        if saved != tensors.keys():
            other = min(saved ^ tensors.keys())
            raise UserError(
                f"{self.folder / OPTIMIZER} does not fit this model: only one of them has {other}"
            )
        reader = checkpoint.HuggingFaceStorageReader(str(self.folder / OPTIMIZER))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                checkpoint.load(tensors, storage_reader=reader, no_dist=not is_initialized())
            except checkpoint.CheckpointException as error:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"{self.folder / OPTIMIZER} does not fit this model: {reason}") from None

    def make_model(self, device: torch.device) -> Transformer:
        """The model with these weights, in evaluation mode."""
        model = Transformer(self.config, self.vocabulary.vocab_size)
        self.load_weights(model)
        return model.to(device).eval()


def save_checkpoint(
    run_dir: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    config: Config,
    vocabulary: Vocabulary,
    *,
    best_step: int | None,
) -> Path:
    """Write ``checkpoints/step-N`` aside, flush it, rename it into place; then move the pointers.

    Older checkpoints go only after the new one has been read back and verified: the newest
    ``keep_checkpoints`` and the best one stay. On an error (disk full) nothing that was there
    before is touched and nothing half written stays.

    Args:
        run_dir: the run's folder.
        step: optimiser steps taken.
        weights: the model's parameters by name, shared ones once; on the CPU.
        optimizer: its state, as :func:`difftrain.model.optimizer_tensors` gives it; on the CPU.
        state: what :attr:`Checkpoint.state` returns; containers, numbers and text.
        best_step: the step whose checkpoint the pointer ``best`` is to name; None leaves it as it is.
    """
    with writing_aside(run_dir, step) as aside:
        with _as_os_error():
            save_file(optimizer, aside / OPTIMIZER / "optimizer.safetensors")
        return complete_checkpoint(aside, weights, state, config, vocabulary, best_step=best_step)


@contextlib.contextmanager
def writing_aside(run_dir: Path, step: int) -> Iterator[Path]:
    """A folder to write a checkpoint in; what is still in it afterwards is removed."""
    home = run_dir / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    aside = folder_aside(run_dir, step)
    try:
        (aside / OPTIMIZER).mkdir(parents=True)
        yield aside
    finally:
        remove_leftovers(run_dir)


def folder_aside(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return run_dir / "checkpoints" / f".writing-step-{step:08d}"


def write_shards(aside: Path, optimizer: dict[str, Tensor]) -> None:
    """Every process writes its part of the optimiser's state, which may consist of DTensors, to its own file."""
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(aside / OPTIMIZER), save_distributed=True)
    try:
        with _as_os_error():
            checkpoint.save(optimizer, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"the optimiser's state cannot be written: {reason}") from None


def complete_checkpoint(
    aside: Path,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    config: Config,
    vocabulary: Vocabulary,
    *,
    best_step: int | None,
) -> Path:
    """Add to the optimiser's state in ``aside`` everything else, verify it all and put it in its place."""
    home, name = aside.parent, aside.name.removeprefix(".writing-")
    description = {
        "step": _step_of(aside),
        "config": dataclasses.asdict(config),
        "vocabulary": vocabulary.to_meta(),
    }
    with _as_os_error():
        save_file(weights, aside / WEIGHTS)
    (aside / CONFIG).write_text(json.dumps(description), encoding="utf-8")
    (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
    files = _files(aside)
    for file in files:  # safetensors are written for their owner alone
        shutil.copymode(aside / CONFIG, aside / file)
    (aside / DIGESTS).write_text(_digests(aside, files), encoding="utf-8")
    for path in (*(aside / file for file in files), aside / DIGESTS, aside / OPTIMIZER, aside):
        _flush(path)
    open_checkpoint(aside)
    folder = home / name
    if folder.exists():  # a fallback run comes by this step again
        folder.rename(home / f".old-{name}")
    aside.rename(folder)
    _flush(home)
    _point(home, "latest", name)
    point_to_best(home, best_step)
    kept = {read_pointer(home, "best"), read_pointer(home, "latest")}
    # Newer ones than this were passed over as damaged: they must not take the places of good ones.
    until_here = [old for old in _step_folders(home) if _step_of(old) <= description["step"]]
    for old in until_here[: -config.keep_checkpoints]:
        if old.name not in kept:  # a kill while it goes must not leave half of it under its name
            _remove(old.rename(home / f".removed-{old.name}"))
    return folder


def point_to_best(home: Path, step: int | None) -> None:
    """Make the pointer ``best`` name this step's checkpoint, which a kill or a flipped bit may have undone."""
    name = None if step is None else f"step-{step:08d}"
    if name and name != read_pointer(home, "best") and (home / name).is_dir():
        _point(home, "best", name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder and read its description.

    Raises:
        UserError: a file is missing or does not match its digest; the message names it, and what to do.
    """
    remedy = "train --resume goes on from the checkpoint before it, sample --checkpoint STEP takes another"
    try:
        _verify(folder)
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if description["step"] != _step_of(folder):
            raise ValueError(f"step {description['step']}")
        return Checkpoint(
            folder,
            description["step"],
            Config(**description["config"]),
            from_meta(description["vocabulary"], str(folder / CONFIG)),
            dict(json.loads((folder / STATE).read_text(encoding="utf-8"))),
        )
    except _Damage as damage:
        raise UserError(f"{damage}; {remedy}") from None
    except UserError as error:
        raise UserError(f"{folder / CONFIG} does not fit this version of difftrain: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} does not fit this version of difftrain: {error!r}") from None


class _Damage(Exception):
    """A file of a checkpoint is not as it was written."""


def _verify(folder: Path) -> None:
    """Raise _Damage unless every file is there and has its digest."""
    try:
        stored = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or not stored.keys() >= set(CONTENT):
            raise ValueError
    except FileNotFoundError:
        raise _Damage(f"{folder / DIGESTS} is missing, so {folder.name} is no whole checkpoint") from None
    except (ValueError, RecursionError):
        raise _Damage(f"{folder / DIGESTS} is damaged") from None
    for file in sorted({*stored, *_files(folder)} - {DIGESTS}):
        path = folder / file
        if file not in stored:
            raise _Damage(f"{path} is not among the files of {folder.name}")
        if "\0" in file or not path.is_file():
            raise _Damage(f"{path} is missing, so {folder.name} is no whole checkpoint")
        if _digest(path) != stored[file]:
            raise _Damage(f"{path} is damaged: its digest does not match")


def _files(folder: Path) -> list[str]:
    """All files below a folder, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
        known = ", ".join(str(_step_of(p)) for p in _step_folders(home)) or "none"
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
    """The folder name that ``latest`` or ``best`` points to; None without an undamaged one."""
    try:
        text = (home / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    target = text.split(" ")[0]
    return target if text == _pointer_text(target) and Path(target).name == target else None


def _pointer_text(target: str) -> str:
    """A folder's name and a digest of it, so that a flipped bit does not lead to another step."""
    return f"{target} {hashlib.sha256(target.encode()).hexdigest()[:16]}\n"


def _step_folders(home: Path) -> list[Path]:
    """Checkpoints, oldest first; a user's own copies under other names are none of ours."""
    folders = (p for p in home.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir())
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(".writing-").removeprefix("step-"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _point(home: Path, name: str, target: str) -> None:
    aside = home / f".writing-{name}"
    aside.write_text(_pointer_text(target), encoding="utf-8")
    _flush(aside)
    aside.replace(home / name)
    _flush(home)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed or failed save left."""
    home = run_dir / "checkpoints"
    _put_back_replaced(home)
    for leftover in [*home.glob(".writing-*"), *home.glob(".old-*"), *home.glob(".removed-*")]:
        _remove(leftover)


def _put_back_replaced(home: Path) -> None:
    """Put back a checkpoint that was moved away and whose replacement never came."""
    for old in home.glob(".old-*"):
        original = home / old.name.removeprefix(".old-")
        if not original.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has done it
                old.rename(original)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Let a writer that hides the system's error in its own text fail with that error."""
    try:
        yield
    except BaseException as error:  # a CheckpointException is no Exception
        number = re.search(r"(?:os error |Errno )(\d+)", str(error))
        if number and not isinstance(error, OSError):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise


def _digests(folder: Path, files: list[str]) -> str:
    return json.dumps({file: _digest(folder / file) for file in files})


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
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
