"""Sampling texts with a run's model: from nothing, a prompt, a text with gaps, or held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.checkpoints.exported import open_model
from difftrain.checkpoints.reading import Checkpoint, open_held_out
from difftrain.data import mask_share
from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError, plain_text, whole_number
from difftrain.reporting.lines import summary_line
from difftrain.reporting.log import read_metrics
from difftrain.sampling.choosing import Choice
from difftrain.sampling.gaps import LENGTHS, UNKNOWN, candidates_of, fill_candidates, gap_lengths
from difftrain.sampling.showing import mask_sign
from difftrain.sampling.writing import How, Writer, writer_of

Watch = Callable[[list[int], Vocabulary], None]
HELD_OUT_WINDOWS = 5  # what --held_out shows, in block_size tokens


@dataclass(frozen=True)
class SampleRequest:
    """What to write; the fields are the options of ``difftrain sample``."""

    prompt: str = ""
    infill: str | None = None
    gap_lengths: tuple[int, int] | None = None
    held_out: bool = False
    share: float = 0.15
    length: int | None = None
    num_samples: int = 1
    policy: str = ""
    steps: int | None = None
    schedule: str | None = None
    suspect: float | None = None
    block_length: int | None = None
    approximate: bool = False
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    checkpoint: str = "best"
    device: str = "auto"
    dtype: str = "auto"
    allow_changed_data: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "num_samples"):
            if (value := getattr(self, name)) is not None or name == "num_samples":
                object.__setattr__(self, name, whole_number(name, value, 1))
        plain_text("prompt", self.prompt)
        if self.infill is not None:
            plain_text("infill", self.infill)
        if self.gap_lengths is not None:
            object.__setattr__(self, "gap_lengths", gap_lengths(self.gap_lengths))
            if UNKNOWN not in (self.infill or ""):
                raise UserError(f"gap_lengths goes with an infill text that has {UNKNOWN}")
        for is_given, name in ((self.infill is not None, "infill"), (self.held_out, "held_out")):
            if is_given and self.length is not None:
                raise UserError(
                    f"length and {name} exclude each other: the text with gaps has its own length"
                )
        if self.held_out and self.num_samples != 1:
            raise UserError("num_samples and held_out exclude each other: the piece is restored once")
        if not 0 < self.share <= 1:
            raise UserError(f"share must be in (0, 1], got {self.share}")
        self.how()

    def how(self) -> How:
        """How the texts are written; raises UserError where a number is out of its range."""
        choice = Choice(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition)
        names = ("policy", "steps", "schedule", "suspect", "block_length", "approximate", "seed")
        return How(choice=choice, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Sample:
    """A text, and the step of the checkpoint whose model wrote it."""

    text: str
    step: int


def sample_run(run_dir: Path, request: SampleRequest, watch: Watch | None = None) -> Sample:
    """Write text with a run's model; nothing is stored.

    Args:
        watch: is given the first text before the first pass and after each, as ids, and the vocabulary.

    Raises:
        UserError: not a run folder, no such checkpoint, or a text that does not fit the model.
    """
    checkpoint = open_model(run_dir, request.checkpoint)
    if checkpoint.config.mode == "gpt2" and request.held_out:
        raise _no_gaps()
    if checkpoint.config.mode == "gpt2" and watch:
        raise UserError("a run in gpt2 mode writes from left to right: there is nothing to see settle")
    vocabulary = checkpoint.vocabulary
    writer = writer_of(checkpoint, request.device, request.dtype)
    if request.held_out:
        evaluations = [r for r in read_metrics(run_dir) if r["kind"] == "eval"]
        tokens, x = _held_out(checkpoint, request)
        filled = writer.fill(x, request.how(), _first(watch, vocabulary))
        is_masked = x == vocabulary.mask_id
        n_right = int((filled == tokens)[is_masked].sum())
        texts = (vocabulary.decode(t.flatten().tolist(), mask=mask_sign()) for t in (tokens, x, filled))
        titles = ("original", f"masked ({100 * request.share:.0f} %)", "restored")
        parts = [f"--- {title}\n{text}" for title, text in zip(titles, texts, strict=True)]
        parts.append(f"--- {n_right} of {int(is_masked.sum())} masked tokens restored exactly")
        at_step = [r for r in evaluations if r["step"] == checkpoint.step] or evaluations
        parts += [summary_line(record) for record in at_step[-1:]]
        return Sample("\n".join(parts), checkpoint.step)
    texts = write_texts(writer, request, watch)
    if len(texts) > 1:
        texts = [f"--- {i + 1}\n{text}" for i, text in enumerate(texts)]
    return Sample("\n".join(texts), checkpoint.step)


def write_texts(writer: Writer, request: SampleRequest, watch: Watch | None = None) -> list[str]:
    """``num_samples`` texts from nothing, from a prompt or with gaps; each begins with or holds what was given.

    Raises:
        UserError: a text that does not fit the model, or characters outside its vocabulary.
    """
    is_causal = writer.config.mode == "gpt2"
    if is_causal and request.infill is not None:
        raise _no_gaps()
    on_pass, n = _first(watch, writer.vocabulary), request.num_samples
    if request.infill is None:
        start = _start(writer, request)
    else:
        lengths, block_size = request.gap_lengths or LENGTHS, writer.config.block_size
        candidates = candidates_of(request.infill, writer.vocabulary, lengths, block_size)
        if UNKNOWN in request.infill:
            filled = fill_candidates(writer, candidates, n, request.how(), on_pass)
            return [writer.vocabulary.decode(filled.text(i, k)) for i, k in enumerate(filled.best())]
        start = candidates[0].ids
    x = torch.tensor([start], dtype=torch.int64, device="cpu").expand(n, -1)
    if is_causal:
        written = writer.continue_causal(x, request.length or writer.config.block_size, request.how())
    else:
        written = writer.fill(x, request.how(), on_pass)
    return [writer.vocabulary.decode(row) for row in written.tolist()]


def _first(watch: Watch | None, vocabulary: Vocabulary) -> Callable[[Tensor], None] | None:
    return watch and (lambda x: watch(x[0].tolist(), vocabulary))


def _no_gaps() -> UserError:
    return UserError("this run was trained in gpt2 mode, which cannot fill gaps; give a prompt")


def keep_sample(run_dir: Path, sample: Sample) -> Path:
    """Store a text in the run's folder ``samples``, beside those that are there; returns its file."""
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir())) + 1
    while (path := folder / f"step-{sample.step:08d}-{number:03d}.txt").exists():
        number += 1
    with path.open("x", encoding="utf-8", errors="backslashreplace") as file:  # a word may be no character
        file.write(sample.text + "\n")
    return path


