"""A trained model in hand: its logits, texts that it writes, and texts that it repairs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.checkpoints.exported import open_model
from difftrain.config import Config
from difftrain.config.paths import expand_path
from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError
from difftrain.loss import bent_logits
from difftrain.model import Transformer
from difftrain.progress import quiet
from difftrain.runtime import resolve_device
from difftrain.sampling.repairing import Repair, RepairRequest, repair
from difftrain.sampling.texts import SampleRequest, write_texts
from difftrain.sampling.writing import Writer


@dataclass(frozen=True)
class Loaded:
    """A trained model, as :func:`difftrain.load` gives it.

    Attributes:
        module: the model, in evaluation mode on its device.
        tokenizer: its words: ``encode(text)``, ``decode(ids)``, ``mask_id``, ``vocab_size``.
        config: of the run that trained it.
        step: optimiser steps that it was trained for.
    """

    module: Transformer
    tokenizer: Vocabulary
    config: Config
    step: int

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T) int64, T <= block_size, on the ids' device, as training's loss saw them."""
        logits_of = bent_logits(self.module, self.tokenizer.mask_id, self.config)
        return logits_of(ids.to(self._writer.device)).to(ids.device)

    def sample(
        self,
        n: int = 1,
        *,
        length: int | None = None,
        steps: int | None = None,
        policy: str = "",
        prompt: str = "",
        infill: str | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        schedule: str | None = None,
        suspect: float | None = None,
        block_length: int | None = None,
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
            infill: instead of a prompt, a text in which each run of four or more underscores is a gap of as many tokens.

        Raises:
            UserError: a number out of its range, an unknown policy, or a text that does not fit the model.
        """
        if prompt and infill is not None:
            raise UserError(
                "prompt and infill exclude each other: a gap text has its own words before the gap"
            )
        request = SampleRequest(
            prompt=prompt, infill=infill, length=length, num_samples=n, policy=policy, steps=steps,
            schedule=schedule, suspect=suspect, block_length=block_length, temperature=temperature, top_k=top_k,
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

    @property
    def _writer(self) -> Writer:
        return Writer(self.module, self.tokenizer, self.config)


def load(run_or_folder: str | os.PathLike, checkpoint: str | int = "best", device: str = "auto") -> Loaded:
    """A trained model from a run's folder, from the folder of one of its checkpoints, or from ``difftrain export hf``'s.

    Nothing in a checkpoint can execute code, and its files are verified by their digests.

    Args:
        checkpoint: of a run's folder: "best", "latest" or a step.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        UserError: there is no such run, checkpoint or device, or the checkpoint is damaged.
    """
    found = open_model(Path(expand_path(os.fspath(run_or_folder))), str(checkpoint))
    return Loaded(found.make_model(resolve_device(device)), found.vocabulary, found.config, found.step)
