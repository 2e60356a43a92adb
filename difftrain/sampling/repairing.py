"""Repairing a text: which of its words the model thinks wrong, and what it would write there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError, plain_text, real_number, whole_number
from difftrain.progress import progress
from difftrain.sampling.choosing import Choice
from difftrain.sampling.policies import make_policy
from difftrain.sampling.settling import State, settle, without_mask
from difftrain.sampling.writing import Writer

LOGITS = 2**24  # numbers that one pass of the model makes at most


@dataclass(frozen=True)
class Edit:
    """A word that the model thinks wrong.

    Attributes:
        position: its first character in the text it was found in, counted from 0.
        line, column: the same place, counted from 1.
        old: the word.
        suspicion: how much of the probability at its place the model gives to all but this word.
        new: what it was replaced by; None where it was only marked.
        probability: what the model gives to the new word where it sees [MASK] for all suspects.
    """

    position: int
    line: int
    column: int
    old: str
    suspicion: float
    new: str | None = None
    probability: float | None = None

    @classmethod
    def at(cls, text: str, position: int, old: str, suspicion: float, new: str | None = None) -> Edit:
        """The edit of the word ``old`` at a place of its text."""
        line_start = text.rfind("\n", 0, position) + 1
        return cls(
            position, text.count("\n", 0, position) + 1, position - line_start + 1, old, suspicion, new
        )


@dataclass(frozen=True)
class Repair:
    """A repaired text, and what was changed in it, by position; where it was only checked, what was marked."""

    text: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class RepairRequest:
    """How a text is repaired; the fields are options of ``difftrain repair``.

    Attributes:
        suspect: the suspicion from which on a word is taken for wrong.
        sure: the probability from which on a new word takes the place of a suspect; 0: always.
        max_changes: so many suspects at most, those under the greatest suspicion; None: all.
        steps: passes of the model in which the words of one window are written anew.
        keep_unknown: leave characters that the vocabulary does not hold as they are; the model sees [MASK] there.
        check: only mark.
    """

    suspect: float = 0.5
    sure: float = 0.9
    max_changes: int | None = None
    steps: int = 8
    keep_unknown: bool = False
    check: bool = False

    def __post_init__(self) -> None:
        if not 0 < real_number("suspect", self.suspect) <= 1:
            raise UserError(f"suspect must be in (0, 1], got {self.suspect}")
        if not 0 <= real_number("sure", self.sure) <= 1:
            raise UserError(f"sure must be in [0, 1], got {self.sure}")
        if self.max_changes is not None:
            whole_number("max_changes", self.max_changes, 0)
        whole_number("steps", self.steps, 1)


def repair(
    writer: Writer,
    text: str,
    request: RepairRequest,
    on_pass: Callable[[Tensor], None] | None = None,
) -> Repair:
    """Mark the words of a text that the model thinks wrong, and write them anew in sight of the others.

    The text may have any length: windows of what the model takes overlap by half, and each decides on its middle.
    Nothing is drawn: the same text gives the same result.

    Args:
        on_pass: as for :func:`mend`.

    Raises:
        UserError: the model was not taught to find wrong words, or the text is not made of its words.
    """
    vocabulary = writer.vocabulary
    ids, unknown = _encode(plain_text("text", text), vocabulary, keep_unknown=request.keep_unknown)
    x = torch.tensor(ids, dtype=torch.int64, device=writer.device)
    mended = mend(writer, x, request, on_pass)
    if request.check:
        edits = _edits(text, ids, mended.suspects, mended.suspicion, vocabulary, unknown)
        return Repair(text, tuple(edits))
    changed = mended.ids != x
    edits = _edits(text, ids, changed, mended.suspicion, vocabulary, unknown)
    words = [vocabulary.decode_words([i]) for i in mended.ids[changed].tolist()]
    edits = [
        replace(edit, new=new, probability=its)
        for edit, new, its in zip(edits, words, mended.p[changed].tolist(), strict=True)
    ]
    return Repair(_decode(mended.ids.tolist(), vocabulary, unknown), tuple(edits))


@dataclass(frozen=True)
class Mended:
    """A text (T,) after its repair.

    Attributes:
        ids: int64.
        suspects: bool, the words taken for wrong.
        suspicion: fp32, of every word of the text as it was.
        p: fp32, what the model gives to each word that it wrote for another one, in sight of [MASK] for all suspects.
    """

    ids: Tensor
    suspects: Tensor
    suspicion: Tensor
    p: Tensor


def mend(
    writer: Writer,
    x: Tensor,
    request: RepairRequest,
    on_pass: Callable[[Tensor], None] | None = None,
) -> Mended:
    """The words of a text x (T,) int64 that the model thinks wrong, written anew; not modified, and its [MASK]s stay.

    Args:
        on_pass: is given the text (T,) as it was, with [MASK] for its suspects, and after each pass that writes.

    Raises:
        UserError: the model was not taught to find wrong words.
    """
    config, mask_id = writer.config, writer.vocabulary.mask_id
    if not config.has_penalties:
        what = "gpt2 mode" if config.mode == "gpt2" else f"recipe {config.recipe}"
        raise UserError(
            f"repair needs a model that was taught to find wrong words, which {what} does not do"
        )
    suspicion = 1.0 - _probabilities(writer, x, x, x != mask_id)
    suspects = suspicion >= request.suspect
    if request.max_changes is not None:
        order = suspicion.masked_fill(~suspects, -1.0).argsort(descending=True, stable=True)
        suspects[order[request.max_changes :]] = False
    if request.check:
        return Mended(x, suspects, suspicion, torch.ones_like(suspicion))
    masked = x.masked_fill(suspects, mask_id)
    if on_pass:
        on_pass(x)
        on_pass(masked)
    written = _write_anew(writer, masked, suspects, request.steps, on_pass)
    p = _probabilities(writer, masked, written, suspects & (written != x), may_be_mask=False)
    ids = torch.where(suspects & (p < request.sure), x, written)
    return Mended(ids, suspects, suspicion, p)


def _encode(text: str, vocabulary: Vocabulary, *, keep_unknown: bool) -> tuple[list[int], dict[int, str]]:
    """Ids of a text, [MASK] for characters that are not in the vocabulary, and these by their place among the ids."""
    ids, unknown = vocabulary.encode_known(text) if keep_unknown else (vocabulary.encode(text), {})
    if _decode(ids, vocabulary, unknown) != text:
        raise UserError(
            "the run's tokenizer does not give this text back as it is, so it cannot be repaired"
        )
    return ids, unknown


def _decode(ids: list[int], vocabulary: Vocabulary, unknown: dict[int, str]) -> str:
    parts, begin = [], 0
    for place, character in unknown.items():
        parts += [vocabulary.decode_words(ids[begin:place]), character]
        begin = place + 1
    return "".join((*parts, vocabulary.decode_words(ids[begin:])))


def cut_windows(length: int, block_size: int) -> list[tuple[slice, slice]]:
    """Windows that cover ``length`` tokens and overlap by half, and the part of the text that each decides on.

    All windows are equally long, and the parts lie side by side.
    """
    size = min(length, block_size)
    starts = [*range(0, length - size, max(1, size // 2)), length - size] if length else []
    ends = [(a + size + b) // 2 for a, b in pairwise(starts)]  # amid each overlap
    bounds = [0, *ends, length]
    return [
        (slice(start, start + size), slice(*own))
        for start, own in zip(starts, pairwise(bounds), strict=False)
    ]


def _batches(writer: Writer, is_asked: Tensor) -> Iterator[tuple[list[slice], Tensor]]:
    """Windows in which something is asked for, (b) of them at a time, and what each is to decide on: (b, T) bool."""
    windows = cut_windows(len(is_asked), writer.config.block_size)
    asked = is_asked.tolist()
    windows = [(window, own) for window, own in windows if any(asked[own])]
    size = max(1, LOGITS // (writer.config.block_size * writer.vocabulary.vocab_size))
    for i in progress(range(0, len(windows), size), what="reading", unit="pass"):
        batch = windows[i : i + size]
        where = torch.zeros(
            len(batch), len(is_asked[batch[0][0]]), dtype=torch.bool, device=is_asked.device
        )
        for row, (window, own) in zip(where, batch, strict=True):
            inside = slice(own.start - window.start, own.stop - window.start)
            row[inside] = is_asked[own]
        yield [window for window, _ in batch], where


def _probabilities(
    writer: Writer, x: Tensor, words: Tensor, is_asked: Tensor, *, may_be_mask: bool = True
) -> Tensor:
    """What the model, seeing x (T,), gives to each of the words (T,) that is asked for, (T,) fp32; 1 elsewhere."""
    scores, mask_id = writer.scores, writer.vocabulary.mask_id
    p = torch.ones(len(x), dtype=torch.float32, device=x.device)
    for windows, where in _batches(writer, is_asked):
        logits = scores(torch.stack([x[w] for w in windows]), where)
        if not may_be_mask:
            logits = without_mask(logits, mask_id)
        own = torch.stack([words[w] for w in windows])[where]
        own = logits.softmax(-1).gather(-1, own[:, None]).squeeze(-1)
        for window, row, values in zip(windows, where, own.split(where.sum(1).tolist()), strict=True):
            p[window][row] = values
    return p


def _write_anew(
    writer: Writer,
    masked: Tensor,
    suspects: Tensor,
    steps: int,
    on_pass: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The text (T,) with its suspects, which are [MASK], written: most certain first, in sight of a window."""
    mask_id = writer.vocabulary.mask_id
    written = masked.clone()
    for windows, where in _batches(writer, suspects):
        state = State.of(torch.stack([masked[w] for w in windows]), mask_id, where)
        settle(
            writer.scores, state, mask_id, make_policy("confidence"),
            steps=steps, choice=Choice(temperature=0.0), seed=0,
            samples=torch.arange(len(windows), dtype=torch.int64, device=masked.device),
            on_pass=on_pass and partial(_tell, on_pass, written, windows, where),
        )  # fmt: skip
        _put(written, windows, where, state.x)
    return written


def _put(text: Tensor, windows: list[slice], where: Tensor, x: Tensor) -> None:
    """Write what windows (b, T) decided on into a text."""
    for window, row, ids in zip(windows, where, x, strict=True):
        text[window][row] = ids[row]


def _tell(
    on_pass: Callable[[Tensor], None], text: Tensor, windows: list[slice], where: Tensor, x: Tensor
) -> None:
    text = text.clone()
    _put(text, windows, where, x)
    on_pass(text)


def _edits(
    text: str,
    ids: list[int],
    changed: Tensor,
    suspicion: Tensor,
    vocabulary: Vocabulary,
    unknown: dict[int, str],
) -> list[Edit]:
    edits, position, before = [], 0, 0
    others = deque(unknown.items())  # by place, as the changed words come
    for place in changed.nonzero().flatten().tolist():
        between = {}
        while others and others[0][0] < place:
            at, character = others.popleft()
            between[at - before] = character
        position += len(_decode(ids[before:place], vocabulary, between))
        before = place
        old = vocabulary.decode_words([ids[place]])
        edits.append(Edit.at(text, position, old, suspicion[place].item()))
    return edits
