"""Schedules as a configuration has them: a table of shapes, read and checked; difftrain/schedule.py says what they give."""

from __future__ import annotations

from typing import Any, NamedTuple

from difftrain.config.toml import inline, parse_toml
from difftrain.errors import UserError, near_matches

KINDS, ANSWERS = ("masked", "intact", "corrupted"), ("mask", "target", "other")  # those of the case table
PENALTIES = {"penalty_keep_mask": (0, 0), "penalty_mask_correct": (1, 0)}  # and the cells that they weigh
CASE_WEIGHTS = {
    f"weight_{kind}_{answer}": (k, a)
    for k, kind in enumerate(KINDS)
    for a, answer in enumerate(ANSWERS)
    if (k, a) not in PENALTIES.values()
}
CORRUPTION = ("guaranteed_correct_factor", "mask_factor", "replace_factor")
ANYWHERE = ("label_smoothing", "learning_rate", "weight_decay")  # whatever the recipe and the mode
QUANTITIES = (*PENALTIES, *CASE_WEIGHTS, *CORRUPTION, "self_errors", *ANYWHERE)

# Where an evaluation's record has the figures that a schedule may wait for.
CAUSAL_METRICS: dict[str, tuple[str, ...]] = {name: (name,) for name in ("nll", "loss_final")}
METRICS = CAUSAL_METRICS | {
    f"masked_nll.{level}": ("masked_nll", level) for level in ("15", "50", "85", "training")
}
METRICS |= {
    f"cases.{kind}.{figure}": ("cases", kind, figure)
    for kind in KINDS
    for figure in (*ANSWERS, "nll", "gap")
}
EVERYWHERE = (
    "mask_everywhere"  # the share of [MASK] among the answers to masked or to right words, the smaller one
)

RAMP = ("from", "to", "after", "steps")
KEYS = {
    "constant": ("value",),
    "linear": RAMP,
    "cosine": RAMP,
    "step": ("at", "values"),
    "points": ("at", "values"),
    "metric": ("metric", "below", "above", "values", "after", "steps"),
}
LARGEST = 3.4e38  # what fp32 holds
STEP_KEYS = ("after", "steps", "at")


class Quantity(NamedTuple):
    """What a schedule may move: where it goes unless told, and the range it must stay in."""

    usual: float
    low: float | None
    high: float | None


def schedules_text(value: Any) -> str:
    """A table of schedules, or such a table as TOML text, as text in one line; raises UserError."""
    return inline(_tables(value), "schedules")


