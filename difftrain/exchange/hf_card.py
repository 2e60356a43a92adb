"""The card of an exported model: what it is, how to use it, and the figures that its run wrote down."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from difftrain import __version__
from difftrain.checkpoints.reading import Checkpoint
from difftrain.errors import UserError
from difftrain.exchange.hf_tokenizer import MASK
from difftrain.reporting.log import read_metrics

HEADER = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags: [difftrain, masked-diffusion]
---
"""
USE = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
```

`pipeline("fill-mask", FOLDER, trust_remote_code=True)` fills the tokenizer's mask token. `difftrain evaluate FOLDER`
and `difftrain.load(FOLDER)` take the folder too.
"""
USE_IDS = """\
```python
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
```

There is no tokenizer: texts are given as ids.
"""


def card(run_dir: Path, checkpoint: Checkpoint, *, has_words: bool) -> str:
    """``README.md`` of the folder; every figure in it stands in the checkpoint or in the run's ``metrics.jsonl``."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    facts = [
        ("layers, heads, width", f"{config.n_layer}, {config.n_head}, {config.n_embd}"),
        ("positions", f"{config.block_size}, {config.position}"),
        ("vocabulary", f"{vocabulary.vocab_size} with {MASK} (id {vocabulary.mask_id})"),
        ("optimiser steps", f"{checkpoint.step}"),
        ("tokens a step", f"{config.global_batch_size * config.block_size}"),
        ("recipe", config.recipe),
        ("trained on", f"`{Path(config.data).name}`"),
    ]
    measured = _measured(run_dir, checkpoint.step)
    parts = [
        HEADER,
        f"# {run_dir.resolve().name}\n",
        "A masked-diffusion language model: it sees a text with gaps, on both sides of each, and answers every "
        f"position. Trained with difftrain; exported by difftrain {__version__}.\n",
        USE if has_words else USE_IDS,
        _table(facts),
    ]
    if measured:
        parts += [
            f"On the run's held-out text, at step {checkpoint.step}, in nats a token:\n",
            _table(measured),
        ]
    else:
        parts.append("The run has no evaluation of this step written down.\n")
    return "\n".join(parts)


def _measured(run_dir: Path, step: int) -> list[tuple[str, str]]:
    """The figures of the evaluation at this step, as they were written; none where there was no evaluation."""
    records: list[dict[str, Any]] = []
    with suppress(UserError, OSError):
        records = [r for r in read_metrics(run_dir) if r.get("kind") == "eval" and r.get("step") == step]
    if not records:
        return []
    record = records[-1]
    levels = record.get("masked_nll")
    found = {
        "loss at the final penalties": record.get("loss_final"),
        "nll, all positions": record.get("nll"),
        **{
            f"nll of masked words, {_level(name)}": value
            for name, value in (levels.items() if isinstance(levels, dict) else ())
        },
    }
    return [
        (name, f"{value:.4f}")
        for name, value in found.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _level(name: str) -> str:
    return "levels as in training" if name == "training" else f"{name} % masked"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])
