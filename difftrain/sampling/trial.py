"""A trial of a repair: errors planted in a held-out text, what the model changes, and how much of that is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.data import replace_share
from difftrain.errors import UserError, real_number, whole_number
from difftrain.sampling.repairing import Edit, Repair, RepairRequest, repair
from difftrain.sampling.texts import Watch, held_out_windows
from difftrain.sampling.writing import writer_of


@dataclass(frozen=True)
class TrialRequest:
    """Which text, and how many errors.

    Attributes:
        errors: per cent of the words that are replaced by others drawn evenly, at least one in block_size.
        seed: of the place of the text, and of the errors.
        allow_changed_data: take the text even if the data has changed since the training.
    """

    errors: float = 5.0
    seed: int = 0
    checkpoint: str = "best"
    device: str = "auto"
    dtype: str = "auto"
    allow_changed_data: bool = False

    def __post_init__(self) -> None:
        if not 0 < real_number("errors", self.errors) <= 100:
            raise UserError(f"errors must be per cents in (0, 100], got {self.errors:g}")
        whole_number("seed", self.seed, 0)


@dataclass(frozen=True)
class Trial:
    """A text before and after errors were planted, what the model suspects in it, and its repair.

    Attributes:
        planted: the errors in ``wrong``, as edits from the wrong word to the right one.
        suspects: of ``wrong``, as edits without new words.
        n_words: of the text.
    """

    original: str
    wrong: str
    planted: tuple[Edit, ...]
    suspects: tuple[Edit, ...]
    repair: Repair
    n_words: int

    @property
    def summary(self) -> str:
        """How it went, counted: a word that is changed otherwise than its error was planted is not put right."""
        right = {error.position: error.new for error in self.planted}
        found = sum(edit.position in right for edit in self.suspects)
        put_right = sum(right.get(edit.position) == edit.new for edit in self.repair.edits)
        harmed = sum(edit.position not in right for edit in self.repair.edits)
        n_right = self.n_words - len(right)
        return (
            f"suspected {found} of {len(right)} errors and {len(self.suspects) - found} of {n_right} right words; "
            f"put {put_right} errors right, changed {harmed} right words"
        )


def try_repair(
    run_dir: Path, request: TrialRequest, how: RepairRequest, watch: Watch | None = None
) -> Trial:
    """Plant errors in a piece of a run's validation text, and repair it.

    Args:
        watch: is given the text with its errors, with [MASK] for its suspects, and after each pass that writes, as ids,
            and the vocabulary.

    Raises:
        UserError: not a run folder, no such checkpoint, a model that was not taught to find wrong words, or data
            that has changed.
    """
    checkpoint = find_checkpoint(run_dir, request.checkpoint)
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    tokens, samples = held_out_windows(
        checkpoint, request.seed, is_change_allowed=request.allow_changed_data
    )
    wrong, _ = replace_share(
        tokens,
        samples,
        seed=config.seed,
        split="val",
        vocab_size=vocabulary.vocab_size,
        share=request.errors / 100,
    )
    right_ids, wrong_ids = tokens.flatten().tolist(), wrong.flatten().tolist()
    text = vocabulary.decode_words(wrong_ids)
    planted, position = {}, 0
    for old, new in zip(wrong_ids, right_ids, strict=True):
        old_word = vocabulary.decode_words([old])
        if old != new:
            planted[position] = Edit.at(text, position, old_word, 1.0, vocabulary.decode_words([new]))
        position += len(old_word)
    writer = writer_of(checkpoint, request.device, request.dtype)
    return Trial(
        original=vocabulary.decode_words(right_ids),
        wrong=text,
        planted=tuple(planted.values()),
        suspects=repair(writer, text, replace(how, check=True)).edits,
        repair=repair(writer, text, how, watch and (lambda x: watch(x.tolist(), vocabulary))),
        n_words=len(right_ids),
    )
