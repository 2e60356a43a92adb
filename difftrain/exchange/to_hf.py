"""A run's model as a folder for transformers: weights, words, the model's own code, and a card of its figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from difftrain.appearing import appearing
from difftrain.checkpoints.exported import CONFIG, DESCRIPTION, PREFIX
from difftrain.checkpoints.folder import WEIGHTS
from difftrain.checkpoints.reading import Checkpoint, find_checkpoint
from difftrain.errors import UserError
from difftrain.exchange.hf_card import card
from difftrain.exchange.hf_tokenizer import tokenizer_files

HERE = Path(__file__).parent
MODEL, ROTARY, MODELLING = "difftrain_model.py", "difftrain_rotary.py", "modeling_difftrain.py"
ARCHITECTURE = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size", "bias", "dropout", "position")


def export_hf(run_dir: Path, out: Path, *, which: str = "best") -> list[str]:
    """Write a folder that ``AutoModelForMaskedLM.from_pretrained(..., trust_remote_code=True)`` takes.

    On the CPU in fp32 its logits have the bits of :meth:`difftrain.sampling.loaded.Loaded.logits`. The folder stands
    on its own: difftrain need not be installed where it is used.

    Args:
        run_dir: the run's folder.
        out: the folder, which must not be there.
        which: "best", "latest" or a step.

    Returns:
        What became of it, in lines.

    Raises:
        UserError: not a run folder, a causal model, or words that the format cannot hold.
    """
    checkpoint = find_checkpoint(run_dir, which)
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    if config.mode == "gpt2":
        raise UserError(f"{run_dir} has mode gpt2, and no masks to fill; export nanogpt takes it")
    words = tokenizer_files(vocabulary, config.block_size)
    model = checkpoint.make_model(torch.device("cpu"))
    weights = {f"{PREFIX}.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    texts = {
        CONFIG: json.dumps(_config(checkpoint), indent=2),
        MODEL: _model_text(),
        ROTARY: _beside(HERE.parent / "rotary.py"),
        MODELLING: _beside(HERE / "hf_model.py"),
        "README.md": card(run_dir, checkpoint, has_words=bool(words)),
        **words,
    }
    with appearing(out) as aside:
        aside.mkdir()
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / WEIGHTS).chmod((aside / CONFIG).stat().st_mode)  # else it is its owner's alone
    notes = [] if words else ["note: its words have no tokenizer.json, so texts must be given as ids"]
    return [*notes, f"{out}: step {checkpoint.step} of {run_dir}, {model.n_parameters():,} parameters"]


def _config(checkpoint: Checkpoint) -> dict:
    options = dataclasses.asdict(checkpoint.config)
    return {
        "architectures": ["DifftrainForMaskedLM"],
        "auto_map": {
            "AutoConfig": "modeling_difftrain.DifftrainConfig",
            "AutoModelForMaskedLM": "modeling_difftrain.DifftrainForMaskedLM",
        },
        "model_type": "difftrain",
        "dtype": "float32",
        "tie_word_embeddings": True,
        **{name: options.get(name, checkpoint.vocabulary.vocab_size) for name in ARCHITECTURE},
        "softcap": checkpoint.config.softcap,
        "forbid_mask": checkpoint.config.forbids_mask,
        "mask_token_id": checkpoint.vocabulary.mask_id,
        DESCRIPTION: {
            "step": checkpoint.step,
            "config": options,
            "vocabulary": checkpoint.vocabulary.to_meta(),
            "state": checkpoint.state,
        },
    }


def _model_text() -> str:
    """difftrain's own model without what only training needs."""
    text = _beside(HERE.parent / "model.py")
    text = text[: text.index("\n\ndef make_optimizer(")] + "\n"
    return text.replace("from difftrain.config import Config\n", "").replace(
        "config: Config", "config: Any"
    )


def _beside(file: Path) -> str:
    """A module of ours whose neighbours lie beside it."""
    text = file.read_text(encoding="utf-8")
    return text.replace("from difftrain.model import", "from .difftrain_model import").replace(
        "from difftrain.rotary import", "from .difftrain_rotary import"
    )
