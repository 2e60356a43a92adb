"""Sampling texts with a run's model: from nothing, a prompt, a text with gaps, or held-out text."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.checkpoints.reading import Checkpoint, find_checkpoint, open_held_out
from difftrain.data import mask_share
from difftrain.data.vocabulary import Vocabulary
from difftrain.errors import UserError
from difftrain.loss import bent_logits
from difftrain.reporting.lines import summary_line
from difftrain.reporting.log import read_metrics
from difftrain.runtime import resolve_device
from difftrain.sampling.fill import continue_causal, fill

GAP = re.compile("_{4,}")  # in an infill text, this many underscores are as many [MASK]s
HELD_OUT_WINDOWS = 5  # what --held_out shows, in block_size tokens


@dataclass(frozen=True)
class SampleRequest:
    """What to write; the fields are the options of ``difftrain sample``."""

    prompt: str = ""
    infill: str | None = None
    held_out: bool = False
    share: float = 0.15
    length: int = 0
    num_samples: int = 1
    max_steps: int = 64
    temperature: float = 0.8
    top_k: int = 0
    by_confidence: bool = False
    seed: int = 0
    checkpoint: str = "best"
    device: str = "auto"
    allow_changed_data: bool = False

    def __post_init__(self) -> None:
        lowest = {"length": 0, "num_samples": 1, "max_steps": 1, "temperature": 0, "top_k": 0, "seed": 0}
        for name, low in lowest.items():
            if not low <= getattr(self, name) < 2**31:
                raise UserError(f"{name} must be at least {low} and below 2^31, got {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise UserError(f"share must be in (0, 1], got {self.share}")


@dataclass(frozen=True)
class Sample:
    """A text, and the step of the checkpoint whose model wrote it."""

    text: str
    step: int


def sample_run(run_dir: Path, request: SampleRequest) -> Sample:
    """Write text with a run's model; nothing is stored.

    Raises:
        UserError: not a run folder, no such checkpoint, or a text that does not fit the model.
    """
    checkpoint = find_checkpoint(run_dir, request.checkpoint)
    if checkpoint.config.mode == "gpt2" and (request.infill is not None or request.held_out):
        raise UserError(f"{run_dir} was trained in gpt2 mode, which cannot fill gaps; give a prompt")
    device = resolve_device(request.device)
    vocabulary, config = checkpoint.vocabulary, checkpoint.config
    logits_of = bent_logits(checkpoint.make_model(device), vocabulary.mask_id, config)
    generator = torch.Generator(device).manual_seed(request.seed)
    options = {"temperature": request.temperature, "top_k": request.top_k, "generator": generator}
    # A model that never answers [MASK] would fill all of a text in one pass.
    filling = {
        "max_steps": request.max_steps,
        "by_confidence": request.by_confidence or not config.has_penalties,
    }

    if request.held_out:
        evaluations = [r for r in read_metrics(run_dir) if r["kind"] == "eval"]
        tokens, x = _held_out(checkpoint, request)
        filled = fill(logits_of, x.to(device), vocabulary.mask_id, **filling, **options).cpu()
        is_masked = x == vocabulary.mask_id
        n_right = int((filled == tokens)[is_masked].sum())
        texts = (vocabulary.decode(t.flatten().tolist(), mask=_mask_sign()) for t in (tokens, x, filled))
        titles = ("original", f"masked ({100 * request.share:.0f} %)", "restored")
        parts = [f"--- {title}\n{text}" for title, text in zip(titles, texts, strict=True)]
        parts.append(f"--- {n_right} of {int(is_masked.sum())} masked tokens restored exactly")
        at_step = [r for r in evaluations if r["step"] == checkpoint.step] or evaluations
        parts += [summary_line(record) for record in at_step[-1:]]
        return Sample("\n".join(parts), checkpoint.step)

    ids = _start(checkpoint, request)
    x = torch.tensor(ids, dtype=torch.int64, device=device).expand(request.num_samples, -1)
    if config.mode == "gpt2":
        block_size = config.block_size
        length = request.length or block_size
        filled = continue_causal(logits_of, x, length, vocabulary.mask_id, block_size=block_size, **options)
    else:
        filled = fill(logits_of, x, vocabulary.mask_id, **filling, **options)
    texts = [vocabulary.decode(row) for row in filled.tolist()]
    if len(texts) > 1:
        texts = [f"--- {i + 1}\n{text}" for i, text in enumerate(texts)]
    return Sample("\n".join(texts), checkpoint.step)


def keep_sample(run_dir: Path, sample: Sample) -> Path:
    """Store a text in the run's folder ``samples``, beside those that are there; returns its file."""
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir())) + 1
    while (path := folder / f"step-{sample.step:08d}-{number:03d}.txt").exists():
        number += 1
    with path.open("x", encoding="utf-8") as file:
        file.write(sample.text + "\n")
    return path


def _start(checkpoint: Checkpoint, request: SampleRequest) -> list[int]:
    """Ids that sampling starts from, [MASK] where the model is to write."""
    vocabulary, block_size = checkpoint.vocabulary, checkpoint.config.block_size
    if request.infill is not None:
        ids = encode_template(request.infill, vocabulary)
        if len(ids) > block_size:
            raise UserError(
                f"the infill text must have at most block_size {block_size} tokens, got {len(ids)}"
            )
        return ids
    length = request.length or block_size
    prompt = vocabulary.encode(request.prompt)
    is_causal = checkpoint.config.mode == "gpt2"
    if length > block_size and not is_causal:
        raise UserError(f"length must be at most block_size {block_size}, got {length}")
    if len(prompt) >= length:
        remedy = "; give a greater length" if is_causal else ""
        raise UserError(
            f"the prompt must have fewer tokens than the text's {length}, got {len(prompt)}{remedy}"
        )
    if is_causal:
        # Left to right there must be something to start from: a newline, as nanoGPT has it, or any word.
        try:
            return prompt or vocabulary.encode("\n")
        except UserError:
            return [0]
    return prompt + [vocabulary.mask_id] * (length - len(prompt))


def _held_out(checkpoint: Checkpoint, request: SampleRequest) -> tuple[Tensor, Tensor]:
    """A piece of the validation text, as is and partly masked: (W, block_size) each."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    corpus = open_held_out(checkpoint, is_change_allowed=request.allow_changed_data)
    n_windows = max(1, min(HELD_OUT_WINDOWS, len(corpus.val) // config.block_size))
    index = torch.tensor([request.seed], dtype=torch.int64, device="cpu")
    tokens = corpus.windows("val", index, seed=config.seed, length=n_windows * config.block_size)
    tokens = tokens.view(n_windows, config.block_size)
    x, _ = mask_share(
        tokens,
        torch.arange(n_windows, dtype=torch.int64, device="cpu") + request.seed * n_windows,
        seed=config.seed,
        split="val",
        vocab_size=vocabulary.vocab_size,
        share=request.share,
    )
    return tokens, x


def _mask_sign() -> str:
    """What stands for [MASK] on the terminal: a shade where it can be shown, else a hash."""
    try:
        "\u2591".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "\u2591"


def encode_template(text: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of an infill text: every run of four or more underscores is as many [MASK]s.

    Raises:
        UserError: the text has no gap, or characters outside the vocabulary.
    """
    if not GAP.search(text):
        raise UserError("an infill text must have a gap of at least four underscores: ____")
    ids: list[int] = []
    end = 0
    for gap in GAP.finditer(text):
        ids += vocabulary.encode(text[end : gap.start()])
        ids += [vocabulary.mask_id] * len(gap.group())
        end = gap.end()
    return ids + vocabulary.encode(text[end:])
