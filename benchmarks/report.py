"""Write the GPU figures of docs/gpu.md from the newest results file, and hold a file against the goals.
Takes seconds, and neither torch nor a GPU. Writes the page between its markers and
benchmarks/results/loss.png; with --goals nothing.

    python benchmarks/report.py              # the page's part between its markers, and its picture
    python benchmarks/report.py --goals [FILE.json]

Nothing between the markers is written by hand. A sample is refused there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from comparison.entries import BOTH, FORWARD
from reporting.goals import (
    COMPILED,
    EAGER,
    GOALS,
    LINEAR,
    LOSS,
    LOSS_AND_GRADIENT,
    STATES,
    NotMeasured,
    Table,
    evaluate,
)
from reporting.plot_loss import plot_entries
from reporting.result_files import FOLDER, ResultError, newest, read_result

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- gpu results -->", "<!-- end of gpu results -->"
PAGE = Path("docs/gpu.md")
PICTURE = FOLDER / "loss.png"
NOTHING = "No GPU result exists yet: none of this has been timed on a GPU."
MISSING = "-"


def page_part(document: dict[str, Any] | None, name: str = "") -> str:
    """What stands between the page's markers.

    Args:
        document: a results file's; None where there is none.
        name: of the file, in benchmarks/results.

    Raises:
        ResultError: the document is a sample.
    """
    if document is None:
        return NOTHING
    if document.get("sample"):
        raise ResultError(f"{name} is a sample: its figures are made up and not for {PAGE}")
    stages = document["stages"]
    blocks = [_loss_part(stages["loss"], name)] if "loss" in stages else []
    if "training" in stages:
        blocks.append(_training_part(stages["training"]))
    blocks += [
        _check_line(stage, stages[stage]) for stage in ("suite", "sanitizer", "graphs") if stage in stages
    ]
    return "\n\n".join(blocks) if blocks else NOTHING


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
                    " x ".join(map(str, s)), _share(table, s, LOSS, FORWARD), _share(table, s, LOSS_AND_GRADIENT, BOTH),
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


def updated(page: str, part: str) -> str:
    """The page with ``part`` between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ResultError(f"{PAGE} lacks the markers {BEGIN} and {END}")
    return f"{before}{begin}\n{part}\n{end}{after}"


def goals_text(document: dict[str, Any]) -> str:
    """One line per goal."""
    loss = document["stages"].get("loss")
    head = "figures are made up: a sample\n" if document.get("sample") else ""
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
        page = ROOT / PAGE
        part = page_part(document, path.name if path else "")
        if document and "loss" in document["stages"]:
            stage = document["stages"]["loss"]
            facts = stage["environment"]
            plot_entries(stage["entries"], PICTURE, f"{facts['device']}, {facts['date'][:10]}")
        page.write_text(updated(page.read_text(encoding="utf-8"), part), encoding="utf-8")
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{PAGE}: {path.name if path else NOTHING}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
