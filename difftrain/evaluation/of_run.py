"""What ``difftrain evaluate`` tells of a run's checkpoint, on its held-out text or on any other."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from difftrain.checkpoints.exported import open_model
from difftrain.checkpoints.reading import Checkpoint, open_held_out
from difftrain.data import open_corpus
from difftrain.data.texts import NotText, decode_text, read_text
from difftrain.errors import UserError
from difftrain.evaluation.of_text import EvaluationRequest, Subject, Text, evaluate_text
from difftrain.runtime import start_runtime
from difftrain.schedule import reached_of


def evaluate_run(run_dir: Path, request: EvaluationRequest) -> dict[str, Any]:
    """The record of :func:`evaluate_text` for a run's checkpoint, and the run's path.

    Raises:
        UserError: not a run folder, no such checkpoint, or a text that the vocabulary does not hold.
    """
    checkpoint = open_model(run_dir, request.checkpoint)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = dataclasses.replace(
        checkpoint.config,
        device=request.device,
        dtype=request.dtype,
        gradient_accumulation_steps=world_size,
    )
    with start_runtime(config) as runtime:
        text = runtime.main_first(lambda: _open(checkpoint, request))
        model = checkpoint.make_model(runtime.device, runtime.dtype)
        reached = reached_of(checkpoint.state, checkpoint.config)
        subject = Subject(model, checkpoint.vocabulary, checkpoint.config, checkpoint.step, reached)
        return {"run": str(run_dir), **evaluate_text(subject, text, request, runtime)}


def _open(checkpoint: Checkpoint, request: EvaluationRequest) -> Text:
    vocabulary, name = checkpoint.vocabulary, request.data
    if not name:
        corpus = open_held_out(checkpoint, is_change_allowed=request.allow_changed_data)
        return Text(f"{checkpoint.config.data} (held-out part)", corpus.val, corpus)
    if name == "-" or Path(name).is_file():
        try:
            ids = vocabulary.encode(_read(name))
        except (NotText, UserError) as error:
            raise UserError(f"{name}: {error}") from None
        return Text(name, np.array(ids, dtype=np.int64))
    corpus = open_corpus(name)
    if corpus.vocabulary.to_meta() != vocabulary.to_meta():
        raise UserError(
            f"the data {name} has another vocabulary than the checkpoint; give its text as a file"
        )
    return Text(f"{name} (held-out part)", corpus.val)


def _read(name: str) -> str:
    if name != "-":
        return read_text(Path(name), "universal")
    if "WORLD_SIZE" in os.environ:
        raise UserError("standard input cannot be read by several processes; give a file")
    if sys.stdin is None:
        raise UserError("standard input is closed; give a file")
    return decode_text(sys.stdin.buffer.read(), "universal")
