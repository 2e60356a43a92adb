"""A repair as lines that people and programs read: changed words side by side, places, or one JSON object."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from difftrain.sampling.repairing import Edit, Repair

OLD, NEW, END = "\033[9;31m", "\033[1;32m", "\033[0m"  # struck red, bold green


def diff_lines(text: str, repair: Repair, *, is_coloured: bool) -> Iterator[str]:
    """Each changed line with its number, whole words struck and added, as ``wdiff`` marks them without colours."""
    old_marks, new_marks = _marks(is_coloured)
    parts, end = [], 0
    for start, stop, new in _words(text, repair.edits):
        parts.append((text[end:start], ""))
        marked = old_marks[0] + text[start:stop] + old_marks[1] + new_marks[0] + new + new_marks[1]
        parts.append((text[start:stop], marked))
        end = stop
    parts.append((text[end:], ""))
    number, line, is_changed = 1, "", False
    n_ends = 0  # line ends within the marked words of this line
    for plain, marked in parts:
        pieces = [marked] if marked else plain.split("\n")
        n_ends += plain.count("\n") if marked else 0
        is_changed |= bool(marked)
        line += pieces[0]
        for piece in pieces[1:]:
            if is_changed:
                yield f"{number}: {line}"
            number, line, is_changed, n_ends = number + 1 + n_ends, piece, False, 0
    if is_changed:
        yield f"{number}: {line}"


def marked(text: str, edits: tuple[Edit, ...], *, is_coloured: bool) -> str:
    """The whole text with each edit's new word in place of the old one, or the old one struck where there is none."""
    old_marks, new_marks = _marks(is_coloured)
    parts, end = [], 0
    for edit in edits:
        marks, word = (old_marks, edit.old) if edit.new is None else (new_marks, edit.new)
        parts += [text[end : edit.position], marks[0], word, marks[1]]
        end = edit.position + len(edit.old)
    return "".join((*parts, text[end:]))


def _marks(is_coloured: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """What stands around an old word, and around a new one."""
    return ((OLD, END), (NEW, END)) if is_coloured else (("[-", "-]"), ("{+", "+}"))


def _words(text: str, edits: tuple[Edit, ...]) -> Iterator[tuple[int, int, str]]:
    """Start and end of each word of the text that an edit touches, and the word after it."""
    groups: list[list[Edit]] = []
    for edit in edits:
        if groups and edit.position <= _word_end(text, groups[-1][-1]):
            groups[-1].append(edit)
        else:
            groups.append([edit])
    for group in groups:
        start, end = group[0].position, _word_end(text, group[-1])
        while start and _is_inner(text[start - 1]) and _is_inner(text[start]):
            start -= 1
        new, place = [], start
        for edit in group:
            new += [text[place : edit.position], edit.new or ""]
            place = edit.position + len(edit.old)
        yield start, end, "".join((*new, text[place:end]))


def _word_end(text: str, edit: Edit) -> int:
    end = edit.position + len(edit.old)
    while end < len(text) and _is_inner(text[end - 1]) and _is_inner(text[end]):
        end += 1
    return end


def _is_inner(character: str) -> bool:
    return character.isalnum() or character == "_"


def place_lines(name: str, repair: Repair) -> Iterator[str]:
    """Each marked word with its place, as compilers name places."""
    for edit in repair.edits:
        yield f"{name}:{edit.line}:{edit.column}: {edit.old!r} is wrong with probability {edit.suspicion:.2f}"


def to_json(repair: Repair) -> str:
    """The text and its edits as one JSON object."""
    return json.dumps(dataclasses.asdict(repair), ensure_ascii=False, indent=2)
