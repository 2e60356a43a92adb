"""Plot: a run's metrics -> one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftrain.errors import UserError, import_extra
from difftrain.reporting.log import read_metrics

COLOURS = {"loss": "#1f77b4", "loss_final": "#d62728", "nll": "#555555"}
LABELS = {"loss": "at the step's penalties", "loss_final": "at the final penalties", "nll": "no weights"}


def plot_run(run_dir: Path, out: Path | None = None) -> Path:
    """Draw the curves of ``metrics.jsonl`` and return the PNG's path.

    Four panels over steps: the losses, the nll of masked positions by corruption level beside the
    unigram entropy, the two penalties, and what the model answers to each kind of position.

    Args:
        run_dir: a run's folder.
        out: the file to write; by default ``plots/curves.png`` in the run's folder.

    Raises:
        UserError: not a run folder, no records yet, or matplotlib is missing.
    """
    records = read_metrics(run_dir)
    if out is not None and out.suffix != ".png":
        raise UserError(f"out must be a .png file, got {out}")
    import_extra("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot as plt

    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), dpi=100, sharex=True, constrained_layout=True)
    (loss, level), (penalty, case) = axes
    for key, colour in COLOURS.items():
        loss.plot(*_curve(train, key), color=colour, lw=0.8, alpha=0.35)
        loss.plot(*_curve(evals, key), color=colour, marker="o", ms=3, label=LABELS[key])
    loss.set(title="Loss (thin: training, dots: validation)", ylabel="nats a position")
    loss.legend()

    masked = [r | r["masked_nll"] for r in evals if r.get("masked_nll")]
    for key, shade in (("15", "#9ecae1"), ("50", "#4292c6"), ("85", "#08519c"), ("training", "#e6550d")):
        label = f"{key} % masked" if key.isdigit() else "as in training"
        level.plot(*_curve(masked, key), color=shade, marker="o", ms=3, label=label)
    if evals:
        level.axhline(evals[-1]["unigram_entropy"], color="black", ls="--", lw=1, label="unigram entropy")
    level.set(title="Validation nll on masked positions", ylabel="nats a masked position")
    level.legend()

    both = sorted(train + evals, key=lambda r: r["step"])
    penalty.plot(*_curve(both, "pk"), color="#7b3294", label="pk: masked position answered [MASK]")
    penalty.plot(*_curve(both, "pm"), color="#008837", label="pm: correct word answered [MASK]")
    highest = max([1.0, *_curve(both, "pk")[1], *_curve(both, "pm")[1]])
    penalty.set(
        title="Penalties (curriculum)", xlabel="step", ylabel="weight", ylim=(-0.05, 1.05 * highest)
    )
    penalty.legend()

    cases = [
        ("masked", "target", "masked: filled in right", "#2ca02c", "-"),
        ("masked", "mask", "masked: kept [MASK]", "#2ca02c", ":"),
        ("intact", "target", "correct word: left alone", "#1f77b4", "-"),
        ("intact", "mask", "correct word: answered [MASK]", "#1f77b4", ":"),
        ("corrupted", "mask", "wrong word: flagged [MASK]", "#d62728", "-"),
    ]
    flat = [{"step": r["step"], **_flat_cases(r)} for r in evals if r.get("cases")]
    for kind, answer, label, colour, style in cases:
        steps, shares = _curve(flat, f"{kind} {answer}")
        case.plot(steps, [100 * s for s in shares], style, color=colour, marker="o", ms=3, label=label)
    case.set(
        title="Answers on the validation set", xlabel="step", ylabel="% of such positions", ylim=(-4, 104)
    )
    case.legend(fontsize=8)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.suptitle(
        f"{run_dir.name}: {records[-1]['step']} steps, validation set {records[-1]['validation_id']}"
    )
    out = out or run_dir / "plots" / "curves.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    plt.close(figure)
    return out


def _flat_cases(record: dict[str, Any]) -> dict[str, float]:
    return {f"{kind} {key}": value for kind, row in record["cases"].items() for key, value in row.items()}


def _curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values where the value is a number (a non-finite one is null in the file)."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return [s for s, _ in points], [v for _, v in points]
