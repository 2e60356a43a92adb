"""Lines of text on records: while a run goes on, and at its end."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from difftrain.reporting.health import PAGE, HealthWarning, number

REPORT = "report.html"  # in the run's folder, unless another place is named


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
        shares = [(kind, cases[kind]["mask"]) for kind in cases if cases[kind]["n"]]
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


def summary_lines(
    run_dir: Path, record: dict[str, Any], best: tuple[float, int | None], warnings: list[HealthWarning]
) -> list[str]:
    """What a run says at its end, at most five lines: warnings, figures, where the report is, the verdict.

    Args:
        run_dir: the run's folder.
        record: its last evaluation.
        best: the lowest loss at the final penalties, and the step of it.
        warnings: what was warned of.
    """
    lines = []
    if warnings:
        first = {w.kind.anchor: w.step for w in reversed(warnings)}
        told = ", ".join(f"{anchor} (step {step})" for anchor, step in reversed(first.items()))
        lines.append(f"warned of: {told}; what to do stands in {PAGE}")
    where = (
        "the best" if best[1] in (record["step"], None) else f"the best is {best[0]:.4f} at step {best[1]}"
    )
    lines.append(f"validation loss {record['loss_final']:.4f} at the final penalties, {where}")
    run = shlex.quote(str(run_dir))
    lines.append(f"report: difftrain report {run} (writes {shlex.quote(str(run_dir / REPORT))})")
    return [*lines, verdict(record), summary_line(record)]


def verdict(record: dict[str, Any]) -> str:
    """Whether the model of an evaluation knows more than the frequencies of words, in one line."""
    unigram, nll, level = (
        number(record, "unigram_entropy"),
        number(record, "masked_nll", "15"),
        "with 15 % masked, ",
    )
    if nll is None:
        nll, level = number(record, "nll"), ""
    if unigram is None or nll is None:
        return "verdict: none, for want of figures"
    gain = unigram - nll
    if gain > 0:
        return f"verdict: {level}{gain:.3f} nats better than guessing words by frequency"
    return (
        f"verdict: {level}{-gain:.3f} nats worse than guessing words by frequency: nothing is learned yet"
    )


def _number(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.3f}"
