"""Which pictures a report has: of one run everything it recorded, of several the same figure of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from difftrain.config.schedules import QUANTITIES
from difftrain.reporting.health import RUNAWAY_GAP, number
from difftrain.reporting.page.drawing import Line, Picture, Points
from difftrain.reporting.runs import RunFolder

Records = Sequence[dict[str, Any]]
KINDS = {"masked": "masked positions", "intact": "right words", "corrupted": "wrong words"}
ANSWERS = {"mask": "[MASK]", "target": "the target", "other": "another word"}
ANSWER_COLOURS = {"target": 2, "mask": 0, "other": 1}
LEVELS = {"15": "15 % masked", "50": "50 % masked", "85": "85 % masked", "training": "as in training"}
NATS = "nats a position"
# What has a picture of its own, or is no figure of the model; other numbers are drawn as they are found.
KNOWN = {
    "step", "time", "loss", "loss_final", "nll", "unigram_entropy", "pk", "pm", "lr", "grad_norm", "tokens_per_second",
    "peak_memory_mib", "skipped_steps", "counted",
}  # fmt: skip


def points(records: Iterable[dict[str, Any]], *keys: str) -> Points:
    """(step, value) wherever the records have this number."""
    return [(r["step"], value) for r in records if (value := number(r, *keys)) is not None]


def pictures_of(run: RunFolder) -> dict[str, list[Picture]]:
    """The pictures of one run by the section that they stand in."""
    train, evals = run.train, run.evals
    both = sorted([*train, *evals], key=lambda record: record["step"])
    return {
        "What is learned": [_losses(train, evals), _levels(train, evals), _by_kind(train, evals)],
        "What is answered where": [*_answers(train or evals), _right(evals)],
        "Curriculum and optimiser": [
            Picture("Penalties", "weight", [
                Line("pk: masked position answered [MASK]", points(both, "pk"), 3),
                Line("pm: right word answered [MASK]", points(both, "pm"), 2, "dash"),
            ], low=0.0),
            Picture("Learning rate", "per step", [Line("lr", points(both, "lr"), 0)], low=0.0),
            Picture("Gradient norm", "before clipping",
                    [Line("norm", points(train, "grad_norm"), 1, is_smooth=True)]),
            _gap(train, evals),
            *(Picture(name, "its schedule's value", [Line(name, points(train, name), 4)]) for name in QUANTITIES),
        ],
        "Speed and memory": [
            Picture("Speed", "tokens a second",
                    [Line("speed", points(train, "tokens_per_second"), 0, is_smooth=True)], low=0.0),
            Picture("Peak memory", "MiB", [Line("memory", points(train, "peak_memory_mib"), 1)], low=0.0),
            *_skipped(train),
            Picture("Counted positions", "share", [Line("share", points(train, "counted"), 2)], low=0.0, high=1.0),
        ],
        "Other figures": _others(train, evals),
    }  # fmt: skip


def _losses(train: Records, evals: Records) -> Picture:
    names = {
        "loss": "at the step's penalties",
        "loss_final": "at the final penalties",
        "nll": "no penalties",
    }
    lines = [
        Line(f"training, {name}", points(train, key), i, "faint", is_smooth=True)
        for i, (key, name) in enumerate(names.items())
    ]
    lines += [
        Line(f"validation, {name}", points(evals, key), i) for i, (key, name) in enumerate(names.items())
    ]
    if not points(evals, "masked_nll", "15"):  # gpt2 mode
        lines.append(Line("unigram entropy", points(evals, "unigram_entropy"), 7, "dash"))
    note = "Most of a falling loss is the model learning to recognise words that nobody touched."
    return Picture("Loss", NATS, lines, note)


def _levels(train: Records, evals: Records) -> Picture:
    lines = [Line("training", points(train, "cases", "masked", "nll"), 7, "faint", is_smooth=True)]
    lines += [
        Line(name, points(evals, "masked_nll", key), i) for i, (key, name) in enumerate(LEVELS.items())
    ]
    if points(evals, "masked_nll", "15"):
        lines.append(Line("unigram entropy", points(evals, "unigram_entropy"), 7, "dash"))
    note = "What the model knows about masked words, beside guessing each by its frequency (dashed)."
    return Picture("Nll of masked positions", "nats a masked position", lines, note)


def _by_kind(train: Records, evals: Records) -> Picture:
    lines = []
    for i, (kind, name) in enumerate(KINDS.items()):
        lines.append(
            Line(f"training, {name}", points(train, "cases", kind, "nll"), i, "faint", is_smooth=True)
        )
        lines.append(Line(f"validation, {name}", points(evals, "cases", kind, "nll"), i))
    return Picture("Nll by kind of position", NATS, lines)


def right_answer(kind: str, records: Records) -> str:
    """The answer that is wanted: [MASK] to a wrong word, unless the right word is its target."""
    has_target = any(number(record, "cases", "corrupted", "target") for record in records)
    return "mask" if kind == "corrupted" and not has_target else "target"


def _answers(records: Records) -> list[Picture]:
    """What is answered where: all nine cells as shares of all positions, and of each kind its three."""
    full = [r for r in records if all(_cell(r, kind, a) is not None for kind in KINDS for a in ANSWERS)]
    pictures = []
    if full:
        total = [sum(_cell(r, kind, a) for kind in KINDS for a in ANSWERS) for r in full]
        cells = [
            Line(
                f"{name}: {ANSWERS[answer]}",
                [
                    (r["step"], 100 * _cell(r, kind, answer) / n)
                    for r, n in zip(full, total, strict=True)
                    if n
                ],
                colour,
                f"tone-{i}",
            )
            for i, (kind, name) in enumerate(KINDS.items())
            for answer, colour in ANSWER_COLOURS.items()
        ]
        note = "Each kind of position has its tone; a band's height is its share of all positions of the batch."
        pictures.append(
            Picture("All positions", "% of all positions", cells, note, 0.0, 100.0, is_stacked=True)
        )
    for kind, name in KINDS.items():
        known = [r for r in records if all(number(r, "cases", kind, a) is not None for a in ANSWERS)]
        bands = [
            Line(f"{ANSWERS[a]}{' (right)' if a == right_answer(kind, records) else ''}",
                 [(r["step"], 100 * number(r, "cases", kind, a)) for r in known], colour)
            for a, colour in ANSWER_COLOURS.items()
            if not (kind == "corrupted" and a == "target" and not any(number(r, "cases", kind, a) for r in known))
        ]  # fmt: skip
        title = f"Answers to {name}"
        pictures.append(Picture(title, f"% of {name}", bands, "", 0.0, 100.0, is_stacked=True))
    return pictures


def _cell(record: dict[str, Any], kind: str, answer: str) -> float | None:
    """How many positions of a kind got an answer; a kind without positions has 0 of each."""
    n, share = number(record, "cases", kind, "n"), number(record, "cases", kind, answer)
    return 0.0 if n == 0 else None if n is None or share is None else n * share


def _right(evals: Records) -> Picture:
    lines = []
    for i, (kind, name) in enumerate(KINDS.items()):
        answer = right_answer(kind, evals)
        shares = [(step, 100 * share) for step, share in points(evals, "cases", kind, answer)]
        lines.append(Line(f"{name}: {ANSWERS[answer]}", shares, i))
    return Picture("Right answers on the validation set", "% of such positions", lines, "", 0.0, 100.0)


def _gap(train: Records, evals: Records) -> Picture:
    lines = []
    for i, (kind, name) in enumerate(KINDS.items()):
        lines.append(
            Line(f"training, {name}", points(train, "cases", kind, "gap"), i, "faint", is_smooth=True)
        )
        lines.append(Line(f"validation, {name}", points(evals, "cases", kind, "gap"), i))
    highest = max([value for line in lines for _, value in line.points], default=0.0)
    if highest > RUNAWAY_GAP / 2:
        steps = [r["step"] for r in (*evals[:1], *evals[-1:])]
        lines.append(Line("runaway", [(step, RUNAWAY_GAP) for step in steps], 7, "dash"))
    note = "How far [MASK]'s logit lies below the largest one; 0 where [MASK] is the answer."
    return Picture("Gap of [MASK]'s logit", "nats", lines, note, low=0.0)


def _skipped(train: Records) -> list[Picture]:
    """Steps not applied, where there are any."""
    skipped = points(train, "skipped_steps")
    if not any(value for _, value in skipped):
        return []
    return [Picture("Steps not applied", "steps so far", [Line("steps", skipped, 3)], low=0.0)]


def _others(train: Records, evals: Records) -> list[Picture]:
    """Numbers that this page has no picture for, as they are called."""
    names = dict.fromkeys(
        key
        for r in (*train, *evals)
        for key in r
        if isinstance(key, str) and key not in (*KNOWN, *QUANTITIES)
    )
    pictures = []
    for name in names:
        lines = [
            Line("training", points(train, name), 0, is_smooth=True),
            Line("validation", points(evals, name), 1),
        ]
        if any(line.points for line in lines):
            pictures.append(Picture(name, "as recorded", lines))
    return pictures


# Several runs -------------------------------------------------------------------------------------


def comparison_of(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, list[Picture]]:
    """The same figure of each run in one picture, by section."""

    def overlay(title: str, unit: str, kind: str, *keys: str, share: float = 1.0, **ends: float) -> Picture:
        lines = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            records = run.train if kind == "train" else run.evals
            found = [(step, share * value) for step, value in points(records, *keys)]
            style = ("line", "dash", "dot")[i // 7 % 3]
            lines.append(Line(name, found, i % 7, style, is_smooth=kind == "train"))
        return Picture(title, unit, lines, **ends)

    percent = {"low": 0.0, "high": 100.0, "share": 100.0}
    levels = [
        overlay(f"Nll of masked positions, {name}", "nats a masked position", "eval", "masked_nll", key)
        for key, name in LEVELS.items()
    ]
    return {
        "What is learned": [
            *levels,
            overlay("Validation loss at the final penalties", NATS, "eval", "loss_final"),
            overlay("Validation loss at the step's penalties", NATS, "eval", "loss"),
            overlay("Validation loss without penalties", NATS, "eval", "nll"),
            overlay("Training nll of masked positions", "nats a masked position", "train", "cases", "masked", "nll"),
        ],
        "What is answered where": [
            overlay("Masked: filled in right", "% of masked positions", "eval", "cases", "masked", "target", **percent),
            overlay("Masked: answered [MASK]", "% of masked positions", "eval", "cases", "masked", "mask", **percent),
            overlay("Right word: answered [MASK]", "% of right words", "eval", "cases", "intact", "mask", **percent),
            overlay("Wrong word: flagged [MASK]", "% of wrong words", "eval", "cases", "corrupted", "mask", **percent),
        ],
        "Curriculum and optimiser": [
            overlay("Penalty pk", "weight", "train", "pk", low=0.0),
            overlay("Penalty pm", "weight", "train", "pm", low=0.0),
            overlay("Learning rate", "per step", "train", "lr", low=0.0),
            overlay("Gradient norm", "before clipping", "train", "grad_norm"),
            overlay("Gap of [MASK]'s logit, masked positions", "nats", "eval", "cases", "masked", "gap", low=0.0),
        ],
        "Speed and memory": [
            overlay("Speed", "tokens a second", "train", "tokens_per_second", low=0.0),
            overlay("Peak memory", "MiB", "train", "peak_memory_mib", low=0.0),
        ],
    }  # fmt: skip
