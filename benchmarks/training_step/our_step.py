"""The trainer's step: by its parts, and as the loop takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from difftrain.config import Config
from difftrain.data import Corpus, corrupt_by_recipe, sample_indices
from difftrain.data.vocabulary import Ids
from difftrain.loss import model_loss
from difftrain.runtime import Runtime
from difftrain.schedule import learning_rate, masking_penalties
from difftrain.training.step import LiveRun

PARTS = ("data", "corruption", "forward", "loss", "backward", "optimizer")


class OurStep:
    """A run on the ids of an array. A call takes one step and names each part's end to ``lap``."""

    def __init__(self, config: Config, words: np.ndarray, vocab_size: int, runtime: Runtime):
        self.run = LiveRun(
            config, runtime, Corpus(words, words, Ids(vocab_size - 1), Path()), None, lambda _: None
        )

    def __call__(self, lap: Callable[[str], None]) -> None:
        run, config, runtime = self.run, self.run.config, self.run.runtime
        pk, pm = masking_penalties(run.step, config)
        samples = sample_indices(run.step, 0, 0, 1, config)
        tokens = run.corpus.windows("train", samples, seed=config.seed, length=config.block_size)
        tokens, samples = runtime.to_device(tokens), runtime.to_device(samples)
        lap("data")
        x, y, _ = corrupt_by_recipe(
            tokens, samples, config, split="train", vocab_size=run.corpus.vocabulary.vocab_size
        )
        lap("corruption")

        def model(x):  # within the loss's autocast
            logits = run.network(x)
            lap("forward")
            return logits

        loss = model_loss(
            model, x, y, run.mask_id, pk, pm, runtime=runtime, impl=run.loss_impl, upstream_scale=1.0
        )
        lap("loss")
        loss.backward()
        lap("backward")
        run.settle()
        run.update(loss.detach())
        lap("optimizer")

    def as_the_loop_takes_it(self) -> None:
        """One step by :meth:`LiveRun.gradients` and :meth:`LiveRun.update`, with no lap in it and no log line."""
        loss_sum, _ = self.run.gradients(learning_rate(self.run.step, self.run.config), is_logged=False)
        self.run.settle()
        self.run.update(loss_sum)