def _tables(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        is_inline = value.lstrip().startswith("{")
        value = parse_toml(f"schedules = {value}" if is_inline else value, "schedules")
        value = value.get("schedules") if is_inline and len(value) == 1 else value
    if not isinstance(value, dict):
        raise UserError(f"schedules must be a table, got {type(value).__name__} {value!r}")
    return value


def scaled(text: str, share: float) -> str:
    """The schedules of a run that is ``share`` times as long; what is not 0 steps stays at least 1."""

    def shorter(steps: Any) -> Any:
        return (
            [shorter(each) for each in steps]
            if isinstance(steps, list)
            else steps and max(1, round(share * steps))
        )

    tables = {
        name: {key: shorter(item) if key in STEP_KEYS else item for key, item in table.items()}
        for name, table in _tables(text).items()
    }
    return inline(tables, "schedules")


def checked_schedules(
    text: str, options: dict[str, tuple[Any, Any, Any]], *, has_penalties: bool, is_causal: bool
) -> dict[str, dict[str, Any]]:
    """The tables of ``schedules``, checked and with every key that their shape has.

    Args:
        text: what :func:`schedules_text` gave.
        options: value, lowest and highest value of each option of the configuration.
        has_penalties: without them, what weighs cases and how much is corrupted cannot move.
        is_causal: whether the mode is gpt2, whose evaluations have fewer figures.

    Raises:
        UserError: an unknown name, key or shape, or a value of the wrong kind or out of range.
    """
    metrics = tuple(CAUSAL_METRICS if is_causal else (*METRICS, EVERYWHERE))
    found = {}
    for name, table in _tables(text).items():
        if name not in QUANTITIES:
            hint = near_matches(name, list(QUANTITIES)) or f"; there are {', '.join(QUANTITIES)}"
            raise UserError(f"schedules must name quantities that can move, got {name!r}{hint}")
        if not has_penalties and name not in ANYWHERE:
            raise UserError(
                f"schedules must be of {', '.join(ANYWHERE)} where no answer has a weight (mode gpt2, recipes "
                f"llada and mdlm), got {name}"
            )
        quantity = Quantity(1.0, 0.0, LARGEST) if name in CASE_WEIGHTS else Quantity(*options[name])
        found[name] = _checked(f"schedules.{name}", table, quantity, metrics)
    return found


def _checked(name: str, table: Any, quantity: Quantity, metrics: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UserError(f"{name} must be a table with a shape, got {type(table).__name__} {table!r}")
    shape = table.get("shape")
    if not isinstance(shape, str) or shape not in KEYS:
        hint = near_matches(shape, list(KEYS)) if isinstance(shape, str) else ""
        raise UserError(f"{name}.shape must be one of {', '.join(KEYS)}, got {shape!r}{hint}")
    keys = KEYS[shape]
    for key in table:
        if key != "shape" and key not in keys:
            hint = near_matches(key, list(keys))
            raise UserError(
                f"{name} must have of {', '.join(keys)} for the shape {shape}, got {key!r}{hint}"
            )
    usual: dict[str, Any] = {"value": quantity.usual, "to": quantity.usual, "after": 0}
    usual |= {"steps": 0, "below": None, "above": None} if shape == "metric" else {}
    full = {key: usual[key] for key in keys if key in usual} | table
    for key in keys:
        if key not in full:
            raise UserError(f"{name} must have the key {key} for the shape {shape}, got {', '.join(table)}")
    for key in {"value", "from", "to"} & full.keys():
        full[key] = _number(f"{name}.{key}", full[key], quantity)
    for key in {"after", "steps"} & full.keys():
        _whole(f"{name}.{key}", full[key])
    if "values" in full:
        full["values"] = _numbers(f"{name}.values", full["values"], quantity)
    if "at" in full:
        _check_steps(name, full, 1 if shape == "step" else 0)
    return _with_bounds(name, full, metrics) if shape == "metric" else full


def _check_steps(name: str, table: dict[str, Any], more: int) -> None:
    at, n_values = table["at"], len(table["values"])
    if not isinstance(at, list) or not at:
        raise UserError(f"{name}.at must be a list of steps, got {at!r}")
    for step in at:
        _whole(f"{name}.at", step)
    if at != sorted(at):
        raise UserError(f"{name}.at must be a list of steps that rise, got {at}")
    if n_values != len(at) + more:
        raise UserError(
            f"{name}.values must be {len(at) + more} numbers for {len(at)} steps in at, got {n_values}"
        )


def _with_bounds(name: str, table: dict[str, Any], metrics: tuple[str, ...]) -> dict[str, Any]:
    """The table with a list in ``below`` or ``above``: a bound for each value after the first."""
    metric, n_values = table["metric"], len(table["values"])
    if metric not in metrics:
        hint = near_matches(metric, list(metrics)) if isinstance(metric, str) else ""
        raise UserError(f"{name}.metric must be one of {', '.join(metrics)}, got {metric!r}{hint}")
    if n_values < 2:
        raise UserError(f"{name}.values must be at least 2 numbers for the shape metric, got {n_values}")
    given = [key for key in ("below", "above") if table[key] is not None]
    if len(given) != 1:
        raise UserError(f"{name} must have either below or above, got {' and '.join(given) or 'neither'}")
    key, any_number = given[0], Quantity(0.0, None, None)
    bounds = table[key] if isinstance(table[key], list) else [table[key]] * (n_values - 1)
    bounds = _numbers(f"{name}.{key}", bounds, any_number)
    if len(bounds) != n_values - 1:
        raise UserError(
            f"{name}.{key} must be a number or {n_values - 1} for {n_values} values, got {len(bounds)}"
        )
    return table | {key: bounds}


def _numbers(name: str, values: Any, quantity: Quantity) -> list[float]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{name} must be a list of numbers, got {values!r}")
    return [_number(name, value, quantity) for value in values]


def _number(name: str, value: Any, quantity: Quantity) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not abs(value) <= LARGEST:
        raise UserError(f"{name} must be finite, got {value}")
    if quantity.low is not None and value < quantity.low:
        raise UserError(f"{name} must be at least {quantity.low}, got {value}")
    if quantity.high is not None and value > quantity.high:
        raise UserError(f"{name} must be at most {quantity.high}, got {value}")
    return float(value)


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise UserError(f"{name} must be a whole number of steps, 0 or more, got {value!r}")
