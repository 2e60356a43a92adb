"""A trial of a repair as the frames of a moving picture: the errors, what is sent back, what is written, and the outcome."""

from __future__ import annotations

from collections.abc import Mapping

from difftrain.sampling.showing import CAPTION, FRESH, SETTLED, WRONG, Frame
from difftrain.sampling.trial import Trial

FIRST_MS, BACK_MS, PASS_MS, LAST_MS = 3000, 2500, 700, 6000


def frames_of(trial: Trial, passes: list[Frame]) -> tuple[list[Frame], list[int]]:
    """The frames with a line above each, and how many milliseconds each stays.

    Args:
        passes: of the text as it was, with [MASK] for its suspects, and after each pass.
    """
    wrong = {error.position: (error.old, error.old, WRONG) for error in trial.planted}
    right = {error.position: error.new for error in trial.planted}
    after = wrong | {
        edit.position: (edit.old, edit.new or "", FRESH if right.get(edit.position) == edit.new else WRONG)
        for edit in trial.repair.edits
    }
    n_right = sum(what == FRESH for _, _, what in after.values())
    n_harmed = len(after) - len(wrong)
    told = [
        (f"{len(wrong)} of {trial.n_words} tokens of a held-out text are wrong", FIRST_MS),
        (f"the model sends {len(trial.suspects)} back to [MASK], and leaves the others alone", BACK_MS),
        *[("it fills them, the most certain first", PASS_MS)] * (len(passes) - 2),
        (
            f"{n_right} are right again, {len(wrong) - n_right} are not; "
            f"{n_harmed} of {trial.n_words - len(wrong)} right ones were harmed",
            LAST_MS,
        ),
    ]
    shown = [_marked(trial.wrong, wrong), *passes[1:], _marked(trial.wrong, after)]
    frames = [[(f"{line}\n\n", CAPTION), *frame] for (line, _), frame in zip(told, shown, strict=True)]
    return frames, [ms for _, ms in told]


def _marked(text: str, words: Mapping[int, tuple[str, str, str]]) -> Frame:
    """The text as runs, where at some positions a word is replaced and told apart: {position: (old, new, what)}."""
    frame, end = [], 0
    for position, (old, new, what) in sorted(words.items()):
        frame += [(text[end:position], SETTLED), (new, what)]
        end = position + len(old)
    return [(part, what) for part, what in (*frame, (text[end:], SETTLED)) if part]
