"""nanoGPT's checkpoint as a run: weights and configuration are checked, and [MASK] gets its row."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.appearing import appearing
from difftrain.checkpoints.folder import digest_of
from difftrain.checkpoints.writing import save_checkpoint
from difftrain.config import Config
from difftrain.config.sources import CONFIG_FILE
from difftrain.data.opening import FILES, GPT2_WORDS, read_json, read_plain_pickle
from difftrain.data.vocabulary import Vocabulary, from_meta
from difftrain.errors import UserError
from difftrain.exchange.nanogpt_names import EMBEDDING, HEAD, nanogpt_name
from difftrain.model import Transformer, make_optimizer, optimizer_tensors

PADDED_GPT2 = 50304  # rows that nanoGPT gives GPT-2's 50257 words
NO_DATA = "unknown (imported)"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# All that decides what the model computes; the last two are the specification's.
ARGUMENTS = {*SIZES, "bias", "dropout", "model_type", "mask_token_id"}
# Of the training's options those that the specification's loss depends on.
PENALTIES = (
    "penalty_keep_mask", "penalty_mask_correct", "masking_warmup_iters", "guaranteed_correct_factor",
)  # fmt: skip
# Where attention was not fused it kept its causal mask beside the weights.
_CAUSAL_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")


@dataclass(frozen=True)
class _Foreign:
    """A checkpoint of nanoGPT's.

    Attributes:
        file: where it lies.
        weights: by nanoGPT's names, without prefix, head and causal masks.
        arguments: of its model.
        options: of its training.
        facts: what it says of its training's course.
    """

    file: Path
    weights: dict[str, Tensor]
    arguments: dict[str, Any]
    options: dict[str, Any]
    facts: dict[str, Any]


def import_nanogpt(
    file: Path, out: Path, *, meta: Path | None = None, mode: str = "", data: str = ""
) -> list[str]:
    """Make a run of a nanoGPT checkpoint; the run stands at step 0, and its optimiser is fresh.

    The vocabulary gains [MASK], whose embedding is the mean of the words'; a checkpoint of the specification's
    diffusion model has it, and keeps its id. In gpt2 mode [MASK] is never an answer, so that losses too are
    nanoGPT's. Nothing that is read can execute code.

    Args:
        file: ``ckpt.pt`` as nanoGPT's train.py writes it.
        out: the run's folder, which must not be there.
        meta: nanoGPT's ``meta.pkl``, or a ``meta.json`` of ``difftrain prepare``; without one the words are numbers.
        mode: "gpt2" or "diffusion"; empty: as it was trained. A gpt2 model can be taken without its causal mask,
            as the beginning of a diffusion training; never the other way round.
        data: what the run's option ``data`` says; empty: the folder of ``meta`` where that holds token files.

    Returns:
        What became of it, in lines.

    Raises:
        UserError: not such a checkpoint, or a model that ours would not compute exactly.
    """
    foreign, was, mask_id = read_nanogpt(file)
    mode = mode or was
    if (was, mode) == ("diffusion", "gpt2"):
        raise UserError(f"{file} was trained without a causal mask, so mode must be diffusion, got gpt2")
    vocabulary = _vocabulary(foreign, meta, mask_id)
    if not data:
        data = str(meta.parent) if meta and (meta.parent / FILES[0]).is_file() else NO_DATA
    config = _config(foreign, vocabulary, out_dir=str(out), data=data, mode=mode)
    notes = _notes(foreign, vocabulary, was, mode, mask_id)
    model = Transformer(config, vocabulary.vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = foreign.weights[nanogpt_name(name)]
            parameter.copy_(
                _with_mask_row(theirs, vocabulary, mask_id) if name == "embedding.weight" else theirs
            )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {
        "scaler": {}, "best_loss": None, "best_step": None, "measure": None, "is_evaluated": False,
        "bad_steps": 0, "skipped_steps": 0, "usual_norm": 0.0, "norms": 0,
        "imported": {"from": "nanogpt", "file": file.name, "sha256": digest_of(file), **foreign.facts},
    }  # fmt: skip
    with appearing(out) as aside:
        aside.mkdir()
        (aside / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
        moments = optimizer_tensors(model, make_optimizer(model, config))
        save_checkpoint(aside, 0, weights, moments, state, config, vocabulary, best_step=0)
    size = f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}"
    return [
        *notes,
        f"{out}: {model.n_parameters():,} parameters ({size}), {mode} mode, vocabulary {vocabulary.vocab_size}",
    ]


def read_nanogpt(file: Path) -> tuple[_Foreign, str, int | None]:
    """What a checkpoint holds, the mode of its training, and the id of [MASK] where it has one; see import_nanogpt."""
    foreign = _read(file)
    return foreign, *_trained_as(foreign)


def _read(file: Path) -> _Foreign:
    content = _load(file)
    parts = [content.get(key) for key in ("model", "model_args")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{file} is not nanoGPT's checkpoint: it must hold model and model_args")
    weights, arguments = parts
    if unknown := [str(key) for key in arguments if key not in ARGUMENTS]:
        raise UserError(
            f"{file} is refused: its model has {unknown[0]}, which nanoGPT's and difftrain's have not"
        )
    if absent := [key for key in SIZES if type(arguments.get(key)) is not int]:
        raise UserError(f"{file} is not nanoGPT's checkpoint: model_args must give {absent[0]} as a number")
    named = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    if len(named) < len(weights):
        raise UserError(f"{file} is refused: it has weights twice, with and without the prefix _orig_mod.")
    named = {name: tensor for name, tensor in named.items() if not _CAUSAL_MASK.fullmatch(name)}
    for name, tensor in named.items():
        if not _is_plain(tensor):
            raise UserError(f"{file} is refused: {name} is no plain tensor of finite numbers up to fp32")
    head = named.pop(HEAD, None)
    if head is not None and not (EMBEDDING in named and torch.equal(head, named[EMBEDDING])):
        raise UserError(f"{file} is refused: its head must be its embedding, as nanoGPT's is")
    options = content.get("config")
    facts = {key: content.get(key) for key in ("iter_num", "best_val_loss")}
    facts = {key: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for key, v in facts.items()}
    return _Foreign(
        file,
        named,
        arguments,
        options if isinstance(options, dict) else {},
        {key: value for key, value in facts.items() if isinstance(value, (int, float))},
    )


def _load(file: Path) -> Any:
    """What a PyTorch file of tensors and plain data holds; nothing in it is executed."""
    with file.open("rb"):
        pass  # where it cannot be opened, that is the error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can raise anything
        text = str(error).strip()
        if named := re.search(r"GLOBAL (\S+)", text):
            why = f"it names {named[1]}, and must hold tensors and plain data only"
        else:
            # Before the error itself stands advice to load without this protection.
            _, _, cause = text.partition("WeightsUnpickler error: ")
            reason = ("" if text.startswith("Weights only") and not cause else cause or text).partition(
                "\n"
            )[0]
            why = "it is no whole PyTorch file" + (f" ({reason[:200]})" if reason else "")
        raise UserError(f"{file} is refused: {why}") from None


def _is_plain(tensor: Any) -> bool:
    """Whether this is a tensor that fp32 holds exactly, as large as its storage says."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    is_whole = tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    return is_whole and bool(tensor.isfinite().all())


