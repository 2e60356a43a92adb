"""The weights of a trained model at the beginning of another run: GPT-2's, nanoGPT's or our own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.checkpoints.exported import open_model
from difftrain.config import Config
from difftrain.data.vocabulary import Characters, Vocabulary
from difftrain.errors import UserError
from difftrain.exchange.from_gpt2 import is_gpt2, read_gpt2
from difftrain.exchange.from_nanogpt import read_nanogpt
from difftrain.exchange.nanogpt_names import EMBEDDING, nanogpt_name
from difftrain.model import Transformer

LARGEST_PADDING = 128  # rows that a table may have beyond its words, to be of a round size
POSITIONS = "positions.weight"


@dataclass(frozen=True)
class Source:
    """A trained model.

    Attributes:
        origin: where it lies.
        weights: by our names.
        options: of the configuration, those that the new run must have as well.
        mode: as it was trained, "gpt2" or "diffusion".
        mask_id: the row of its [MASK]; None: it has none.
        vocabulary: its words, where they are known.
        notes: what else it computes otherwise than ours will.
    """

    origin: Path
    weights: dict[str, Tensor]
    options: dict[str, int | bool | str]
    mode: str
    mask_id: int | None
    vocabulary: Vocabulary | None = None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def warm_start(model: Transformer, config: Config, vocabulary: Vocabulary) -> list[str]:
    """Give a new run's model the weights of ``config.init_from``; what has no counterpart there keeps its own.

    Words that both know take their row; a word that is new, and [MASK], begin as the mean of all rows of words.

    Returns:
        What became of it, in lines: vocabulary sizes, and everything that did not fit.

    Raises:
        UserError: there is no such model, or its layers are other ones than the configuration's.
    """
    source = _open(Path(config.init_from))
    other = {name: value for name, value in source.options.items() if getattr(config, name) != value}
    if other:
        wanted = " ".join(f"--{name} {str(value).lower()}" for name, value in other.items())
        raise UserError(
            f"the model of init_from {source.origin} needs other options than this run's: {wanted}"
        )
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted(expected.keys() ^ source.weights.keys()):
        has = "lacks" if name in expected else "has"
        raise UserError(f"init_from {source.origin} does not fit: it {has} {name}")
    notes = list(source.notes)
    for name, parameter in model.named_parameters():
        theirs = source.weights[name]
        if name == "embedding.weight":
            notes += _copy_rows(parameter, theirs, source, vocabulary)
        elif name == POSITIONS:
            n = min(len(parameter), len(theirs))
            if theirs.shape[1:] != parameter.shape[1:]:
                raise UserError(f"init_from {source.origin}: {name} has shape {tuple(theirs.shape)}")
            parameter[:n].copy_(theirs[:n])
            if len(theirs) != len(parameter):
                rest = "the others begin anew" if n < len(parameter) else "the others are left out"
                notes.append(f"{n} positions are taken, {rest}")
        elif tuple(theirs.shape) != expected[name]:
            raise UserError(
                f"init_from {source.origin}: {name} must have shape {expected[name]}, got {tuple(theirs.shape)}"
            )
        else:
            parameter.copy_(theirs)
    if (source.mode, config.mode) == ("gpt2", "diffusion"):
        over = f"over {config.causal_anneal_iters} steps" if config.causal_anneal_iters else "at once"
        notes.append(f"the causal mask is dropped {over}")
    elif source.mode != config.mode:
        notes.append(f"it was trained in {source.mode} mode, and goes on in {config.mode} mode")
    return [f"weights of {source.origin}", *notes]


def _open(path: Path) -> Source:
    if path.is_file():
        foreign, mode, mask_id = read_nanogpt(path)
        names = ("n_layer", "n_head", "n_embd")
        options = {name: foreign.arguments[name] for name in names}
        options |= {"bias": "transformer.ln_f.bias" in foreign.weights, "position": "learned"}
        return Source(path, _ours(foreign.weights, path), options, mode, mask_id)
    if not path.is_dir():
        raise UserError(f"init_from {path} is not there: it must be a folder, or nanoGPT's ckpt.pt")
    if is_gpt2(path):
        weights, options, notes = read_gpt2(path)
        return Source(path, _ours(weights, path), options, "gpt2", None, notes=notes)
    found = open_model(path, "best")
    weights = dict(found.make_model(torch.device("cpu")).named_parameters())
    names = ("n_layer", "n_head", "n_embd", "bias", "position")
    options = {name: getattr(found.config, name) for name in names}
    words = found.vocabulary
    return Source(path, weights, options, found.config.mode, words.mask_id, words)


def _ours(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights of nanoGPT's names under ours."""
    n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    parts = ("norm_1", "attention.qkv", "attention.proj", "norm_2", "mlp.up", "mlp.proj")
    ours = [f"blocks.{i}.{part}" for i in range(n_layer) for part in parts] + [
        "embedding",
        "positions",
        "norm",
    ]
    named = {
        nanogpt_name(f"{part}.{kind}"): f"{part}.{kind}" for part in ours for kind in ("weight", "bias")
    }
    for name in weights:
        if name not in named:
            raise UserError(f"init_from {path} is no GPT-2: it has {name}")
    if EMBEDDING not in weights:
        raise UserError(f"init_from {path} does not fit: it lacks {EMBEDDING}")
    return {named[name]: tensor for name, tensor in weights.items()}


