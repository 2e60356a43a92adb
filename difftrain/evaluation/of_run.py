"""Everything that ``difftrain evaluate`` tells of a run's checkpoint, on its held-out text or on any other."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from difftrain.checkpoints.exported import open_model
from difftrain.checkpoints.reading import Checkpoint, open_held_out
from difftrain.config.options import LARGEST_FLOAT
from difftrain.data import Corpus, open_corpus
from difftrain.data.texts import NotText, decode_text, read_text
from difftrain.data.vocabulary import Ids, Vocabulary
from difftrain.errors import UserError
from difftrain.evaluation.answers import Answers
from difftrain.evaluation.likelihood import ESTIMATORS, bound_masked, score_causal
from difftrain.evaluation.validation_set import FIXED, evaluate, make_validation_set
from difftrain.evaluation.windows import Estimate, Windows, cut, ratio
from difftrain.loss import bent_logits, loss_terms
from difftrain.runtime import Runtime, start_runtime
from difftrain.schedule import case_weights, final_penalties, masking_penalties, reached_of
from difftrain_kernels import CaseTable


@dataclass(frozen=True)
class EvaluationRequest:
    """What to find out; the fields are the options of ``difftrain evaluate``.

    Attributes:
        data: the run's own held-out text where empty; else a text, "-" for standard input, or what the
            option ``data`` of training takes, of which the validation split is read.
        windows: so many pieces of block_size tokens, evenly spaced over the text; 0: all.
        levels, errors: per cent of a window's words that are masked, or replaced.
        penalties: (pk, pm) at which the loss is told beside the current, the final and none.
        draws: maskings of each window in the bound on the likelihood.
    """

    data: str = ""
    checkpoint: str = "best"
    windows: int = 128
    levels: tuple[float, ...] = (15.0, 50.0, 85.0)
    errors: tuple[float, ...] = (1.0, 5.0, 15.0)
    penalties: tuple[tuple[float, float], ...] = ()
    estimators: tuple[str, ...] = ESTIMATORS
    draws: int = 8
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "float32"
    allow_changed_data: bool = False

    def __post_init__(self) -> None:
        for name, low in {"windows": 0, "draws": 1, "seed": 0, "batch_size": 1}.items():
            if not low <= getattr(self, name) < 2**31:
                raise UserError(f"{name} must be at least {low} and below 2^31, got {getattr(self, name)}")
        for name in ("levels", "errors"):
            for share in getattr(self, name):
                if not 0 < share <= 100:
                    raise UserError(f"{name} must be per cents in (0, 100], got {share:g}")
            if len({f"{share:g}" for share in getattr(self, name)}) < len(getattr(self, name)):
                raise UserError(
                    f"{name} must differ, got {','.join(f'{s:g}' for s in getattr(self, name))}"
                )
        for name in self.estimators:
            if name not in ESTIMATORS:
                raise UserError(f"estimators must be among {', '.join(ESTIMATORS)}, got {name!r}")
        for pair in self.penalties:
            if not all(0 <= p <= LARGEST_FLOAT for p in pair):
                raise UserError(f"penalties must be in [0, {LARGEST_FLOAT:g}], got {pair[0]:g},{pair[1]:g}")


@dataclass(frozen=True)
class _Text:
    """What is evaluated: its ids, and the corpus where it is the run's own."""

    name: str
    ids: np.ndarray
    corpus: Corpus | None = None


