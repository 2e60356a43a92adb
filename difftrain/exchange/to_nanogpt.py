"""A run's model as nanoGPT's checkpoint, or the specification's, with the optimiser's state."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from difftrain.appearing import appearing
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.errors import UserError
from difftrain.exchange.nanogpt_names import EMBEDDING, HEAD, nanogpt_name
from difftrain.model import make_optimizer, restore_optimizer


def export_nanogpt(run_dir: Path, out: Path, *, which: str = "best") -> list[str]:
    """Write ``ckpt.pt`` as nanoGPT's train.py does; it loads there, and goes on with ``init_from = "resume"``.

    In gpt2 mode the row of [MASK] goes, which nanoGPT has not; in diffusion mode the model is the
    specification's, with ``model_type`` and ``mask_token_id``.

    Args:
        run_dir: the run's folder.
        out: the file, which must not be there.
        which: "best", "latest" or a step.

    Returns:
        What became of it, in lines.

    Raises:
        UserError: not a run folder, or a model that nanoGPT's would not compute exactly.
    """
    checkpoint = find_checkpoint(run_dir, which)
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    if config.position != "learned":
        raise UserError(f"{run_dir} has {config.position} positions, and nanoGPT has learned ones alone")
    if config.softcap:
        raise UserError(f"{run_dir} has softcap {config.softcap:g}, and nanoGPT has none")
    model = checkpoint.make_model(torch.device("cpu"))
    optimizer = make_optimizer(model, config)
    restore_optimizer(model, optimizer, checkpoint.read_optimizer)
    weights = {nanogpt_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    # AdamW counts its parameters in nanoGPT's order too: the embedding is the first of both.
    moments = optimizer.state_dict()
    arguments = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    arguments |= {"vocab_size": vocabulary.vocab_size, "dropout": config.dropout}
    notes = []
    if config.mode == "gpt2":
        arguments["vocab_size"] = n = vocabulary.n_words
        weights[EMBEDDING] = weights[EMBEDDING][:n].clone()
        for key in ("exp_avg", "exp_avg_sq"):
            moments["state"][0][key] = moments["state"][0][key][:n].clone()
        if not config.forbids_mask:
            notes.append(
                "note: [MASK] could be an answer in this run, and goes: probabilities are among words alone"
            )
    else:
        arguments |= {"model_type": "diffusion", "mask_token_id": vocabulary.mask_id}
        if config.forbids_mask:
            notes.append("note: this run never answers [MASK], which nanoGPT's checkpoint cannot say")
    weights[HEAD] = weights[EMBEDDING]
    best_loss = checkpoint.state.get("best_loss")
    content = {
        "model": weights,
        "optimizer": moments,
        "model_args": arguments,
        "iter_num": checkpoint.step,
        "best_val_loss": best_loss if isinstance(best_loss, float) and math.isfinite(best_loss) else 1e9,
        "config": {key: value for key, value in vars(config).items() if key not in ("out_dir", "data")},
    }
    with appearing(out) as aside, aside.open("wb") as file:
        try:
            torch.save(content, file)
        except (
            RuntimeError
        ) as error:  # its end of a file that cannot grow fails too, and hides the first reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return [*notes, f"{out}: step {checkpoint.step} of {run_dir}, vocab_size {arguments['vocab_size']}"]
