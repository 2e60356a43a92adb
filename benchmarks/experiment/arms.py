"""The arms of the experiment: what each trains with that the others do not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from difftrain.config import Config

# A character model at which words begin to appear within minutes on one CPU core. Fewer words are masked and replaced
# than the specification's shares: with those the same steps learn far less (arm "specification's shares").
BASE = {
    "data": "stdlib", "block_size": 64, "batch_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 128,
    "position": "rotary", "max_iters": 1200, "learning_rate": 3e-3, "min_lr": 3e-4, "warmup_iters": 50,
    "beta2": 0.99, "weight_decay": 0.1, "mask_factor": 0.6, "replace_factor": 0.15,
    "eval_iters": 8, "eval_batch_size": 64, "log_interval": 50, "keep_checkpoints": 1, "device": "cpu",
}  # fmt: skip
JUDGE = "judge"  # the model in gpt2 mode that tells how likely the samples are
JUDGE_SEED = 1000
JUDGE_STEPS = 2  # times those of an arm


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        what: it, in a few words for the table.
        options: beside those of all.
        warmup: share of the steps over which the penalties move; 0: they are the final ones from the first step on.
        base: the arm that it is compared with; one that is its own base begins a group.
        length: steps, in those of the experiment.
        seeds: how many runs.
    """

    what: str
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    warmup: float = 0.0
    base: str = "curriculum"
    length: int = 1
    seeds: int = 3


def _constant(pk: float, pm: float) -> dict[str, object]:
    return {"penalty_keep_mask": pk, "penalty_mask_correct": pm}


CURRICULUM = 0.2  # of the steps, the options' own share: 1000 of 5000
SPECIFIED = {"mask_factor": 1.0, "replace_factor": 1.0}
SPECIFICATION = "specification's shares"
AS_SPECIFIED = "as much masked and replaced as the specification says"
MORE = 5  # seeds, where the answer hangs on a difference of the size of their spread
LONG = 3  # times the steps, for what is asked again of a model that has learnt more


ARMS = {
    "curriculum": Arm("pk 1 to 0.25, pm 0 to 0.5 over a fifth of the steps", {}, CURRICULUM),
    "constant final": Arm("pk 0.25, pm 0.5 from the first step on"),
    "constant (1, 1)": Arm("no penalties: plain cross-entropy", _constant(1.0, 1.0)),
    "constant (1, 0)": Arm("a right word answered [MASK] weighs nothing", _constant(1.0, 0.0)),
    "constant (0, 0)": Arm("no wrong [MASK] answer counts at all", _constant(0.0, 0.0)),
    "short warmup": Arm("the curriculum over a twentieth of the steps", {}, 0.05),
    "long warmup": Arm("the curriculum over all steps", {}, 1.0),
    "probability gate": Arm(
        "the curriculum, weighed by the probability of [MASK]", {"gate": "probability"}, CURRICULUM
    ),
    "own errors": Arm(
        "the curriculum; half of the wrong words are the model's own", {"self_errors": 0.5}, CURRICULUM
    ),
    "masked only": Arm(
        "recipe mdlm at equal weights: no wrong words, no [MASK] answers",
        {"recipe": "mdlm", "token_weighting": "uniform"} | SPECIFIED,
    ),
    SPECIFICATION: Arm(f"the curriculum; {AS_SPECIFIED}", SPECIFIED, CURRICULUM, SPECIFICATION, seeds=MORE),
    f"{SPECIFICATION}: constant final": Arm(
        f"pk 0.25, pm 0.5; {AS_SPECIFIED}", SPECIFIED, base=SPECIFICATION, seeds=MORE
    ),
    f"{SPECIFICATION}: constant (1, 1)": Arm(
        f"no penalties; {AS_SPECIFIED}", SPECIFIED | _constant(1.0, 1.0), base=SPECIFICATION, seeds=MORE
    ),
    f"{SPECIFICATION}: constant (1, 0)": Arm(
        f"a right word answered [MASK] weighs nothing; {AS_SPECIFIED}",
        SPECIFIED | _constant(1.0, 0.0),
        base=SPECIFICATION,
        seeds=MORE,
    ),
    "long": Arm(
        f"the curriculum; {AS_SPECIFIED}; three times the steps", SPECIFIED, CURRICULUM, "long", LONG
    ),
    "long: constant final": Arm(
        f"pk 0.25, pm 0.5; {AS_SPECIFIED}; three times the steps", SPECIFIED, 0.0, "long", LONG
    ),
}


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of an arm, or of the judge, lies."""
    return out / f"{re.sub('[^a-z0-9]+', '-', name).strip('-')}-{seed}"


def run_config(name: str, seed: int, out: Path, changes: dict[str, object]) -> Config:
    """The configuration of a run of an arm, or of the judge.

    Args:
        changes: options in place of those of BASE, for all arms alike.
    """
    base = BASE | changes
    steps = int(base["max_iters"])
    own: dict[str, object]
    if name == JUDGE:
        steps *= JUDGE_STEPS
        own = {"mode": "gpt2", "mask_factor": 1.0, "replace_factor": 1.0}
    else:
        arm = ARMS[name]
        steps *= arm.length
        own = arm.options | {"masking_warmup_iters": round(arm.warmup * steps)}
    own |= {"max_iters": steps, "seed": seed, "out_dir": str(run_folder(out, name, seed))}
    return Config(**{"eval_interval": max(1, steps // 4)} | base | own)


def options_of(config: Config) -> dict[str, object]:
    """What a run was trained with, wherever its folder lies."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "out_dir"}
