"""A model that writes: its words, how it was trained, and texts of any length by any policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from difftrain.checkpoints.reading import Checkpoint
from difftrain.config import Config
from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError, plain_text, real_number, whole_number
from difftrain.model import Transformer
from difftrain.runtime import Runtime, resolve_device, resolve_dtype
from difftrain.sampling.blocks import settle_in_blocks
from difftrain.sampling.causal import continue_causal
from difftrain.sampling.choosing import Choice
from difftrain.sampling.policies import make_policy
from difftrain.sampling.scoring import KeptKeys, ModelScores
from difftrain.sampling.settling import State

Scoring = TypeVar("Scoring", bound=ModelScores)
STEPS = 64  # passes a block_size of text; the specification's, whose fill adds one


@dataclass(frozen=True)
class How:
    """How texts are written.

    Attributes:
        policy: a name in the table of policies.py; empty: "fill", or "confidence" where the model was never taught
            to answer [MASK], since it would fill all of a text in one pass.
        steps: passes of the model for a text; None: 64 for each block_size of it, and one more with "fill".
        schedule: how many words a pass writes, where a policy takes the best first.
        suspect: for the policy "remask".
        block_length: tokens that are written before the next ones are begun; 0: as settle_in_blocks has it.
        approximate: within a block, only its own tokens go through the model after the first pass; blocks are then of a
            quarter of what the model takes, unless told.
        seed: of all random numbers, with each text's index.
    """

    policy: str = ""
    steps: int | None = None
    schedule: str | None = None
    suspect: float | None = None
    block_length: int | None = None
    approximate: bool = False
    choice: Choice = field(default_factory=Choice)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"steps": 1, "block_length": 0, "seed": 0}.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(name, value, low))
        if self.suspect is not None:
            object.__setattr__(self, "suspect", real_number("suspect", self.suspect))
        if self.schedule is not None:
            plain_text("schedule", self.schedule)
        if plain_text("policy", self.policy):
            make_policy(self.policy, **self.policy_options())

    def policy_options(self) -> dict[str, object]:
        """What of the policy's own options was chosen."""
        options = {"schedule": self.schedule, "suspect": self.suspect}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Writer:
    """A trained model and its words.

    Attributes:
        module: in evaluation mode, on any device.
        config: of the run that trained it.
        dtype: in which the model computes.
    """

    module: Transformer
    vocabulary: Vocabulary
    config: Config
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.module.head.weight.device

    @property
    def scores(self) -> ModelScores:
        """The model as the samplers call it, its passes counted from now on."""
        return self._scores_by(ModelScores)

    def fill(self, x: Tensor, how: How, on_pass: Callable[[Tensor], None] | None = None) -> Tensor:
        """Texts x (B, T) int64 with every [MASK] written, on x's device; other positions stay. Not modified.

        Text i depends on x[i], the seed and i alone, up to the rounding of matrix products.

        Args:
            on_pass: is given x before the first pass and after each.

        Raises:
            UserError: the policy needs another model, or more steps; or the model's numbers are not finite.
        """
        return self.settle(x, how, on_pass).x.to(x.device)

    def settle(
        self,
        x: Tensor,
        how: How,
        on_pass: Callable[[Tensor], None] | None = None,
        *,
        scores: ModelScores | None = None,
        samples: Tensor | None = None,
        spared: int = 0,
    ) -> State:
        """The state, on the model's device, in which :meth:`fill` leaves the texts.

        Args:
            scores: other ones than :attr:`scores`, in one block.
            samples: (B,) int64, the index of each text; None: its place.
            spared: so many of the passes are left to the caller.
        """
        config, mask_id = self.config, self.vocabulary.mask_id
        name = how.policy or ("fill" if config.has_penalties else "confidence")
        if name == "remask" and not config.has_penalties:
            raise UserError(
                "policy remask needs a model that was taught to answer a wrong word with [MASK], which recipe "
                f"{config.recipe} does not; remask_untrained takes any"
            )
        steps = how.steps or STEPS * -(-x.shape[1] // config.block_size) + (name == "fill")
        if spared >= steps:
            raise UserError(
                f"steps must be at least {spared + 1} here, since {spared} judges the text, got {steps}"
            )
        state = State.of(x.to(self.device), mask_id)
        if on_pass:
            on_pass(state.x)
        block_length, on_block = how.block_length or 0, None
        scores = scores or self.scores
        if how.approximate:
            block_length = block_length or max(1, config.block_size // 4)
            scores = self._scores_by(KeptKeys)
            on_block = scores.begin
        settle_in_blocks(
            scores, state, mask_id, make_policy(name, **how.policy_options()),
            steps=steps - spared, block_size=config.block_size, block_length=block_length,
            choice=how.choice, seed=how.seed, samples=self._indices(x) if samples is None else samples, on_pass=on_pass,
            on_block=on_block,
        )  # fmt: skip
        return state

    def continue_causal(self, x: Tensor, length: int, how: How) -> Tensor:
        """Texts x (B, T) int64 with words appended up to ``length``, on x's device; for a model of gpt2 mode.

        Raises:
            UserError: something was asked for that left to right has no use for.
        """
        for name in ("policy", "steps", "schedule", "suspect", "block_length", "approximate"):
            if getattr(how, name):
                raise UserError(
                    f"a run in gpt2 mode writes from left to right, a pass a token, and takes no {name}"
                )
        return continue_causal(
            self.scores, x.to(self.device), length, self.vocabulary.mask_id,
            block_size=self.config.block_size, choice=how.choice, seed=how.seed, samples=self._indices(x),
        ).to(x.device)  # fmt: skip

    def _scores_by(self, kind: type[Scoring]) -> Scoring:
        autocast = Runtime(self.device, self.dtype, rank=0, world_size=1).autocast
        return kind(self.module, self.config, self.vocabulary.mask_id, autocast)

    def _indices(self, x: Tensor) -> Tensor:
        return torch.arange(len(x), dtype=torch.int64, device=self.device)


def writer_of(checkpoint: Checkpoint, device: str, dtype: str) -> Writer:
    """A checkpoint's model as a writer, where and in what the options of these names say.

    Raises:
        UserError: there is no such device or dtype, or the weights do not fit the model.
    """
    where = resolve_device(device)
    computes_in = resolve_dtype(dtype, where)
    model = checkpoint.make_model(where, computes_in)
    return Writer(model, checkpoint.vocabulary, checkpoint.config, computes_in)