def _start(writer: Writer, request: SampleRequest) -> list[int]:
    """Ids that sampling starts from, [MASK] where the model is to write."""
    vocabulary = writer.vocabulary
    length = request.length or writer.config.block_size
    prompt = vocabulary.encode(request.prompt)
    if len(prompt) >= length:
        raise UserError(
            f"the prompt must have fewer tokens than the text's {length}, got {len(prompt)}; give a greater length"
        )
    if writer.config.mode == "gpt2":
        # Left to right there must be something to start from: a newline, as nanoGPT has it, or any word.
        try:
            return prompt or vocabulary.encode("\n")
        except UserError:
            return [0]
    return prompt + [vocabulary.mask_id] * (length - len(prompt))


def _held_out(checkpoint: Checkpoint, request: SampleRequest) -> tuple[Tensor, Tensor]:
    """A piece of the validation text, as is and partly masked: (W, block_size) each."""
    tokens, samples = held_out_windows(
        checkpoint, request.seed, is_change_allowed=request.allow_changed_data
    )
    x, _ = mask_share(
        tokens,
        samples,
        seed=checkpoint.config.seed,
        split="val",
        vocab_size=checkpoint.vocabulary.vocab_size,
        share=request.share,
    )
    return tokens, x


def held_out_windows(
    checkpoint: Checkpoint, seed: int, *, is_change_allowed: bool
) -> tuple[Tensor, Tensor]:
    """A piece of a run's validation text that the seed chooses, (W, block_size) int64, and its windows' numbers (W,)."""
    config = checkpoint.config
    corpus = open_held_out(checkpoint, is_change_allowed=is_change_allowed)
    n_windows = max(1, min(HELD_OUT_WINDOWS, len(corpus.val) // config.block_size))
    index = torch.tensor([seed], dtype=torch.int64, device="cpu")
    tokens = corpus.windows("val", index, seed=config.seed, length=n_windows * config.block_size)
    samples = torch.arange(n_windows, dtype=torch.int64, device="cpu") + seed * n_windows
    return tokens.view(n_windows, config.block_size), samples