def _trained_as(foreign: _Foreign) -> tuple[str, int | None]:
    """The mode of its training, and the id of [MASK] where it has one."""
    mask_id = foreign.arguments.get("mask_token_id")
    mode = foreign.arguments.get("model_type") or ("gpt2" if mask_id is None else "diffusion")
    if mode not in ("gpt2", "diffusion"):
        raise UserError(f"{foreign.file} is refused: model_type must be gpt2 or diffusion, got {mode!r}")
    if mode == "gpt2":
        return mode, None
    if type(mask_id) is not int or not 2 <= mask_id < foreign.arguments["vocab_size"]:
        raise UserError(
            f"{foreign.file} is refused: mask_token_id must be an id below vocab_size, got {mask_id!r}"
        )
    return mode, mask_id


def _vocabulary(foreign: _Foreign, meta: Path | None, mask_id: int | None) -> Vocabulary:
    """The words of its rows: those that ``meta`` tells, else so many numbers as nanoGPT takes for words."""
    n_rows = foreign.arguments["vocab_size"]
    if meta:
        content = read_json(meta) if meta.suffix == ".json" else read_plain_pickle(meta)
        vocabulary = from_meta(content, str(meta))
        stated = content.get("vocab_size", vocabulary.n_words)
        if stated != vocabulary.n_words:
            raise UserError(f"{meta} says vocab_size {stated} and lists {vocabulary.n_words} words")
    else:
        if mask_id not in (None, n_rows - 1):
            raise UserError(
                f"{foreign.file} has {n_rows} rows and [MASK] at {mask_id}: give --meta, to tell words from padding"
            )
        n_words = GPT2_WORDS if n_rows == PADDED_GPT2 else n_rows
        n_words = n_words if mask_id is None else mask_id
        vocabulary = from_meta({"kind": "ids", "vocab_size": n_words}, str(foreign.file))
    if mask_id not in (None, vocabulary.mask_id):
        raise UserError(
            f"{foreign.file} has [MASK] at {mask_id}, which must be the number of words that {meta} tells, "
            f"got {vocabulary.n_words}"
        )
    if vocabulary.n_words > n_rows:
        raise UserError(f"{foreign.file} has {n_rows} rows, but {meta} tells of {vocabulary.n_words} words")
    return vocabulary


