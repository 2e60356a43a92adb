"""What ``difftrain evaluate`` has found, as lines of text."""

from __future__ import annotations

from typing import Any

NAMES = {
    "exact": "likelihood, exact",
    "mdlm": "likelihood, bound by a continuous level (mdlm)",
    "llada": "likelihood, bound by the number of masks (llada)",
}
TITLES = {
    "found": "found, answered [MASK]",
    "corrected": "answered right",
    "harmed": "intact, answered [MASK]",
    "kept": "intact, left as it is",
}


def lines_of(record: dict[str, Any]) -> list[str]:
    """The record of :func:`difftrain.evaluation.of_run.evaluate_run`, at most 100 characters a line."""
    lines = [
        f"{record['run']}, step {record['step']}, on {record['data']}: {record['windows']:,} of "
        f"{record['windows_in_text']:,} windows, {record['tokens']:,} tokens, seed {record['seed']}",
        f"unigram entropy {record['unigram_entropy']:.4f} nats a token",
        "",
        "loss, corrupted as in training" if record["mode"] == "diffusion" else "loss",
        *_loss_lines(record["loss"]),
    ]
    if "validation" in record:
        lines += [f"loss, the run's validation set {record['validation']['id']}"]
        lines += _loss_lines(record["validation"]["loss"])
    if "masked" in record:
        lines += ["", "masked       nll, nats a masked token       restored exactly"]
        for level, figures in record["masked"].items():
            lines.append(
                f"{level + ' %':>6}       {_number(figures['nll']):<22}   {_share(figures['restored'])}"
            )
    if "repair" in record:
        names = list(next(iter(record["repair"].values())))
        lines += ["", "wrong        " + "".join(f"{TITLES[name]:<25}" for name in names).rstrip()]
        for share, figures in record["repair"].items():
            cells = "".join(f"{_share(figures[name]):<25}" for name in names)
            lines.append(f"{share + ' %':>6}       {cells}".rstrip())
    lines.append("")
    for name, figures in record["likelihood"].items():
        parts = [f"{_number(figures['nats_per_token'])} nats a token"]
        for unit in ("character", "byte"):
            if f"bits_per_{unit}" in figures:
                parts.append(f"{_number(figures[f'bits_per_{unit}'])} bits a {unit}")
        draws = f", {figures['draws']} draws a window" if "draws" in figures else ""
        lines += [f"{NAMES[name]}{draws}", *(f"  {part}" for part in parts)]
    return lines


def _loss_lines(losses: list[dict[str, Any]]) -> list[str]:
    return [
        f"  {entry['loss']:.5f} at pk {entry['pk']:g}, pm {entry['pm']:g} ({entry['penalties']})"
        for entry in losses
    ]


def _number(figure: dict[str, float | None], scale: float = 1.0, digits: int = 4, unit: str = "") -> str:
    value, error = figure["value"], figure["standard_error"]
    if value is None:
        return "none"
    spread = "" if error is None else f" +- {scale * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}{unit}"


def _share(figure: dict[str, float | None]) -> str:
    return _number(figure, 100.0, 2, " %")
