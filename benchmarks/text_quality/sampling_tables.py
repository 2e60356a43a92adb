"""The figures of bench_sampling.py as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WRITING = {
    "free": (
        ("known_words", "words that exist"),
        ("judge_nll", "nll under the judge"),
        ("distinct", "distinct runs"),
    ),
    "gaps": (("restored", "masked words restored"), ("judge_nll", "nll under the judge")),
}
REPAIR = (
    ("touched", "changed"), ("put_right", "put right"), ("harmed", "right words harmed"), ("wrong_before", "wrong before"),
    ("wrong_after", "after"), ("nll_before", "nll before"), ("nll_after", "after"), ("found_at_1", "found at 1 %"),
)  # fmt: skip
LENGTHS = (("right_length", "right lengths"), ("exact", "restored exactly"), ("off", "characters off"))
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#999999")


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation; nothing for no values."""
    values = list(values)
    if not values:
        return ""
    digits = 3 if statistics.mean(values) < 100 else 0
    text = f"{statistics.mean(values):,.{digits}f}"
    return text + (f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else "")


def figures_of(entries: list[dict[str, Any]], name: str, **of: Any) -> list[float]:
    """A figure of every model that has it, from the entries that have these values."""
    found = [e["figures"][name] for e in entries if all(e[key] == value for key, value in of.items())]
    return [value for value in found if value is not None]


def tables(result: dict[str, Any]) -> str:
    """Everything, in Markdown."""
    parts = []
    for task, columns in WRITING.items():
        entries = [e for e in result["writing"] if e["task"] == task]
        if not entries:
            continue
        passes = sorted({e["passes"] for e in entries})
        for name, title in (*columns, ("tokens_per_cpu_second", "tokens written in a CPU second")):
            held_out = result["held_out"].get(name)
            note = f" (held-out text: {held_out:.3f})" if held_out is not None else ""
            lines = [
                f"{task}: {title}{note}, by passes",
                "",
                f"| way | {' | '.join(map(str, passes))} |",
            ]
            lines.append("|---" * (1 + len(passes)) + "|")
            for way in dict.fromkeys(e["way"] for e in entries):
                cells = [spread(figures_of(entries, name, way=way, passes=n)) for n in passes]
                lines.append(f"| {way} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    if result["repair"]:
        parts.append(_repair_table(result["repair"]))
    if result["lengths"]:
        parts.append(lengths_table(result["lengths"]))
    return "\n\n".join(parts)


def _repair_table(entries: list[dict[str, Any]]) -> str:
    titles = " | ".join(title for _, title in REPAIR)
    lines = [f"| errors | `--sure` | {titles} |", "|---" * (2 + len(REPAIR)) + "|"]
    for kind, errors, sure in dict.fromkeys((e["kind"], e["errors"], e["sure"]) for e in entries):
        cells = [
            spread(figures_of(entries, name, kind=kind, errors=errors, sure=sure)) for name, _ in REPAIR
        ]
        lines.append(f"| {kind}, {errors:g} % | {sure:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lengths_table(entries: list[dict[str, Any]]) -> str:
    """How often a gap's length was found, over all lengths that were cut out."""
    titles = " | ".join(title for _, title in LENGTHS)
    lines = [f"| the length by | {titles} |", "|---" * (1 + len(LENGTHS)) + "|"]
    models = sorted({e["model"] for e in entries})
    for rule in dict.fromkeys(e["rule"] for e in entries):
        cells = [
            spread(statistics.mean(figures_of(entries, name, rule=rule, model=m)) for m in models)
            for name, _ in LENGTHS
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Quality over passes, a line a policy, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [("free", "known_words"), ("free", "judge_nll"), ("gaps", "restored"), ("gaps", "judge_nll")]
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), dpi=100, sharex=True, constrained_layout=True)
    for panel, (task, name) in zip(panels.flat, shown, strict=True):
        entries = [e for e in result["writing"] if e["task"] == task]
        passes = sorted({e["passes"] for e in entries})
        ways = [name for name in dict.fromkeys(e["way"] for e in entries) if "," not in name]
        for colour, way in zip(COLOURS, ways, strict=False):
            found = {n: figures_of(entries, name, way=way, passes=n) for n in passes}
            means = {n: statistics.mean(values) for n, values in found.items() if values}
            panel.plot(list(means), list(means.values()), color=colour, marker="o", ms=4, label=way)
        if name in result["held_out"] and task == "gaps":
            panel.axhline(result["held_out"][name], color="black", ls="--", lw=1, label="held-out text")
        panel.set_xscale("log", base=2)
        panel.set_xticks(passes, map(str, passes))
        panel.set_title(f"{'from nothing' if task == 'free' else 'gaps'}: {dict(WRITING[task])[name]}")
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("passes of the model")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
