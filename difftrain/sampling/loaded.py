"""A trained model in hand: its logits, texts that it writes, texts that it repairs, and what it knows of a text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difftrain.checkpoints.exported import open_model
from difftrain.config import Config
from difftrain.config.paths import path_of
from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError, plain_text
from difftrain.evaluation.likelihood import ESTIMATORS
from difftrain.evaluation.of_text import EvaluationRequest, Subject, Text, evaluate_text
from difftrain.loss import bent_logits
from difftrain.model import Transformer
from difftrain.progress import quiet
from difftrain.runtime import Runtime
from difftrain.sampling.repairing import Repair, RepairRequest, repair
from difftrain.sampling.texts import SampleRequest, write_texts
from difftrain.sampling.writing import Writer, writer_of
from difftrain.schedule import reached_of


@dataclass(frozen=True)
class Loaded:
    """A trained model, as :func:`difftrain.load` gives it.

    Attributes:
        module: the model, in evaluation mode on its device.
        tokenizer: its words: ``encode(text)``, ``decode(ids)``, ``mask_id``, ``vocab_size``.
        config: of the run that trained it.
        step: optimiser steps that it was trained for.
        reached: how far its schedules had come that wait for a figure.
        dtype: in which :meth:`sample` and :meth:`repair` compute; the others do in the weights' own.
    """

    module: Transformer
    tokenizer: Vocabulary
    config: Config
    step: int
    reached: Mapping[str, list[int]] = field(default_factory=dict, repr=False)
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) fp32 of ids (B, T) int64, T <= block_size, on the ids' device, as training's loss saw them.

        Raises:
            UserError: the ids have another dtype or shape, or one is outside the vocabulary.
        """
        self._check(ids)
        logits_of = bent_logits(self.module, self.tokenizer.mask_id, self.config)
        return logits_of(ids.to(self._writer.device)).float().to(ids.device)

    def sample(
        self,
        n: int = 1,
        *,
        length: int | None = None,
        steps: int | None = None,
        policy: str = "",
        prompt: str = "",
        infill: str | None = None,
        gap_lengths: tuple[int, int] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        schedule: str | None = None,
        suspect: float | None = None,
        block_length: int | None = None,
        approximate: bool = False,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition: float = 1.0,
    ) -> list[str]:
        """``n`` texts, each with the prompt at its beginning, unchanged.

        The options are those of ``difftrain sample``. Text i depends on the seed and i alone (up to the rounding of
        matrix products, which is another one for another n), so that n = 1 and n = 8 share their first.

        Args:
            length: tokens a text, any number; None: block_size.
            steps: calls of ``module``, and no more; None: 64 a block_size of text, and one more for "fill".
            policy: which words a call writes; empty: "fill", or "confidence" after recipes llada and mdlm.
            infill: instead of a prompt, a text in which each run of four or more underscores is a gap of as many tokens, and
                each ``[[gap]]`` one whose length the model chooses, for each text anew.
            gap_lengths: the shortest and the longest that it may choose; None: 1 and 16.

        Raises:
            UserError: a number out of its range, an unknown policy, or a text that does not fit the model.
        """
        if infill is not None and prompt:
            raise UserError(
                "prompt and infill exclude each other: a gap text has its own words before the gap"
            )
        request = SampleRequest(
            prompt=prompt, infill=infill, gap_lengths=gap_lengths, length=length, num_samples=n, policy=policy, steps=steps,
            schedule=schedule, suspect=suspect, block_length=block_length, approximate=approximate, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition=repetition, seed=seed,
        )  # fmt: skip
        with quiet():
            return write_texts(self._writer, request)

    def repair(
        self,
        text: str,
        *,
        suspect: float = 0.5,
        sure: float = 0.9,
        max_changes: int | None = None,
        steps: int = 8,
        keep_unknown: bool = False,
        check: bool = False,
    ) -> Repair:
        """The text with the words written anew that the model thinks wrong: ``.text``, and ``.edits`` by position.

        The options are those of ``difftrain repair``.

        Args:
            suspect: the suspicion from which on a word is taken for wrong.
            sure: the probability from which on a new word takes the place of a suspect; 0: always.
            max_changes: so many suspects at most; None: all.
            steps: calls of ``module`` in which the words of one window are written.
            keep_unknown: leave characters outside the vocabulary as they are.
            check: only mark; the text stays.

        Raises:
            UserError: the model was not taught to find wrong words, or the text is not made of its words.
        """
        with quiet():
            return repair(
                self._writer, text, RepairRequest(suspect, sure, max_changes, steps, keep_unknown, check)
            )

    def evaluate(
        self,
        text: str,
        *,
        windows: int = 128,
        levels: Sequence[float] = (15.0, 50.0, 85.0),
        errors: Sequence[float] = (1.0, 5.0, 15.0),
        penalties: Sequence[tuple[float, float]] = (),
        estimators: Sequence[str] = ESTIMATORS,
        draws: int = 8,
        seed: int = 0,
        batch_size: int = 32,
    ) -> dict[str, Any]:
        """What the model knows of a text: the record of ``difftrain evaluate --json``, plain numbers.

        "loss" at several penalties, "masked" and "repair" by per cent, "likelihood" by estimator; docs/evaluation.md
        has each formula. The options are those of ``difftrain evaluate``.

        Args:
            text: taken as it is, line ends included.
            windows: so many pieces of block_size tokens, evenly spaced over the text; 0: all.
            levels, errors: per cent of a window's words that are masked, or replaced.
            penalties: (pk, pm) at which the loss is told beside the current, the final and none.
            estimators: of the bound on the likelihood, in diffusion mode.
            draws: maskings of each window in that bound.
            seed: of what is masked and replaced.
            batch_size: windows a pass.

        Raises:
            UserError: a number out of its range, or a text that is empty or not made of the model's words.
        """
        request = EvaluationRequest(
            windows=windows, levels=levels, errors=errors, penalties=penalties, estimators=estimators, draws=draws,
            seed=seed, batch_size=batch_size,
        )  # fmt: skip
        ids = np.array(self.tokenizer.encode(plain_text("text", text)), dtype=np.int64)
        subject = Subject(self.module, self.tokenizer, self.config, self.step, self.reached)
        runtime = Runtime(self._writer.device, self.module.head.weight.dtype, rank=0, world_size=1)
        with quiet():
            return evaluate_text(subject, Text("the text", ids), request, runtime)

    def _check(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise UserError(f"ids must be an int64 tensor, got {what}")
        if ids.dim() != 2 or ids.shape[1] > self.config.block_size:
            raise UserError(
                f"ids must have shape (B, T) with T at most block_size {self.config.block_size}, got {tuple(ids.shape)}"
            )
        size = self.tokenizer.vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise UserError(f"ids must be in 0 .. {size - 1}, got {int(ids.min())} .. {int(ids.max())}")

    @property
    def _writer(self) -> Writer:
        return Writer(self.module, self.tokenizer, self.config, self.dtype)


def load(
    run_or_folder: str | os.PathLike[str],
    checkpoint: str | int = "best",
    device: str = "auto",
    dtype: str = "auto",
) -> Loaded:
    """A trained model from a run, from one of its checkpoints, or from what ``difftrain export hf`` wrote.

    Nothing in a checkpoint can execute code, and its files are verified by their digests.

    Args:
        run_or_folder: a run's folder or :class:`difftrain.Run`; a checkpoint's folder, ``checkpoints/best`` or
            ``checkpoints/latest``, or one of ``Run.checkpoints``.
        checkpoint: of a run's folder: "best", "latest" or a step.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: what sampling and repair compute in: "float32", "bfloat16", "float16", "float64" (then the weights are fp64
            too), or "auto", which is bfloat16 on a CUDA device that has it, else float32.

    Raises:
        UserError: there is no such run, checkpoint, device or dtype, or the checkpoint is damaged.
    """
    found = open_model(path_of("run_or_folder", run_or_folder), str(checkpoint))
    try:
        reached = reached_of(found.state, found.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{found.folder} does not fit this version of difftrain: {error!r}") from None
    writer = writer_of(found, device, dtype)
    return Loaded(writer.module, found.vocabulary, found.config, found.step, reached, writer.dtype)
