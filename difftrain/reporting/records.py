"""Records: a case table as numbers with names, as they stand in ``metrics.jsonl``."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from difftrain.config import Config
from difftrain.schedule import final_penalties
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import ANSWERS, KINDS


def configuration_text(config: Config) -> str:
    """Every option that is set, ``name=value`` each, in lines of at most 100 characters."""
    pairs = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v != "")
    return textwrap.fill(pairs, 100, break_long_words=False, break_on_hyphens=False)


def loss_metrics(
    table: CaseTable, pk: float, pm: float, config: Config, case_weights: list[list[float]] | None = None
) -> dict[str, Any]:
    """The losses and case rates of one table, as they stand in ``metrics.jsonl``.

    Keys: ``loss`` at the penalties (pk, pm), or at all nine weights where there are, ``loss_final`` at the configured final ones, ``nll``
    with no weights, smoothing or z-loss over the positions that count; and unless the mode is gpt2
    ``cases``: for each kind of position the share of each answer, the mean nll, its sum in each cell, and
    the mean gap between the largest logit and [MASK]'s, None where [MASK] is forbidden. Where not all
    positions count, ``counted`` is the share of those that do.
    """
    n_counted = int(table.counts.sum())
    metrics: dict[str, Any] = {
        "loss": (
            table.loss_at(case_weights=case_weights) if case_weights else table.loss_at(pk, pm)
        ).item(),
        "loss_final": table.loss_at(*final_penalties(config)).item(),
        "nll": CaseTable(table.counts, table.nll, table.gap, n_counted).loss_at().item(),
    }
    if config.recipe != "specification":
        metrics["counted"] = n_counted / table.n_positions
    if config.mode == "diffusion":
        rates, nll, gap = table.rates(), table.mean_nll(), table.mean_gap()
        metrics["cases"] = {
            kind: {
                "n": int(table.counts[k].sum()),
                **{answer: rates[k, a].item() for a, answer in enumerate(ANSWERS)},
                "nll": nll[k].item(),
                "nll_sums": {answer: table.nll[k, a].item() for a, answer in enumerate(ANSWERS)},
                "gap": None if config.forbids_mask else gap[k].item(),
            }
            for k, kind in enumerate(KINDS)
        }
    return metrics
