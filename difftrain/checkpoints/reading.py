"""Reading checkpoints: a folder is taken only when it is complete and unharmed."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from difftrain.checkpoints.folder import (
    CONFIG,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    damage_of,
    put_back_replaced,
    read_pointer,
    step_folders,
    step_of,
)
from difftrain.config import Config
from difftrain.config.sources import is_run_folder
from difftrain.data import Corpus, open_corpus
from difftrain.data.vocabulary import Vocabulary, from_meta
from difftrain.errors import UserError
from difftrain.model import Transformer


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

    @property
    def has_data_record(self) -> bool:
        """Whether it says what data it was trained on; those of earlier versions do not."""
        return isinstance(self.state.get("data"), dict)

    def changed_data(self, corpus: Corpus) -> list[str]:
        """What of a corpus is not as its run has read it: files, "dtype" or "vocabulary"."""
        recorded = self.state["data"] if self.has_data_record else {}
        changed = [key for key, value in corpus.record.items() if recorded.get(key, value) != value]
        has_other_words = corpus.vocabulary.to_meta() != self.vocabulary.to_meta()
        return [*changed, "vocabulary"] if has_other_words else changed

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into ``model``; raises UserError where names or shapes differ."""
        load_weights(model, self.folder)

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
        # The reader makes tensors on the default device, which is the program's.
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                checkpoint.load(tensors, storage_reader=reader, no_dist=not is_initialized())
            except checkpoint.CheckpointException as error:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"{self.folder / OPTIMIZER} does not fit this model: {reason}") from None

    def make_model(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Transformer:
        """The model with these weights, in evaluation mode; they are fp32, and fp64 where ``dtype`` is."""
        model = Transformer(self.config, self.vocabulary.vocab_size)
        self.load_weights(model)
        model.to(device).eval()
        return model.double() if dtype == torch.float64 else model


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a folder's weights into ``model``; raises UserError where names or shapes differ."""
    try:
        load_model(model, folder / WEIGHTS)
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} does not fit this model: {reason[:200]}") from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder and read its description.

    Raises:
        UserError: a file is missing or does not match its digest; the message names it, and what to do.
    """
    remedy = "train --resume goes on from the checkpoint before it, sample --checkpoint STEP takes another"
    if damage := damage_of(folder):
        raise UserError(f"{damage}; {remedy}")
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if description["step"] != step_of(folder):
            raise ValueError(f"step {description['step']}")
        return Checkpoint(
            folder,
            description["step"],
            Config(**description["config"]),
            from_meta(description["vocabulary"], str(folder / CONFIG)),
            dict(json.loads((folder / STATE).read_text(encoding="utf-8"))),
        )
    except UserError as error:
        raise UserError(f"{folder / CONFIG} does not fit this version of difftrain: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} does not fit this version of difftrain: {error!r}") from None


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
        known = ", ".join(str(step_of(p)) for p in step_folders(home)) or "none"
        raise UserError(f"{run_dir} has no checkpoint {which!r}; steps there: {known}")
    return open_checkpoint(home / name)


def find_newest_good(run_dir: Path) -> tuple[Checkpoint, list[str]]:
    """The newest unharmed checkpoint of a run, and why each newer one was passed over."""
    problems: list[str] = []
    put_back_replaced(run_dir / "checkpoints")
    for folder in reversed(step_folders(run_dir / "checkpoints")):
        try:
            return open_checkpoint(folder), problems
        except UserError as error:
            problems.append(str(error))
    reason = f": {problems[0]}" if problems else ""
    raise UserError(f"{run_dir} has no checkpoint to resume from{reason}")


def open_held_out(checkpoint: Checkpoint, *, is_change_allowed: bool) -> Corpus:
    """The corpus that a checkpoint's run was trained on, for its held-out text.

    Raises:
        UserError: it has another vocabulary; or it has changed since, and that is not allowed: then the text
            may not be held out.
    """
    name = checkpoint.config.data
    corpus = open_corpus(name)
    if corpus.vocabulary.to_meta() != checkpoint.vocabulary.to_meta():
        raise UserError(f"the data {name} has another vocabulary than the checkpoint")
    changed = set(checkpoint.changed_data(corpus)) - {"train.bin"}  # of which nothing is shown
    if changed and not is_change_allowed:
        raise UserError(
            f"the data {name} has changed since {checkpoint.folder.name}: {', '.join(sorted(changed))} in "
            f"{corpus.folder}, so this text may not be held out; --allow_changed_data takes it nevertheless"
        )
    return corpus