def evaluate_run(run_dir: Path, request: EvaluationRequest) -> dict[str, Any]:
    """What a checkpoint knows of a text, as plain numbers for JSON; every process returns the same.

    Random numbers depend on the request's seed and on a window's place in the text alone, not on the batch
    size or the number of processes.

    Raises:
        UserError: not a run folder, no such checkpoint, or a text that the vocabulary does not hold.
    """
    checkpoint = open_model(run_dir, request.checkpoint)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = dataclasses.replace(
        checkpoint.config,
        device=request.device,
        dtype=request.dtype,
        gradient_accumulation_steps=world_size,
    )
    with start_runtime(config) as runtime:
        text = runtime.main_first(lambda: _open(checkpoint, request))
        is_causal = config.mode == "gpt2"
        if len(text.ids) <= is_causal:
            raise UserError(f"{text.name} must have at least {1 + is_causal} tokens, got {len(text.ids)}")
        windows = cut(
            text.ids, config.block_size + is_causal, at_most=request.windows, overlap=int(is_causal)
        )
        model = checkpoint.make_model(runtime.device)
        if runtime.dtype == torch.float64:
            model.double()
        answers = Answers(
            model, config, checkpoint.vocabulary.mask_id,
            seed=request.seed, runtime=runtime, batch_size=request.batch_size,
        )  # fmt: skip
        sizes = _Sizes(windows, checkpoint.vocabulary, is_causal)
        counts = text.corpus.unigram_counts if text.corpus and config.replacement == "unigram" else None
        record: dict[str, Any] = {
            "run": str(run_dir),
            "step": checkpoint.step,
            "mode": config.mode,
            "data": text.name,
            "windows": len(windows.tokens),
            "windows_in_text": windows.n_pieces,
            "tokens": int(sizes.tokens.sum()),
            "characters": sizes.characters,
            "bytes": sizes.bytes,
            "seed": request.seed,
            "unigram_entropy": _unigram_entropy(windows),
            "loss": _losses(answers.as_in_training(windows, counts), checkpoint, request),
        }
        if text.corpus:
            record["validation"] = _validation(text.corpus, model, checkpoint, request, runtime)
        if not is_causal:
            record["masked"] = {
                f"{level:g}": _plain(answers.at_level(windows, level / 100)) for level in request.levels
            }
        if config.has_penalties and config.replace_factor > 0:
            record["repair"] = {
                f"{share:g}": _plain(answers.at_errors(windows, share / 100)) for share in request.errors
            }
        record["likelihood"] = _likelihood(model, windows, sizes, checkpoint, request, runtime)
        return record


def _open(checkpoint: Checkpoint, request: EvaluationRequest) -> _Text:
    vocabulary, name = checkpoint.vocabulary, request.data
    if not name:
        corpus = open_held_out(checkpoint, is_change_allowed=request.allow_changed_data)
        return _Text(f"{checkpoint.config.data} (held-out part)", corpus.val, corpus)
    if name == "-" or Path(name).is_file():
        try:
            ids = vocabulary.encode(_read(name))
        except (NotText, UserError) as error:
            raise UserError(f"{name}: {error}") from None
        return _Text(name, np.array(ids, dtype=np.int64))
    corpus = open_corpus(name)
    if corpus.vocabulary.to_meta() != vocabulary.to_meta():
        raise UserError(
            f"the data {name} has another vocabulary than the checkpoint; give its text as a file"
        )
    return _Text(f"{name} (held-out part)", corpus.val)


def _read(name: str) -> str:
    if name != "-":
        return read_text(Path(name), "universal")
    if "WORLD_SIZE" in os.environ:
        raise UserError("standard input cannot be read by several processes; give a file")
    if sys.stdin is None:
        raise UserError("standard input is closed; give a file")
    return decode_text(sys.stdin.buffer.read(), "universal")


class _Sizes:
    """How long the windows are: in tokens (W,) fp64, and all together in characters and bytes, None without text."""

    def __init__(self, windows: Windows, vocabulary: Vocabulary, is_causal: bool):
        pieces = [
            t[int(is_causal) :] for t in windows.tokens
        ]  # the first token of a causal one is not predicted
        self.tokens = torch.tensor([len(p) for p in pieces], dtype=torch.float64, device="cpu")
        self.characters = self.bytes = None
        if not isinstance(vocabulary, Ids):
            texts = [vocabulary.decode_words(p.tolist()) for p in pieces]
            self.characters = sum(map(len, texts))
            self.bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _unigram_entropy(windows: Windows) -> float:
    """Entropy of the windows' words in nats: what guessing by their frequency costs."""
    counts = torch.cat(windows.tokens).bincount().double()
    share = counts[counts > 0] / counts.sum()
    return max(0.0, -(share * share.log()).sum().item())


