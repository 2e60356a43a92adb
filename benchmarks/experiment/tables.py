"""The experiment's figures as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Tables of the page: title of each column, figure, digits, and whether less is better.
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
    ("nll under the judge", "ancestral_judge_nll", 3, True),
    ("fill: words that exist", "fill_known_words", 3, False),
    ("nll under the judge", "fill_judge_nll", 3, True),
)
TABLES = {"knowledge": KNOWLEDGE, "repair": REPAIR, "writing": WRITING}
PANELS = (
    ("masked_nll_15", "nll of masked characters, 15 % masked (nats)"),
    ("bits_per_character", "bound on bits a character"),
    ("random_found_at_1", "wrong characters found at 1 % harmed"),
    ("ancestral_known_words", "share of sampled words that exist"),
)
LEAST_RUNS = 3  # for a difference to be called one


def values_of(runs: Iterable[dict[str, Any]], arm: str, figure: str) -> dict[int, float]:
    """A figure of an arm by seed, where it was measured."""
    found = {run["seed"]: run["figures"].get(figure) for run in runs if run["arm"] == arm}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def cell(
    runs: Sequence[dict[str, Any]], arm: str, figure: str, digits: int, is_less_better: bool, base: str
) -> str:
    """Mean and standard deviation over seeds, in bold or in brackets where each seed is better or worse than ``base``."""
    values = values_of(runs, arm, figure)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    text = f"{statistics.mean(values.values()):.{digits}f}{spread}"
    sign = compared(values, values_of(runs, base, figure), is_less_better)
    return f"**{text}**" if sign > 0 else f"({text})" if sign < 0 else text


def compared(values: dict[int, float], base: dict[int, float], is_less_better: bool) -> int:
    """1 or -1 where an arm is better or worse than another with every seed, and by more than the spread of that; else 0.

    Equal seeds share initial weights and data, so differences are taken seed by seed. They must all have one
    sign, and their mean must be at least twice its standard error.
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    if len(differences) < LEAST_RUNS:
        return 0
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) < 2 * error or len({d > 0 for d in differences}) > 1 or mean == 0:
        return 0
    return 1 if (mean < 0) == is_less_better else -1


def table(runs: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, int, bool]], base: str) -> str:
    """Arms by figures, in Markdown."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    lines = [f"| arm | {' | '.join(title for title, *_ in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for arm in arms:
        cells = [cell(runs, arm, *column, base) for _, *column in columns]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Four figures by arm, a dot a seed and a bar at the mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), dpi=100, sharey=True, constrained_layout=True)
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
