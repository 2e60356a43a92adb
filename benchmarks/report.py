"""Write the GPU figures of README.md and docs/gpu.md from the newest results file, and hold a file against the goals.
Takes seconds, and neither torch nor a GPU. Writes the pages between their markers and
benchmarks/results/loss.png; with --goals nothing.

    python benchmarks/report.py              # the pages' parts between their markers, and the picture
    python benchmarks/report.py --goals [FILE.json]

Nothing between the markers is written by hand. A sample or a rehearsal is refused there, and so are
figures of other kernels than the checkout's: then the pages say so, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from comparison.entries import BOTH, FORWARD
from reporting.goals import (
    COMPILED,
    EAGER,
    GOALS,
    LINEAR,
    LOSS,
    STATES,
    NotMeasured,
    Table,
    evaluate,
)
from reporting.pages import put_between
from reporting.plot_loss import plot_entries
from reporting.predictions import beside
from reporting.result_files import FOLDER, Outdated, ResultError, newest, read_result, shown_stages

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- gpu results -->", "<!-- end of gpu results -->"
PAGE, README = Path("docs/gpu.md"), Path("README.md")
PICTURE = FOLDER / "loss.png"
NOTHING = "No GPU result exists yet: none of this has been timed on a GPU."
OUTDATED = "The newest GPU result is of older kernels, so its figures are not shown: `python benchmarks/gpu_session.py` measures anew."
MISSING = "-"
# Stages of which a line says what they came to.
CHECKS = ("kernels", "compile", "linear", "trainer", "graphs", "sanitizer")


def page_part(document: dict[str, Any] | None, name: str = "") -> str:
    """What stands between the markers of docs/gpu.md.

    Args:
        document: a results file's; None where there is none.
        name: of the file, in benchmarks/results.

    Raises:
        ResultError: the document is a sample or a rehearsal.
    """
    try:
        stages = shown_stages(document, name) if document else {}
    except Outdated:
        return OUTDATED
    parts = {
        "loss": partial(_loss_part, name=name),
        "training": _training_part,
        "sizes": _sizes_part,
        "memory": _memory_part,
    }
    blocks = [
        part(stages[stage])
        for stage, part in parts.items()
        if stage in stages and _has_figures(stages[stage])
    ]
    blocks += [_check_line(stage, stages[stage]) for stage in CHECKS if stage in stages]
    return "\n\n".join(blocks) if blocks else NOTHING


def _has_figures(stage: dict[str, Any]) -> bool:
    """A stage that failed or hung has none."""
    return bool({"entries", "runs", "rows"} & stage.keys())


def readme_part(document: dict[str, Any] | None, name: str = "") -> str:
    """What stands between the markers of README.md: the sentence that says what is known, or two figures a row.

    Raises:
        ResultError: as :func:`page_part`.
    """
    try:
        stages = shown_stages(document, name) if document else {}
    except Outdated:
        return OUTDATED
    if "loss" not in stages:
        return NOTHING
    table = Table(stages["loss"]["entries"])
    rows = [
        [" x ".join(map(str, s)), _share(table, s, LOSS, FORWARD), _share(table, s, LOSS, BOTH), _peer(table, s)]
        for s in dict.fromkeys(tuple(e["shape"]) for e in table.entries)
        if len(s) == 2
    ]  # fmt: skip
    head = [
        "N x V",
        "forward, ms (% of the limit)",
        "loss and gradient, ms (% of the limit)",
        "best peer, ms",
    ]
    source = _source(stages["loss"], name).replace("../benchmarks", "benchmarks")
    return f"{source}\n\n{_rows(head, rows)}"


def _loss_part(stage: dict[str, Any], name: str) -> str:
    table = Table(stage["entries"])
    parts = [_source(stage, name)]
    shapes = list(dict.fromkeys(tuple(e["shape"]) for e in table.entries))
    logits, linear = ([s for s in shapes if len(s) == length] for length in (2, 3))
    if logits:
        parts.append(
            "Loss and gradient, ms; in brackets the per cent of what a copy of the least bytes takes "
            "(forward: the logits read once; with the gradient: also written once):"
        )
        parts.append(_rows(
            ["N x V", "ours, forward", "ours", "best peer with the same loss", COMPILED, "eager"],
            [
                [
                    " x ".join(map(str, s)), _share(table, s, LOSS, FORWARD), _share(table, s, LOSS, BOTH),
                    _peer(table, s), _ms(table, s, COMPILED), _ms(table, s, EAGER),
                ]
                for s in logits
            ],
        ))  # fmt: skip
    if linear:
        parts.append(
            "From hidden states, ms; in brackets the multiple of the three plain matrix products. "
            "MiB are beside inputs and gradients:"
        )
        parts.append(_rows(
            ["N x D x V", "ours", "ours, MiB", COMPILED, "eager", "eager, MiB"],
            [
                [
                    " x ".join(map(str, s)), _multiple(table, s, LINEAR), _extra(table, s, LINEAR),
                    _multiple(table, s, COMPILED), _multiple(table, s, EAGER), _extra(table, s, EAGER),
                ]
                for s in linear
            ],
        ))  # fmt: skip
    compared = beside(table.entries, stage["environment"]["device"])
    if compared:
        parts.append(
            "Measured beside what [the notes](../benchmarks/NOTES.md) predicted before:\n\n" + compared
        )
    parts.append(f"![time of every contender on every shape](../benchmarks/results/{PICTURE.name})")
    verdicts = evaluate(GOALS, stage["entries"])
    counts = Counter(v.state for v in verdicts)
    counted = ", ".join(f"{counts[state]} {state}" for state in STATES)
    parts.append(f"Goals (`benchmarks/reporting/goals.py`, set for one H100): {counted}.")
    parts.append(
        "\n".join(["| goal | outcome |", "|---|---|", *(f"| {v.goal} | {v.outcome} |" for v in verdicts)])
    )
    return "\n\n".join(parts)


def _source(stage: dict[str, Any], name: str) -> str:
    e = stage["environment"]
    return (
        f"{e['device']}, driver {e['driver']}, torch {e['torch']}, triton {e['triton']}, commit {e['commit']}, "
        f"{e['date'][:10]}, bf16; `{e['command']}`, [all figures](../benchmarks/results/{name})."
    )


def _training_part(stage: dict[str, Any]) -> str:
    e = stage["environment"]
    head = f"{stage['what']}; {e['device']}, torch {e['torch']}, commit {e['commit']}, {e['date'][:10]}:"
    rows = []
    for impl, run in stage["runs"].items():
        if "failure" in run:
            rows.append([impl, run["failure"], MISSING, MISSING])
        else:
            rows.append(
                [
                    impl,
                    f"{run['tokens_per_second']:,.0f}",
                    f"{run['peak_memory_mib']:,.0f}",
                    run["agreement"],
                ]
            )
    return f"{head}\n\n" + _rows(["loss", "tokens/s", "peak MiB", "curve beside the reference's"], rows)


def _sizes_part(stage: dict[str, Any]) -> str:
    e = stage["environment"]
    head = f"A step of GPT-2 small by tokens in it, ms and peak MiB; {e['device']}, commit {e['commit']}:"
    rows = [
        [f"{r['tokens']:,}", r["impl"], *([r["failure"], MISSING] if r["failure"] else [f"{r['ms']:.1f}", f"{r['peak_mib']:,.0f}"])]
        for r in stage["rows"]
    ]  # fmt: skip
    return f"{head}\n\n" + _rows(["tokens", "loss", "ms", "peak MiB"], rows)


def _memory_part(stage: dict[str, Any]) -> str:
    e = stage["environment"]
    head = f"Memory beside inputs and gradients, MiB; {e['device']}, commit {e['commit']}:"
    rows = [
        [
            f"{r['positions']:,}",
            r["contender"],
            r.get("failure") or f"{r['peak_mib'] - r['gradients_mib']:,.0f}",
        ]
        for r in stage["rows"]
    ]
    return f"{head}\n\n" + _rows(["positions", "loss", "MiB"], rows)


def _check_line(name: str, stage: dict[str, Any]) -> str:
    return f"{name}: {stage['summary']} (commit {stage['environment']['commit']})."


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(make: Any) -> str:
    try:
        return make()
    except NotMeasured:
        return MISSING


def _share(table: Table, shape: tuple[int, ...], contender: str, measure: str) -> str:
    def cell() -> str:
        entry = table.entry(shape, contender, measure)
        return f"{entry['ms']:.3f} ({entry['percent_of_limit']:.0f} %)"

    return _cell(cell)


def _ms(table: Table, shape: tuple[int, ...], contender: str) -> str:
    return _cell(lambda: f"{table.ms(shape, contender):.3f}")


def _peer(table: Table, shape: tuple[int, ...]) -> str:
    def cell() -> str:
        peer = table.best_peer(shape)
        return f"{peer['ms']:.3f}, {peer['contender']}"

    return _cell(cell)


def _multiple(table: Table, shape: tuple[int, ...], contender: str) -> str:
    def cell() -> str:
        entry = table.entry(shape, contender, BOTH)
        return f"{entry['ms']:.2f} ({entry['times_the_products']:.2f} x)"

    return _cell(cell)


def _extra(table: Table, shape: tuple[int, ...], contender: str) -> str:
    def cell() -> str:
        entry = table.entry(shape, contender, BOTH)
        return f"{entry['peak_mib'] - entry['gradients_mib']:,.0f}"

    return _cell(cell)


def goals_text(document: dict[str, Any]) -> str:
    """One line per goal."""
    loss = document["stages"].get("loss")
    head = "figures are made up: a sample\n" if document.get("sample") else ""
    head += "figures are no measurements: a rehearsal\n" if document.get("rehearsal") else ""
    device = (loss or document)["environment"]["device"]
    if "H100" not in device:
        head += f"the goals are set for an H100; these figures are of {device}\n"
    verdicts = evaluate(GOALS, loss["entries"] if loss else [])
    return head + "\n".join(f"{v.goal}: {v.outcome}" for v in verdicts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--goals",
        nargs="?",
        const="",
        metavar="FILE",
        help="print the goals beside a results file [the newest]",
    )
    options = parser.parse_args(arguments)
    try:
        path = Path(options.goals) if options.goals else newest()
        document = read_result(path) if path else None
        if options.goals is not None:
            print(goals_text(document) if document else NOTHING)
            return 0
        name = path.name if path else ""
        put_between(ROOT / PAGE, BEGIN, END, page_part(document, name))
        put_between(ROOT / README, BEGIN, END, readme_part(document, name))
        stages = shown_stages(document, name) if document else {}
        if "loss" in stages:
            facts = stages["loss"]["environment"]
            plot_entries(stages["loss"]["entries"], PICTURE, f"{facts['device']}, {facts['date'][:10]}")
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{README} and {PAGE}: {path.name if path else NOTHING}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
