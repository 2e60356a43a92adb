"""The report's words and tables: figures, warnings, samples, what was run. Every text of a run is escaped here."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from difftrain.reporting.health import PAGE, number
from difftrain.reporting.lines import verdict
from difftrain.reporting.page.drawing import as_text
from difftrain.reporting.runs import RunFolder

SESSION_FACTS = {
    "device": "device", "dtype": "number format", "processes": "processes", "parameters": "parameters",
    "train_tokens": "training tokens", "val_tokens": "validation tokens", "vocabulary": "vocabulary, [MASK] included",
    "difftrain": "difftrain", "torch": "torch", "triton": "triton", "python": "Python", "system": "system",
    "host": "machine",
}  # fmt: skip


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plain(value: Any) -> str:
    """An option's value as TOML and a command line have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    """A table of texts, which are escaped; the first column names the rows. ``kind`` is "figures" or "facts"."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(_cell(cell) for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    is_number = text[:1].isdigit() or text[:1] in ("–", "-")
    return f"<td>{escape(text)}</td>" if is_number else f'<td class="text">{escape(text)}</td>'


def figures_of(run: RunFolder) -> dict[str, float | None]:
    """The final figures of a run: those of its last evaluation."""
    last = run.evals[-1] if run.evals else {}
    speeds = [speed for r in run.train if (speed := number(r, "tokens_per_second")) is not None]
    figures = {
        "loss at the final penalties": number(last, "loss_final"),
        "nll, no penalties": number(last, "nll"),
        **{f"nll, {level} % masked": number(last, "masked_nll", level) for level in ("15", "50", "85")},
        "nll, masked as in training": number(last, "masked_nll", "training"),
        "unigram entropy": number(last, "unigram_entropy"),
        "masked filled in right, %": _percent(number(last, "cases", "masked", "target")),
        "right words left alone, %": _percent(number(last, "cases", "intact", "target")),
        "wrong words flagged, %": _percent(number(last, "cases", "corrupted", "mask")),
        "wrong words put right, %": _percent(number(last, "cases", "corrupted", "target") or None),
        "tokens a second, median": statistics.median(speeds) if speeds else None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def opening_part(run: RunFolder) -> str:
    """How far the run is, the verdict, the main figures, and the evaluations as a table."""
    planned = f" of {run.config.max_iters:,}" if run.config else ""
    state = f"{run.step:,}{planned} steps, {run.state}, wall time {duration(run.seconds)}"
    parts = [f"<p>{escape(state)}</p>"]
    if len(run.validation_ids) > 1:
        ids = ", ".join(run.validation_ids)
        parts.append(
            f"<p>The validation set changed on the way ({escape(ids)}): figures before and after do not compare.</p>"
        )
    if not run.evals:
        return "\n".join([*parts, "<p>There is no evaluation yet.</p>"])
    parts.append(f'<p class="lead">{escape(_sentence(verdict(run.evals[-1])))}</p>')
    tiles = (
        f"<li><b>{as_text(value)}</b><span>{escape(name)}</span></li>"
        for name, value in figures_of(run).items()
    )
    parts.append(f'<ul class="tiles">{"".join(tiles)}</ul>')
    return "\n".join([*parts, _evaluations(run)])


def _sentence(text: str) -> str:
    text = text.removeprefix("verdict: ")
    return f"{text[:1].upper()}{text[1:]}."


def _evaluations(run: RunFolder) -> str:
    """Losses and the table of cases of each evaluation, counts and rates."""
    rows = []
    for record in run.evals:
        keys = [
            ("loss",),
            ("loss_final",),
            ("nll",),
            ("masked_nll", "15"),
            ("masked_nll", "50"),
            ("masked_nll", "85"),
        ]
        cells = [as_text(number(record, *key)) for key in keys]
        for kind in ("masked", "intact", "corrupted"):
            n = number(record, "cases", kind, "n")
            shares = [number(record, "cases", kind, answer) for answer in ("mask", "target", "other")]
            counts = [as_text(None if n is None or s is None else round(n * s)) for s in shares]
            cells += [
                f"{c} ({s:.1%})" if s is not None else "–" for c, s in zip(counts, shares, strict=True)
            ]
        rows.append([f"{record['step']:,}", *cells])
    names = {"masked": "masked", "intact": "right word", "corrupted": "wrong word"}
    answers = [f"{name}: {a}" for name in names.values() for a in ("[MASK]", "target", "other")]
    head = ["step", "loss", "at final penalties", "no penalties", "nll 15 %", "50 %", "85 %", *answers]
    shown = table("Each evaluation of the fixed validation set; answers as counts and shares", head, rows)
    return f"<details><summary>every evaluation as a table, with the 3 × 3 table of cases</summary>{shown}</details>"


def warnings_part(run: RunFolder) -> str:
    """Each warning with its step, what it means and what to do."""
    entries = [
        f"<li><strong>Step {w.step:,}: {escape(w.message)}.</strong> {escape(w.kind.meaning)} "
        f"{escape(w.kind.remedy)} <small>({escape(PAGE)}#{w.kind.anchor})</small></li>"
        for w in run.warnings
    ]
    if not entries:
        return "<section><h2>Warnings</h2><p>None.</p></section>"
    return f'<section><h2>Warnings</h2><ul class="warnings">{"".join(entries)}</ul></section>'


def samples_part(run: RunFolder) -> str:
    """The texts that were sampled, by checkpoint."""
    texts = run.samples()
    if not texts:
        return (
            "<section><h2>Samples</h2><p>None are kept in this run. <code>difftrain sample RUN --checkpoint STEP</code> "
            "writes one, and the next report shows it.</p></section>"
        )
    shown = "".join(
        f"<details{' open' if i == len(texts) - 1 else ''}><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for i, (name, text) in enumerate(texts)
    )
    return f"<section><h2>Samples by checkpoint</h2>{shown}</section>"


def facts_part(run: RunFolder, heading: str = "What was run") -> str:
    """Device, versions, data, and the options that differ from the defaults."""
    start = next((e for e in reversed(run.sessions) if e["event"] == "start"), {})
    facts = {
        "folder": str(run.path),
        "steps": f"{run.step:,}",
        "state": run.state,
        "wall time": duration(run.seconds),
    }
    facts |= {"configuration": run.digest, "validation set": ", ".join(run.validation_ids) or "none"}
    if run.config:
        facts["data"] = run.config.data
    for key, name in SESSION_FACTS.items():
        if key in start:
            facts[name] = f"{start[key]:,}" if type(start[key]) is int else plain(start[key])
    if isinstance(start.get("data"), dict):
        facts |= {f"SHA-256 of {k}": plain(v) for k, v in start["data"].items() if str(k).endswith(".bin")}
    starts = [f"step {e.get('step')}, {_date(e)}" for e in run.sessions if e["event"] == "start"]
    if starts:
        facts["started"] = "; ".join(starts)
    changes = [[key, plain(value)] for key, value in run.changes.items()]
    options = (
        table("Options that differ from the defaults", ["option", "value"], changes, "facts")
        if run.values
        else "<p>The configuration cannot be read.</p>"
    )
    return (
        f"<section><h2>{escape(heading)}</h2>"
        f"{table('The run', ['what', 'value'], [[k, v] for k, v in facts.items()], 'facts')}{options}</section>"
    )


def _date(entry: dict[str, Any]) -> str:
    seconds = number(entry, "time")
    return (
        "at an unknown time"
        if seconds is None or not 0 <= seconds < 1e11
        else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    )


def comparison_parts(runs: Sequence[RunFolder], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the pictures of several runs, and what after them."""
    figures = [figures_of(run) for run in runs]
    keys = list(dict.fromkeys(key for each in figures for key in each))
    head = ["run", "steps", "state", "wall time", *keys]
    rows = [
        [name, f"{run.step:,}", run.state, duration(run.seconds), *(as_text(each.get(key)) for key in keys)]
        for name, run, each in zip(names, runs, figures, strict=True)
    ]
    before = [table("Final figures: of each run's last evaluation", head, rows), _differences(runs, names)]
    ids = {"".join(run.validation_ids[-1:]) for run in runs}
    if len(ids) > 1:
        before.insert(
            0,
            '<p class="lead">These runs were measured on different validation sets: their figures do not compare.</p>',
        )
    after = []
    for name, run in zip(names, runs, strict=True):
        inner = warnings_part(run) + facts_part(run)
        after.append(
            f"<details><summary>{escape(name)}: warnings, device, versions, options</summary>{inner}</details>"
        )
    return before, after


def _differences(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The options in which the runs differ."""
    values = [run.values | {"out_dir": None} for run in runs]
    keys = dict.fromkeys(key for each in values for key in each)
    rows = [
        [key, *cells]
        for key in keys
        if len(set(cells := [plain(each.get(key, "–")) for each in values])) > 1
    ]
    if not rows:
        return "<p>The runs have the same configuration.</p>"
    return table("Options in which the runs differ", ["option", *names], rows)
