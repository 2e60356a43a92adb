"""Writing checkpoints: a folder appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from difftrain.appearing import HALF, as_os_error, flush
from difftrain.checkpoints.folder import (
    CONFIG,
    DIGESTS,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    digest_of,
    files_below,
    folder_aside,
    pointer_text,
    put_back_replaced,
    read_pointer,
    step_folders,
    step_of,
)
from difftrain.checkpoints.reading import open_checkpoint
from difftrain.config import Config
from difftrain.data.vocabulary import Vocabulary


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
        with as_os_error():
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


def write_shards(aside: Path, optimizer: dict[str, Tensor]) -> None:
    """Every process writes its part of the optimiser's state, which may consist of DTensors, to its own file."""
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(aside / OPTIMIZER), save_distributed=True)
    try:
        with as_os_error():
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
        "step": step_of(aside),
        "config": dataclasses.asdict(config),
        "vocabulary": vocabulary.to_meta(),
    }
    with as_os_error():
        save_file(weights, aside / WEIGHTS)
    (aside / CONFIG).write_text(json.dumps(description), encoding="utf-8")
    (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
    files = files_below(aside)
    for file in files:  # safetensors are written for their owner alone
        shutil.copymode(aside / CONFIG, aside / file)
    (aside / DIGESTS).write_text(
        json.dumps({file: digest_of(aside / file) for file in files}), encoding="utf-8"
    )
    for path in (*(aside / file for file in files), aside / DIGESTS, aside / OPTIMIZER, aside):
        flush(path)
    open_checkpoint(aside)
    folder = home / name
    if folder.exists():  # a fallback run comes by this step again
        folder.rename(home / f".old-{name}")
    aside.rename(folder)
    flush(home)
    _point(home, "latest", name)
    point_to_best(home, best_step)
    kept = {read_pointer(home, "best"), read_pointer(home, "latest")}
    # Newer ones than this were passed over as damaged: they must not take the places of good ones.
    until_here = [old for old in step_folders(home) if step_of(old) <= description["step"]]
    for old in until_here[: -config.keep_checkpoints]:
        if old.name not in kept:  # a kill while it goes must not leave half of it under its name
            _remove(old.rename(home / f".removed-{old.name}"))
    return folder


def point_to_best(home: Path, step: int | None) -> None:
    """Make the pointer ``best`` name this step's checkpoint, which a kill or a flipped bit may have undone."""
    name = None if step is None else f"step-{step:08d}"
    if name and name != read_pointer(home, "best") and (home / name).is_dir():
        _point(home, "best", name)


def _point(home: Path, name: str, target: str) -> None:
    aside = home / f".writing-{name}"
    aside.write_text(pointer_text(target), encoding="utf-8")
    flush(aside)
    aside.replace(home / name)
    flush(home)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed or failed save left."""
    home = run_dir / "checkpoints"
    put_back_replaced(home)
    patterns = (".writing-*", ".old-*", ".removed-*")
    for leftover in [*run_dir.glob(f".*{HALF}"), *(path for each in patterns for path in home.glob(each))]:
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
