"""What a model answers in windows of a text: at masked words, at wrong words, and at those left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from difftrain.config import Config
from difftrain.data import corrupt_by_recipe, mask_share, replace_share
from difftrain.evaluation.validation_set import ValidationSet, evaluate
from difftrain.evaluation.windows import Estimate, Windows, ratio, score_all
from difftrain.loss import choose_loss, loss_terms, model_loss, token_weights
from difftrain.runtime import Runtime
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import ANSWERS, CORRUPTED, INTACT, MASKED

MASK, TARGET, _ = range(len(ANSWERS))


class Answers:
    """A model, and how its passes over windows are made.

    Args:
        model: in evaluation mode, on the runtime's device.
        mask_id: id of [MASK], the last of the vocabulary.
        seed: of what is masked and replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        mask_id: int,
        *,
        seed: int,
        runtime: Runtime,
        batch_size: int,
    ):
        self.model, self.config, self.mask_id = (
            model,
            dataclasses.replace(config, seed=seed, mask_level="uniform"),
            mask_id,
        )
        self.keys = {"seed": seed, "split": "val", "vocab_size": mask_id + 1}
        self.runtime, self.batch_size = runtime, batch_size
        self.impl = choose_loss(config, mask_id + 1, runtime)

    def at_level(self, windows: Windows, share: float) -> dict[str, Estimate]:
        """With ``share`` of each window masked: the nll there in nats, and the share that is answered exactly."""
        counts, nll = self._cells(
            windows, partial(mask_share, share=share, **self.keys), f"{share:.0%} masked"
        )
        n_masked = counts[:, MASKED].sum(1)
        return {
            "nll": ratio(nll[:, MASKED].sum(1), n_masked),
            "restored": ratio(counts[:, MASKED, TARGET], n_masked),
        }

    def at_errors(self, windows: Windows, share: float) -> dict[str, Estimate]:
        """With ``share`` of each window replaced by other words, drawn evenly.

        ``found`` is the share of these that is answered [MASK] and, where the run is trained to give the right
        word, ``corrected`` the share that is answered so; ``harmed`` is the share of the words left alone that
        is answered [MASK], ``kept`` that which is answered as it is.
        """
        wrong_target = self.config.wrong_target
        change = partial(replace_share, share=share, wrong_target=wrong_target, **self.keys)
        counts, _ = self._cells(windows, change, f"{share:.0%} wrong")
        n_wrong, n_intact = counts[:, CORRUPTED].sum(1), counts[:, INTACT].sum(1)
        figures = {"found": ratio(counts[:, CORRUPTED, MASK], n_wrong)}
        if wrong_target == "token":
            figures["corrected"] = ratio(counts[:, CORRUPTED, TARGET], n_wrong)
        return figures | {
            "harmed": ratio(counts[:, INTACT, MASK], n_intact),
            "kept": ratio(counts[:, INTACT, TARGET], n_intact),
        }

    def _cells(
        self, windows: Windows, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], title: str
    ) -> tuple[Tensor, Tensor]:
        """Of each window the positions in each cell of the case table, and their nll: (W, 3, 3) fp64 each."""

        def score(chosen: list[int], _: list[int]) -> Tensor:
            x, y = (t.to(self.runtime.device) for t in change(*windows.stack(chosen)))
            with torch.no_grad():
                _, rows = model_loss(
                    self.model, x, y, self.mask_id, 1.0, 1.0,
                    runtime=self.runtime, impl=self.impl, return_rows=True, **loss_terms(self.config),
                )  # fmt: skip
            cell = torch.arange(9, dtype=torch.int8, device=rows.case.device)
            in_cell = rows.case[..., None] == cell
            nll = torch.where(in_cell, rows.nll[..., None], 0.0)
            return torch.cat((in_cell.sum(1).to(nll.dtype), nll.sum(1)), dim=1)

        figures = score_all(
            windows, 1, score, runtime=self.runtime, batch_size=self.batch_size, title=title
        ).view(-1, 2, 3, 3)
        return figures[:, 0], figures[:, 1]

    def as_in_training(self, windows: Windows, counts: Tensor | None) -> CaseTable:
        """The case table of the windows, corrupted as in training; in gpt2 mode of the windows as they are.

        Args:
            counts: of each word in the training text, for a run that replaces by them; without them evenly.
        """
        batches = []
        for batch in windows.batches(self.batch_size):
            tokens, numbers = windows.stack(w for w, _ in batch)
            if self.config.mode == "gpt2":
                batches.append(("text", tokens[:, :-1], tokens[:, 1:], None))
                continue
            x, y, p_mask = corrupt_by_recipe(
                tokens, numbers, self.config, split="val", vocab_size=self.mask_id + 1, counts=counts
            )
            batches.append(("text", x, y, token_weights(x, p_mask, self.mask_id, self.config)))
        text = ValidationSet(batches, id="")
        return evaluate(self.model, text, self.mask_id, self.runtime, self.impl, **loss_terms(self.config))[
            "text"
        ]