def _copy_rows(table: Tensor, theirs: Tensor, source: Source, vocabulary: Vocabulary) -> list[str]:
    """Fill our embeddings (V, D) from theirs; returns what became of it."""
    if theirs.shape[1:] != table.shape[1:]:
        raise UserError(f"init_from {source.origin}: its embedding has shape {tuple(theirs.shape)}")
    sizes = f"vocabulary {vocabulary.vocab_size} here, {len(theirs)} there"
    pairs = _same_words(len(theirs), source, vocabulary)
    if pairs is None:
        return [f"{sizes}: the words are others, so the embeddings begin anew"]
    to, of = (
        torch.tensor(each, dtype=torch.int64, device=table.device) for each in zip(*pairs, strict=True)
    )
    rows = theirs.to(table.device)[of].to(table.dtype)
    table.copy_(rows.double().mean(0).to(table.dtype).expand_as(table))
    table[to] = rows
    notes = [f"{sizes}: {len(pairs)} words in common"]
    if len(pairs) < vocabulary.n_words:
        notes.append(
            f"{vocabulary.n_words - len(pairs)} words that it does not know begin as the mean of the others"
        )
    if source.mask_id is None:
        notes.append("[MASK] begins as the mean of the words")
    else:
        table[vocabulary.mask_id] = theirs[source.mask_id].to(table)
    return notes


def _same_words(n_rows: int, source: Source, vocabulary: Vocabulary) -> list[tuple[int, int]] | None:
    """Which word of ours is which of theirs; None where that cannot be, or nothing is in common.

    Words that are known are compared. Of a table without words, only its size can be.
    """
    if source.vocabulary is not None:
        if source.vocabulary.to_meta() == vocabulary.to_meta():
            return [(i, i) for i in range(vocabulary.n_words)]
        if not (isinstance(source.vocabulary, Characters) and isinstance(vocabulary, Characters)):
            return None
        place = {character: i for i, character in enumerate(source.vocabulary.characters)}
        return [(i, place[c]) for i, c in enumerate(vocabulary.characters) if c in place] or None
    n_words = n_rows if source.mask_id is None else source.mask_id
    padding = n_words - vocabulary.n_words
    may_be_padded = source.mask_id is None and not isinstance(vocabulary, Characters)
    if not 0 <= padding < (LARGEST_PADDING if may_be_padded else 1):
        return None
    return [(i, i) for i in range(vocabulary.n_words)]