def _config(foreign: _Foreign, vocabulary: Vocabulary, **place: str) -> Config:
    """The run's configuration; raises UserError unless the weights are exactly those that it asks for."""
    weights, arguments, file = foreign.weights, foreign.arguments, foreign.file
    keys = {key: arguments[key] for key in SIZES if key != "vocab_size"}
    keys |= {key: foreign.options[key] for key in PENALTIES if key in foreign.options}
    keys["bias"] = arguments.get("bias", "transformer.ln_f.bias" in weights)
    keys["dropout"] = arguments.get("dropout", 0.0)
    blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(blocks) != keys["n_layer"]:
        raise UserError(f"{file} is refused: n_layer is {keys['n_layer']}, and it has {len(blocks)} blocks")
    try:
        config = Config(**place, **keys, position="learned", forbid_mask=place["mode"] == "gpt2")
    except UserError as error:
        raise UserError(f"{file} is refused: {error}") from None
    shapes = {
        nanogpt_name(name): tuple(parameter.shape)
        for name, parameter in Transformer(config, vocabulary.vocab_size, device="meta").named_parameters()
    }
    shapes[EMBEDDING] = (arguments["vocab_size"], config.n_embd)
    for name in sorted(shapes.keys() ^ weights.keys()):
        has = "lacks" if name in shapes else "has"
        raise UserError(f"{file} is not nanoGPT's model with bias {config.bias}: it {has} {name}")
    for name, shape in shapes.items():
        if (found := tuple(weights[name].shape)) != shape:
            raise UserError(f"{file} is refused: {name} must have shape {shape}, got {found}")
    return config


def _with_mask_row(table: Tensor, vocabulary: Vocabulary, mask_id: int | None) -> Tensor:
    """The embeddings of the words and [MASK] (V, D), without padding; without a row of its own it has their mean."""
    words = table[: vocabulary.n_words].float()
    mask_row = words.double().mean(0).float() if mask_id is None else table[mask_id].float()
    return torch.cat((words, mask_row[None]))


def _notes(
    foreign: _Foreign, vocabulary: Vocabulary, was: str, mode: str, mask_id: int | None
) -> list[str]:
    """What a reader must know of what was changed."""
    notes = []
    padding = foreign.arguments["vocab_size"] - vocabulary.n_words - (mask_id is not None)
    if padding:
        notes.append(
            f"note: {padding} rows beyond the {vocabulary.n_words} words are padding and left out: "
            "logits of words stay, probabilities are among words alone"
        )
    if mask_id is None:
        notes.append(f"note: [MASK] is added as id {vocabulary.mask_id}, the mean of the words' embeddings")
    else:
        notes.append(f"note: [MASK] keeps its id {mask_id}")
    if was != mode:
        notes.append("note: the causal mask is dropped, so the model must be trained before it fills gaps")
    missing = [key for key in PENALTIES if key not in foreign.options]
    if missing and was == "diffusion":
        notes.append(f"note: it does not say its {', '.join(missing)}: the defaults are taken")
    return notes
