"""The experiment's figures as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Tables of the page: title of each column, figure, digits, and whether less is better (None: neither).
KNOWLEDGE = (
    ("nll, 15 % masked, after a quarter of the steps", "early_nll_15", 3, True),
    ("after all", "masked_nll_15", 3, True),
    ("50 %", "masked_nll_50", 3, True),
    ("85 %", "masked_nll_85", 3, True),
    ("bits a character", "bits_per_character", 3, True),
)
REPAIR = (
    ("found", "found", 3, False),
    ("harmed", "harmed", 4, True),
    ("found at 1 % harmed", "random_found_at_1", 3, False),
    ("fluent errors, found at 1 %", "fluent_found_at_1", 3, False),
    ("`repair`: put right", "random_put_right", 3, False),
    ("harmed by it", "random_harmed", 4, True),
    ("wrong after it", "random_wrong_after", 4, True),
)
WRITING = (
    ("ancestral: words that exist", "ancestral_known_words", 3, False),
    ("distinct", "ancestral_distinct", 3, None),
    ("nll under the judge", "ancestral_judge_nll", 3, True),
    ("remask: words that exist", "remask_known_words", 3, False),
    ("distinct", "remask_distinct", 3, None),
    ("nll under the judge", "remask_judge_nll", 3, True),
    ("fill: words that exist", "fill_known_words", 3, False),
    ("nll under the judge", "fill_judge_nll", 3, True),
)
TABLES = {"knowledge": KNOWLEDGE, "repair": REPAIR, "writing": WRITING}
PANELS = (
    ("masked_nll_15", "nll of masked characters, 15 % masked (nats)"),
    ("bits_per_character", "bound on bits a character"),
    ("random_found_at_1", "wrong characters found at 1 % harmed"),
    ("remask_known_words", "share of sampled words that exist (remask)"),
)
LEAST_RUNS = 3  # for a difference to be called one
# What |mean| / standard error exceeds by chance one time in twenty, from LEAST_RUNS runs on: Student's t.
CHANCE = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def values_of(runs: Iterable[dict[str, Any]], arm: str, figure: str) -> dict[int, float]:
    """A figure of an arm by seed, where it was measured."""
    found = {run["seed"]: run["figures"].get(figure) for run in runs if run["arm"] == arm}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def cell(
    runs: Sequence[dict[str, Any]],
    arm: str,
    figure: str,
    digits: int,
    is_less_better: bool | None,
    base: str,
) -> str:
    """Mean and standard deviation over seeds, in bold or in brackets where better or worse than ``base``."""
    values = values_of(runs, arm, figure)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    text = f"{statistics.mean(values.values()):.{digits}f}{spread}"
    sign = compared(values, values_of(runs, base, figure), is_less_better)
    return f"**{text}**" if sign > 0 else f"({text})" if sign < 0 else text


def compared(values: dict[int, float], base: dict[int, float], is_less_better: bool | None) -> int:
    """1 or -1 where an arm is better or worse than another by more than chance explains 19 times in 20; else 0.

    Equal seeds share initial weights and data, so differences are taken seed by seed; Student's t of their mean.
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    if len(differences) < LEAST_RUNS:
        return 0
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    least = CHANCE[min(len(differences) - LEAST_RUNS, len(CHANCE) - 1)]
    if is_less_better is None or abs(mean) <= least * error:
        return 0
    return 1 if (mean < 0) == is_less_better else -1


def table(runs: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, int, bool | None]]) -> str:
    """Arms by figures, in Markdown: an arm in italics begins a group, the others of which are compared with it."""
    bases = {run["arm"]: run["base"] for run in runs}
    lines = [f"| arm | {' | '.join(title for title, *_ in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for arm, base in bases.items():
        cells = [cell(runs, arm, *column, base) for _, *column in columns]
        lines.append(f"| {f'*{arm}*' if arm == base else arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Four figures by arm, a dot a seed and a bar at the mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure, panels = plt.subplots(2, 2, figsize=(12, 11), dpi=100, sharey=True, constrained_layout=True)
    for panel, (name, title) in zip(panels.flat, PANELS, strict=True):
        for place, arm in enumerate(arms):
            values = list(values_of(runs, arm, name).values())
            if values:
                panel.plot(values, [place] * len(values), "o", color="#0072b2", ms=5, alpha=0.7)
                panel.plot(
                    [statistics.mean(values)] * 2, [place - 0.35, place + 0.35], color="black", lw=1.5
                )
        panel.set_yticks(range(len(arms)), arms)
        panel.set_title(title)
        panel.grid(axis="x", alpha=0.3)
    panels[0, 0].invert_yaxis()
    figure.savefig(path)
    plt.close(figure)