def _losses(table: CaseTable, checkpoint: Checkpoint, request: EvaluationRequest) -> list[dict[str, Any]]:
    """The loss at each penalties asked for, from one table."""
    config = checkpoint.config
    if not config.has_penalties:
        return [{"penalties": "none", "pk": 1.0, "pm": 1.0, "loss": table.loss_at().item()}]
    at_step = (checkpoint.step, config, reached_of(checkpoint.state, config))
    named = [
        ("of this step", masking_penalties(*at_step)),
        ("final", final_penalties(config)),
        ("none", (1.0, 1.0)),
        *(("asked for", pair) for pair in request.penalties),
    ]
    losses = [
        {"penalties": name, "pk": pk, "pm": pm, "loss": table.loss_at(pk, pm).item()}
        for name, (pk, pm) in named
    ]
    if weights := case_weights(*at_step):
        losses[0]["loss"] = table.loss_at(case_weights=weights).item()
    return losses


def _validation(
    corpus: Corpus, model: Any, checkpoint: Checkpoint, request: EvaluationRequest, runtime: Runtime
) -> dict[str, Any]:
    """The loss on the run's own fixed validation set, which its metrics tell too."""
    validation_set = make_validation_set(corpus, checkpoint.config)
    mask_id = checkpoint.vocabulary.mask_id
    tables = evaluate(model, validation_set, mask_id, runtime, **loss_terms(checkpoint.config))
    return {"id": validation_set.id, "loss": _losses(tables[FIXED], checkpoint, request)}


def _likelihood(
    model: Any,
    windows: Windows,
    sizes: _Sizes,
    checkpoint: Checkpoint,
    request: EvaluationRequest,
    runtime: Runtime,
) -> dict[str, Any]:
    mask_id = checkpoint.vocabulary.mask_id
    logits_of = bent_logits(model, mask_id, checkpoint.config)
    options = {"runtime": runtime, "batch_size": request.batch_size}
    if checkpoint.config.mode == "gpt2":
        return {"exact": _by_unit(score_causal(logits_of, windows, mask_id, **options), sizes)}
    found = {}
    for name in request.estimators:
        draws = bound_masked(
            logits_of, windows, mask_id, estimator=name, draws=request.draws, seed=request.seed, **options
        )
        found[name] = {"draws": request.draws, **_by_unit(draws.mean(1), sizes, draws)}
    return found


def _by_unit(nats: torch.Tensor, sizes: _Sizes, draws: torch.Tensor | None = None) -> dict[str, Any]:
    """Nats of each window (W,) as a figure for each unit of text.

    Args:
        draws: (W, draws), of which they are the means: the spread of one window alone.
    """
    per_token = ratio(nats, sizes.tokens)
    if draws is not None and len(nats) == 1 and draws.shape[1] > 1:
        spread = draws.std().item() / math.sqrt(draws.shape[1]) / sizes.tokens.sum().item()
        per_token = Estimate(per_token.value, spread)
    n_tokens, bits = sizes.tokens.sum().item(), 1.0 / math.log(2.0)
    figures = {"nats_per_token": per_token}
    for unit, count in (("character", sizes.characters), ("byte", sizes.bytes)):
        if count:
            figures[f"bits_per_{unit}"] = per_token.times(bits * n_tokens / count)
    return _plain(figures)


def _plain(figures: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Figures for JSON; what is not finite as None."""
    return {
        name: {k: v if math.isfinite(v) else None for k, v in dataclasses.asdict(figure).items()}
        for name, figure in figures.items()
    }
