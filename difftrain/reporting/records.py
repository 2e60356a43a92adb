"""Records: a case table as numbers with names, as lines of text, and what they show to be wrong."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

from difftrain.config import Config
from difftrain.schedule import masking_penalties
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import ANSWERS, KINDS

INERT_SHARE = 1e-3  # a penalty that weighs fewer answers than this does nothing
DEGENERATE_SHARE = 0.95
RUNAWAY_GAP = 30.0  # nats: softmax gives [MASK] less than 1e-13


def configuration_text(config: Config) -> str:
    """Every option that is set, ``name=value`` each, in lines of at most 100 characters."""
    pairs = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v != "")
    return textwrap.fill(pairs, 100, break_long_words=False, break_on_hyphens=False)


def loss_metrics(table: CaseTable, pk: float, pm: float, config: Config) -> dict[str, Any]:
    """The losses and case rates of one table, as they stand in ``metrics.jsonl``.

    Keys: ``loss`` at the penalties (pk, pm), ``loss_final`` at the configured final ones, ``nll``
    with no weights, smoothing or z-loss over the positions that count; and unless the mode is gpt2
    ``cases``: for each kind of position the share of each answer, the mean nll, its sum in each cell, and
    the mean gap between the largest logit and [MASK]'s, None where [MASK] is forbidden. Where not all
    positions count, ``counted`` is the share of those that do.
    """
    n_counted = int(table.counts.sum())
    metrics: dict[str, Any] = {
        "loss": table.loss_at(pk, pm).item(),
        "loss_final": table.loss_at(*masking_penalties(config.masking_warmup_iters, config)).item(),
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


def console_line(record: dict[str, Any]) -> str:
    """One metrics record as one line of text."""
    parts = [f"step {record['step']:>6}", f"{record['kind']:<5}"]
    names = {"loss": "loss", "loss_final": "final", "nll": "nll"}
    parts += [f"{names[key]} {record[key]:.4f}" for key in names]
    levels = record.get("masked_nll")
    if levels:
        parts.append("masked nll " + " ".join(f"{k}:{_number(v)}" for k, v in levels.items()))
    elif "cases" in record:
        parts.append(f"masked nll {_number(record['cases']['masked']['nll'])}")
    parts += [f"pk {record['pk']:.3f} pm {record['pm']:.3f} lr {record['lr']:.2e}"]
    cases = record.get("cases")
    if cases:
        shares = [(kind, cases[kind]["mask"]) for kind in KINDS if cases[kind]["n"]]
        parts.append("says [MASK] to " + " ".join(f"{kind} {100 * share:.0f}%" for kind, share in shares))
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    parts.append(f"val {record['validation_id']}")
    return " | ".join(parts)


def summary_line(record: dict[str, Any]) -> str:
    """The last line of a run: what was learned about masked positions, beside unigram guessing."""
    text = f"unigram entropy {record['unigram_entropy']:.3f} nats; validation nll "
    levels = record.get("masked_nll")
    if not levels:
        return text + f"{record['nll']:.3f} nats a token"
    shares = ", ".join(f"{_number(nll)} at {level} %" for level, nll in levels.items() if level.isdigit())
    return text + f"on masked positions {shares} masked, {_number(levels['training'])} as in training"


def _number(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.3f}"


def health_warnings(record: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """What an evaluation record shows to be wrong with the penalties: (key, message) each."""
    cases = record.get("cases")
    if not cases or record["step"] == 0 or not config.has_penalties:
        return []
    masked, intact = cases["masked"], cases["intact"]
    warnings = []
    if record["pk"] != 1.0 and masked["mask"] < INERT_SHARE:
        warnings.append(
            ("pk", "penalty_keep_mask acts on nothing: masked positions are not answered [MASK]")
        )
    if record["pm"] != 1.0 and intact["mask"] < INERT_SHARE:
        warnings.append(
            ("pm", "penalty_mask_correct acts on nothing: correct words are not answered [MASK]")
        )
    if masked["mask"] > DEGENERATE_SHARE and intact["mask"] > DEGENERATE_SHARE:
        warnings.append(("all", "the model answers [MASK] nearly everywhere"))
    if masked["gap"] > RUNAWAY_GAP:
        warnings.append(
            ("gap", f"[MASK]'s logit lies {masked['gap']:.0f} below the maximum on masked positions")
        )
    return warnings
