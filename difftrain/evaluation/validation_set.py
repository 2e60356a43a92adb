"""A fixed validation set: one pass over it gives the loss at any penalties."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.config import Config
from difftrain.data import Corpus, corrupt_by_recipe, mask_share
from difftrain.loss import model_loss, token_weights
from difftrain.progress import progress
from difftrain.runtime import Runtime
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import VECTOR_SIZE

FIXED = "fixed"  # the specified set: eval_iters batches, from least to most corrupted
TRAINING = "training"  # corrupted as in training
LEVELS = {"15": 0.15, "50": 0.50, "85": 0.85}  # this share masked, nothing replaced
LEAST_CORRUPTION, MOST_CORRUPTION = 0.01, 0.99


@dataclass(frozen=True)
class ValidationSet:
    """Corrupted validation batches, the same in every evaluation of a run.

    Attributes:
        batches: (part, x, y, token weights) each; x and y (eval_batch_size, T) int64 on the CPU, and fp32
            weights like them where the recipe has some, else None.
        id: digest of all batches, in every log line: equal ids mean comparable numbers.
    """

    batches: list[tuple[str, Tensor, Tensor, Tensor | None]]
    id: str


def make_validation_set(corpus: Corpus, config: Config) -> ValidationSet:
    """Draw the validation set; it depends on the data, the seed and the evaluation's own options.

    The part "fixed" has ``eval_iters`` batches whose largest corruption grows linearly from 0.01
    (first) to 0.99 (last). The parts "training", "15", "50" and "85" take the texts of every
    fourth of these batches again, corrupted as in training or masked to that per cent, so that
    their numbers can be compared with each other. In gpt2 mode there is only "fixed", uncorrupted.
    Under a recipe that masks alone the growing number is the probability of masking.

    Source: the specification, "Fixed validation set"; the levels are an addition.
    """
    keys = {"split": "val", "vocab_size": corpus.vocabulary.vocab_size}
    counts = corpus.unigram_counts if config.replacement == "unigram" else None

    # Levels are drawn evenly whatever training draws: so every part has all of them, each weighs as it
    # should, and runs that differ in this alone have one validation set.
    config = dataclasses.replace(config, mask_level="uniform")

    def corrupted(tokens: Tensor, samples: Tensor, level: float | None) -> tuple:
        x, y, p_mask = corrupt_by_recipe(tokens, samples, config, level=level, counts=counts, **keys)
        return x, y, token_weights(x, p_mask, corpus.vocabulary.mask_id, config)

    batches = []
    for i in range(config.eval_iters):
        first = i * config.eval_batch_size
        samples = torch.arange(first, first + config.eval_batch_size, dtype=torch.int64, device="cpu")
        if config.mode == "gpt2":
            tokens = corpus.windows("val", samples, seed=config.seed, length=config.block_size + 1)
            batches.append((FIXED, tokens[:, :-1], tokens[:, 1:], None))
            continue
        tokens = corpus.windows("val", samples, seed=config.seed, length=config.block_size)
        growth = i / max(1, config.eval_iters - 1)
        most = LEAST_CORRUPTION + growth * (MOST_CORRUPTION - LEAST_CORRUPTION)
        batches.append((FIXED, *corrupted(tokens, samples, most)))
        if i % 4 == 0:
            batches.append((TRAINING, *corrupted(tokens, samples, None)))
            for level, share in LEVELS.items():
                x, y = mask_share(tokens, samples, share=share, seed=config.seed, **keys)
                batches.append((level, x, y, None))
    digest = hashlib.sha256()
    for part, *tensors in batches:
        digest.update(part.encode() + b"".join(t.numpy().tobytes() for t in tensors if t is not None))
    return ValidationSet(batches, digest.hexdigest()[:12])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    validation_set: ValidationSet,
    mask_id: int,
    runtime: Runtime,
    loss_impl: str = "logits",
    **terms: Any,
) -> dict[str, CaseTable]:
    """One pass of the model over the validation set: the case table of each of its parts.

    The batches are shared out among the processes, and the tables added up over all of them, so
    every process returns the same global counts. The model is put into evaluation mode and back.
    ``terms`` are those of :func:`difftrain.loss.loss_terms`.
    """
    was_training = model.training
    model.eval()
    parts = sorted({part for part, *_ in validation_set.batches})
    sums = {part: torch.zeros(VECTOR_SIZE, dtype=torch.float64, device="cpu") for part in parts}
    batches = validation_set.batches
    for first in progress(range(0, len(batches), runtime.world_size), what="evaluating", unit="batch"):
        # Sharded weights are gathered in every pass, so the last one is made by all, counted or not.
        part, *tensors = batches[(first + runtime.rank) % len(batches)]
        x, y, weights = (None if t is None else t.to(runtime.device) for t in tensors)
        _, table = model_loss(
            model, x, y, mask_id, 1.0, 1.0,
            runtime=runtime, impl=loss_impl, return_cases=True, token_weights=weights, **terms,
        )  # fmt: skip
        if first + runtime.rank < len(batches):
            sums[part] += table.to_vector()
    model.train(was_training)
    return {part: CaseTable.from_vector(runtime.sum_over_processes(sums[part])) for part in parts}
