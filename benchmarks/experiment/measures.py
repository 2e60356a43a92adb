"""What is measured of a trained run: what it knows of held-out text, how it repairs, and what it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.checkpoints.reading import find_checkpoint, open_held_out
from difftrain.evaluation.of_run import EvaluationRequest, evaluate_run
from difftrain.evaluation.windows import cut
from difftrain.sampling.loaded import Loaded, load
from text_quality.errors import plant
from text_quality.repaired import found_at, repaired
from text_quality.written import quality, words_of

LEVELS = (15.0, 50.0, 85.0)
ERRORS = 5.0  # per cent of the words
STRETCHES = 4  # of consecutive held-out text, evenly spaced
POLICIES = ("ancestral", "fill")  # exact in distribution, for every model; the specification's


@dataclass(frozen=True)
class Effort:
    """How much is measured: windows of held-out text, maskings of each for the bound, and texts written."""

    windows: int = 128
    draws: int = 8
    texts: int = 96


@dataclass(frozen=True)
class HeldOut:
    """Held-out text: consecutive windows (W, T) int64 of each stretch, and all its words."""

    tokens: Tensor
    known: set[str]

    @classmethod
    def of(cls, run: Path, effort: Effort) -> HeldOut:
        """That of a run's data, in its vocabulary and windows of its block size."""
        checkpoint = find_checkpoint(run, "latest")
        ids = open_held_out(checkpoint, is_change_allowed=False).val
        length = checkpoint.config.block_size
        per_stretch = max(1, effort.windows // STRETCHES)
        stretches = cut(ids, per_stretch * length, at_most=STRETCHES).tokens
        tokens = torch.cat([s.view(-1, length) for s in stretches if len(s) == per_stretch * length])
        return cls(tokens, set(words_of(checkpoint.vocabulary.decode(ids.tolist()))))


def measure(
    run: Path, judge: Loaded, fluent: Loaded, held_out: HeldOut, effort: Effort
) -> dict[str, float]:
    """Every figure of a run's newest checkpoint, by name; those that its training gives no meaning to are left out.

    Args:
        judge: a model of gpt2 mode, which tells how likely texts are.
        fluent: the model that draws the fluent errors, the same for all runs.
    """
    model = load(run, "latest", device="cpu")
    record = evaluate_run(
        run,
        EvaluationRequest(
            checkpoint="latest", windows=effort.windows, levels=LEVELS, errors=(ERRORS,),
            estimators=("llada",), draws=effort.draws, device="cpu",
        ),
    )  # fmt: skip
    figures = {f"masked_nll_{level:g}": record["masked"][f"{level:g}"]["nll"]["value"] for level in LEVELS}
    figures["bits_per_character"] = record["likelihood"]["llada"]["bits_per_character"]["value"]
    if "repair" in record:
        answers = record["repair"][f"{ERRORS:g}"]
        figures |= {"found": answers["found"]["value"], "harmed": answers["harmed"]["value"]}
        figures |= _repairs(model, fluent, held_out.tokens)
    for policy in POLICIES:
        if policy == "fill" and not model.config.has_penalties:
            continue  # it would write all in one pass
        texts = model.sample(effort.texts, policy=policy, temperature=1.0, seed=0)
        ids = [model.tokenizer.encode(text) for text in texts]
        written = quality(
            torch.tensor(ids, dtype=torch.int64, device="cpu"),
            model.tokenizer.decode,
            judge,
            held_out.known,
        )
        figures |= {f"{policy}_{name}": value for name, value in written.items()}
    return {
        name: None if value is None or not math.isfinite(value) else value
        for name, value in figures.items()
    }


def _repairs(model: Loaded, fluent: Loaded, clean: Tensor) -> dict[str, float]:
    figures = {}
    for kind, by in (("random", model), ("own", fluent)):
        wrong = plant(kind, by, clean, ERRORS / 100, seed=0)
        name = "random" if kind == "random" else "fluent"
        figures[f"{name}_found_at_1"] = found_at(model, clean, wrong)
        figures |= {f"{name}_{key}": value for key, value in repaired(model, clean, wrong).items()}
    return figures


def reference(judge: Loaded, held_out: HeldOut, effort: Effort) -> dict[str, Any]:
    """What held-out text itself gets: as many of its windows as texts are written, and words of the other half."""
    tokens = held_out.tokens[:: max(1, len(held_out.tokens) // effort.texts)][: effort.texts]
    return quality(tokens, judge.tokenizer.decode, judge, held_out.known)
