"""Sampling: iterative unmasking. A text starts with [MASK]s, and the model fills them in."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.checkpoint import Checkpoint, find_checkpoint
from difftrain.config import UserError
from difftrain.corruption import mask_share
from difftrain.data import open_corpus
from difftrain.metrics import read_metrics, summary_line
from difftrain.runtime import resolve_device
from difftrain.vocabulary import Vocabulary

GAP = re.compile("_{4,}")  # in an infill text, this many underscores are as many [MASK]s
HELD_OUT_WINDOWS = 5  # what --held_out shows, in block_size tokens
Logits = Callable[[Tensor], Tensor]


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

    def __post_init__(self) -> None:
        lowest = {"length": 0, "num_samples": 1, "max_steps": 1, "temperature": 0, "top_k": 0, "seed": 0}
        for name, low in lowest.items():
            if not low <= getattr(self, name) < 2**31:
                raise UserError(f"{name} must be at least {low} and below 2^31, got {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise UserError(f"share must be in (0, 1], got {self.share}")


def sample_run(run_dir: Path, request: SampleRequest) -> str:
    """Write text with a run's model; the text is also kept in the run's folder ``samples``.

    Raises:
        UserError: not a run folder, no such checkpoint, or a text that does not fit the model.
    """
    checkpoint = find_checkpoint(run_dir, request.checkpoint)
    if checkpoint.config.mode == "gpt2" and (request.infill is not None or request.held_out):
        raise UserError(f"{run_dir} was trained in gpt2 mode, which cannot fill gaps; give a prompt")
    device = resolve_device(request.device)
    model = checkpoint.make_model(device)
    generator = torch.Generator(device).manual_seed(request.seed)
    options = {"temperature": request.temperature, "top_k": request.top_k, "generator": generator}
    vocabulary = checkpoint.vocabulary

    if request.held_out:
        tokens, x = _held_out(checkpoint, request)
        filled = fill(model, x.to(device), vocabulary.mask_id, max_steps=request.max_steps,
                      by_confidence=request.by_confidence, **options).cpu()  # fmt: skip
        is_masked = x == vocabulary.mask_id
        n_right = int((filled == tokens)[is_masked].sum())
        texts = (vocabulary.decode(t.flatten().tolist(), mask=_mask_sign()) for t in (tokens, x, filled))
        titles = ("original", f"masked ({100 * request.share:.0f} %)", "restored")
        parts = [f"--- {title}\n{text}" for title, text in zip(titles, texts, strict=True)]
        parts.append(f"--- {n_right} of {int(is_masked.sum())} masked tokens restored exactly")
        evaluations = [r for r in read_metrics(run_dir) if r["kind"] == "eval"]
        at_step = [r for r in evaluations if r["step"] == checkpoint.step] or evaluations
        return _keep(run_dir, checkpoint, "\n".join([*parts, summary_line(at_step[-1])]))

    ids = _start(checkpoint, request)
    x = torch.tensor(ids, device=device).expand(request.num_samples, -1)
    if checkpoint.config.mode == "gpt2":
        length = request.length or checkpoint.config.block_size
        filled = continue_causal(model, x, length, vocabulary.mask_id, **options)
    else:
        filled = fill(model, x, vocabulary.mask_id, max_steps=request.max_steps,
                      by_confidence=request.by_confidence, **options)  # fmt: skip
    texts = [vocabulary.decode(row) for row in filled.tolist()]
    if len(texts) > 1:
        texts = [f"--- {i + 1}\n{text}" for i, text in enumerate(texts)]
    return _keep(run_dir, checkpoint, "\n".join(texts))


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
    if length > block_size:
        raise UserError(f"length must be at most block_size {block_size}, got {length}")
    if len(prompt) >= length:
        raise UserError(f"the prompt must have fewer tokens than the text's {length}, got {len(prompt)}")
    if checkpoint.config.mode == "gpt2":
        # Left to right there must be something to start from: a newline, as nanoGPT has it, or any word.
        try:
            return prompt or vocabulary.encode("\n")
        except UserError:
            return [0]
    return prompt + [vocabulary.mask_id] * (length - len(prompt))


def _held_out(checkpoint: Checkpoint, request: SampleRequest) -> tuple[Tensor, Tensor]:
    """A piece of the validation text, as is and partly masked: (W, block_size) each."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    corpus = open_corpus(config.data)
    if corpus.vocabulary.to_meta() != vocabulary.to_meta():
        raise UserError(f"the data {config.data} has another vocabulary than the checkpoint")
    n_windows = max(1, min(HELD_OUT_WINDOWS, len(corpus.val) // config.block_size))
    index = torch.tensor([request.seed])
    tokens = corpus.windows("val", index, seed=config.seed, length=n_windows * config.block_size)
    tokens = tokens.view(n_windows, config.block_size)
    x, _ = mask_share(
        tokens,
        torch.arange(n_windows) + request.seed * n_windows,
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


def _keep(run_dir: Path, checkpoint: Checkpoint, text: str) -> str:
    """Write a text into the run's folder too; returns it."""
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{checkpoint.step:08d}-{len(list(folder.iterdir())) + 1:03d}.txt"
    path.write_text(text + "\n", encoding="utf-8")
    return text


@torch.no_grad()
def fill(
    logits_of: Logits,
    x: Tensor,
    mask_id: int,
    *,
    max_steps: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    by_confidence: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace every [MASK] of ``x``; other positions stay as they are.

    As specified: repeat up to ``max_steps`` times, predict all positions, sample each, and fill
    those that are [MASK]; a sampled [MASK] stays one. What is left at the end is filled with
    [MASK] forbidden. With ``by_confidence`` each step may fill only its share of what is masked,
    the most probable samples first, and [MASK] is forbidden: a fixed budget of ``max_steps``.

    Args:
        logits_of: the model, ids (B, T) to logits (B, T, V), in evaluation mode.
        x: (B, T) int64; not modified.
        mask_id: id of [MASK].
        max_steps: passes of the model, at least 1 (the fill at the end is one more).
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: sample among this many most probable tokens; 0 among all.
        by_confidence: fill the most certain positions first.
        generator: source of randomness, on x's device.

    Returns:
        (B, T) int64 without any [MASK].

    Source: the specification, "Generation"; confidence order after MaskGIT (Chang et al., 2022).
    """
    x = x.clone()
    forbid = mask_id if by_confidence else None
    for step in range(max_steps):
        is_masked = x == mask_id
        if not is_masked.any():
            return x
        sampled, confidence = _sample(logits_of(x), temperature, top_k, forbid, generator)
        if by_confidence:
            left = is_masked.sum(1, keepdim=True)
            budget = (left / (max_steps - step)).ceil().long()  # (B, 1)
            confidence = confidence.masked_fill(~is_masked, -1.0)
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            is_masked &= rank < budget
        x = torch.where(is_masked, sampled, x)
    is_masked = x == mask_id
    if is_masked.any():
        sampled, _ = _sample(logits_of(x), temperature, top_k, mask_id, generator)
        x = torch.where(is_masked, sampled, x)
    return x


@torch.no_grad()
def continue_causal(
    logits_of: Logits,
    x: Tensor,
    length: int,
    mask_id: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append tokens from left to right until ``x`` (B, T) has ``length`` columns: the gpt2 mode's sampler."""
    while x.shape[1] < length:
        sampled, _ = _sample(logits_of(x)[:, -1:], temperature, top_k, mask_id, generator)
        x = torch.cat((x, sampled), dim=1)
    return x


def _sample(
    logits: Tensor, temperature: float, top_k: int, forbid: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token for each position of (B, T, V) logits, and its probability: (B, T) each."""
    logits = logits.float()
    if forbid is not None:
        logits[..., forbid] = -torch.inf
    if temperature == 0:
        confidence, token = logits.softmax(-1).max(-1)
        return token, confidence
    # From the largest on, so that a temperature near 0 gives -inf and never inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    p = logits.softmax(-1)
    token = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
    return token, p.gather(-1, token[..., None]).squeeze(-1)


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
