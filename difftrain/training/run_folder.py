"""A run's folder: claiming it for a new run, and finding where to go on in an old one."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from difftrain.appearing import write_whole
from difftrain.checkpoints.reading import Checkpoint, find_newest_good
from difftrain.checkpoints.writing import remove_leftovers
from difftrain.config import Config
from difftrain.config.sources import CONFIG_FILE, is_run_folder
from difftrain.data import Corpus
from difftrain.errors import DISK_FULL, UserError
from difftrain.reporting.lines import REPORT
from difftrain.reporting.log import FILE
from difftrain.reporting.sessions import FILE as SESSIONS

RUN_ENTRIES = (
    FILE, SESSIONS, "checkpoints", "samples", "plots", "tensorboard", "wandb", REPORT, CONFIG_FILE,
)  # fmt: skip
LOCK = ".lock"
# What a run is to its end: the model, and what it learns to answer.
LASTING_KEYS = ("mode", "block_size", "n_layer", "n_head", "n_embd", "bias", "position", "recipe")


def check_run_dir(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError where a run must not be written: nothing is touched yet."""
    is_run = is_run_folder(run_dir)
    if is_run and not (resume or overwrite):
        raise UserError(
            f"out_dir {run_dir} already holds a run; give --resume, --overwrite or another out_dir"
        )
    if not is_run and run_dir.is_dir() and any(path.name != LOCK for path in run_dir.iterdir()):
        raise UserError(f"out_dir {run_dir} is not empty and not a run folder")


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Within it no other process writes this run's folder; raises UserError where one does."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"out_dir {run_dir} is not writable: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out_dir {run_dir} is in use by another process") from None
        except OSError:
            pass  # a file system without locks
        yield


def claim_run_dir(run_dir: Path, config: Config, *, resume: bool) -> None:
    """Make the folder and save the configuration; without ``resume``, remove what a run left there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if resume:
            remove_leftovers(run_dir)
        else:
            for entry in RUN_ENTRIES:
                path = run_dir / entry
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_whole(run_dir / CONFIG_FILE, config.to_toml())
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"out_dir {run_dir} is not writable: {error.strerror or error}") from None


def find_resume_point(run_dir: Path, config: Config, corpus: Corpus) -> tuple[Checkpoint, list[str]]:
    """The newest unharmed checkpoint and what was wrong with newer ones.

    Raises:
        UserError: there is none, or this configuration or data cannot go on from it.
    """
    checkpoint, problems = find_newest_good(run_dir)
    if checkpoint.vocabulary.n_words != corpus.vocabulary.n_words:
        raise UserError(
            f"{checkpoint.folder} was trained on another vocabulary of {checkpoint.vocabulary.n_words} words, "
            f"the data {config.data} has {corpus.vocabulary.n_words}"
        )
    if checkpoint.step > config.max_iters:
        raise UserError(
            f"max_iters must be at least the {checkpoint.step} steps done, got {config.max_iters}"
        )
    for key in LASTING_KEYS:
        was, now = getattr(checkpoint.config, key), getattr(config, key)
        if was != now:
            raise UserError(f"{key} must be {was!r} to resume {run_dir}, got {now!r}")
    return checkpoint, problems


def compare_data(checkpoint: Checkpoint, config: Config, corpus: Corpus, *, is_change_allowed: bool) -> str:
    """What is to be noted of the data that a run goes on with; empty where it is what it was.

    Raises:
        UserError: it has changed, and that is not allowed.
    """
    name = checkpoint.folder.name
    if changed := checkpoint.changed_data(corpus):
        what = f"the data {config.data} has changed since {name}: {', '.join(changed)} in {corpus.folder}"
        if not is_change_allowed:
            raise UserError(f"{what}; --allow_changed_data goes on with it as it is now")
        return what
    if not checkpoint.has_data_record:
        return f"{name} does not say what data it was trained on, so {config.data} is not compared with it"
    return ""
