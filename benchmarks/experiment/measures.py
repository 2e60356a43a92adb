"""What is measured of a trained run: what it knows of held-out text, how it repairs, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.evaluation.of_run import EvaluationRequest, evaluate_run
from difftrain.sampling.loaded import Loaded, load
from text_quality.errors import plant
from text_quality.held_out import HeldOut
from text_quality.repaired import found_at, repaired
from text_quality.written import finite, quality

LEVELS = (15.0, 50.0, 85.0)
ERRORS = 5.0  # per cent of the words
# Exact in distribution, for every model; the one that this training is for; the specification's.
POLICIES = ("ancestral", "remask", "fill")


@dataclass(frozen=True)
class Effort:
    """How much is measured: windows of held-out text, maskings of each for the bound, and texts written."""

    windows: int = 128
    draws: int = 8
    texts: int = 96


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
        if policy != "ancestral" and not model.config.has_penalties:
            continue  # it never answers [MASK]: fill would write all in one pass, remask send nothing back
        texts = model.sample(effort.texts, policy=policy, temperature=1.0, seed=0)
        ids = [model.tokenizer.encode(text) for text in texts]
        written = quality(
            torch.tensor(ids, dtype=torch.int64, device="cpu"),
            model.tokenizer.decode,
            judge,
            held_out.known,
        )
        figures |= {f"{policy}_{name}": value for name, value in written.items()}
    return finite(figures)


def _repairs(model: Loaded, fluent: Loaded, clean: Tensor) -> dict[str, float]:
    figures = {}
    for name, kind, by in (("random", "random", model), ("fluent", "own", fluent)):
        wrong = plant(kind, by, clean, ERRORS / 100, seed=0)
        figures[f"{name}_found_at_1"] = found_at(model, clean, wrong)
        figures |= {f"{name}_{key}": value for key, value in repaired(model, clean, wrong).items()}
    return figures


def references(judge: Loaded, held_out: HeldOut, effort: Effort) -> dict[str, dict[str, float | None]]:
    """What held-out text itself gets, and what its characters get in a random order, each text's among themselves.

    As many windows as texts are written.
    """
    tokens = held_out.tokens[:: max(1, len(held_out.tokens) // effort.texts)][: effort.texts]
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.rand(tokens.shape, generator=generator, dtype=torch.float32, device="cpu").argsort(1)
    return {
        "held-out text": quality(tokens, judge.tokenizer.decode, judge, held_out.known),
        "shuffled": quality(tokens.gather(1, order), judge.tokenizer.decode, judge, held_out.known),
    }
