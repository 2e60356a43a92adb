"""What moves over the steps of a run, as lines of text: a table of values, and a small picture of each quantity."""

from __future__ import annotations

from typing import Any

from difftrain.config import Config
from difftrain.config.schedules import PENALTIES
from difftrain.schedule import value_of

ROWS, COLUMNS, HEIGHT = 10, 60, 6  # of the table, and of a picture


def schedule_lines(config: Config) -> list[str]:
    """The lines that ``difftrain schedule`` prints, at most 80 columns wide for up to three quantities.

    A quantity that waits for a metric is shown as if each evaluation met it: no run moves it sooner.
    """
    names = [*(PENALTIES if config.has_penalties else ()), "learning_rate"]
    names += [name for name in config.scheduled if name not in names]
    reached = soonest(config)
    last = config.max_iters - 1
    rows = sorted({round(last * i / ROWS) for i in range(ROWS + 1)})
    columns = min(COLUMNS, config.max_iters)
    across = [round(last * i / max(1, columns - 1)) for i in range(columns)]
    values = {name: [_at(name, step, config, reached) for step in rows] for name in names}
    widths = [max(len(name), 9) for name in names]
    lines = ["      step  " + "  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True))]
    for i, step in enumerate(rows):
        cells = (f"{values[name][i]:.4g}".rjust(w) for name, w in zip(names, widths, strict=True))
        lines.append(f"{step:>10}  " + "  ".join(cells))
    for name in names:
        shown = [_at(name, step, config, reached) for step in across]
        lines += ["", f"{name}: {_said(name, config)}", *_picture(shown, last)]
    return lines


def soonest(config: Config) -> dict[str, list[list[int]]]:
    """The moves, [stage, step] each, of the schedules that wait for a metric, if every evaluation meets it."""
    moves: dict[str, list[list[int]]] = {}
    for name, table in config.scheduled.items():
        if table["shape"] != "metric":
            continue
        moves[name], free = [], table["after"]
        for stage in range(1, len(table["values"])):
            step = -(-free // config.eval_interval) * config.eval_interval
            moves[name].append([stage, step])
            free = step + max(1, table["steps"])
    return moves


def _at(name: str, step: int, config: Config, moves: dict[str, list[list[int]]]) -> float:
    done = [move for move in moves.get(name, []) if move[1] <= step]
    return value_of(name, step, config, {name: done[-1]} if done else {})


def _said(name: str, config: Config) -> str:
    """How a quantity moves, in a line."""
    if name not in config.scheduled:
        return "by its own options"
    table: dict[str, Any] = config.scheduled[name]
    if table["shape"] != "metric":
        return table["shape"]
    side = "below" if table["below"] else "above"
    bounds = ", ".join(f"{bound:g}" for bound in table[side])
    return f"at the soonest; moves on where an evaluation has {table['metric']} {side} {bounds}"


def _picture(values: list[float], last: int) -> list[str]:
    low, high = min(values), max(values)
    if low == high:
        return [f"{low:>10.4g} |{'*' * len(values)}"]
    heights = [round((value - low) / (high - low) * (HEIGHT - 1)) for value in values]
    lines = []
    for row in range(HEIGHT - 1, -1, -1):
        label = f"{low + row / (HEIGHT - 1) * (high - low):.4g}" if row in (0, HEIGHT - 1) else ""
        marks = "".join("*" if height == row else " " for height in heights)
        lines.append(f"{label:>10} |{marks}".rstrip())
    return [*lines, f"{'':>10} +{'-' * len(values)}", f"{'step':>10}  0{str(last).rjust(len(values) - 1)}"]
