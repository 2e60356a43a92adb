"""A Hugging Face GPT-2 folder: its weights under nanoGPT's names, read from safetensors without transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from difftrain.errors import UserError
from difftrain.exchange.nanogpt_names import EMBEDDING, HEAD

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Buffers that older versions kept beside the weights.
_CAUSAL_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
# There these are (in, out), and (out, in) with nanoGPT and us.
_TURNED = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# What would make another model of it, with the value that ours has.
_SAME = {
    "n_inner": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "layer_norm_epsilon": (1e-5,),
    "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
}


def is_gpt2(folder: Path) -> bool:
    """Whether this is a folder of transformers' that is not one of our exports; raises UserError for another model."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        raise UserError(f"{folder / CONFIG} is damaged: it holds no JSON") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind in (None, "difftrain"):
        return False
    if kind != "gpt2":
        raise UserError(f"init_from {folder} holds a model of type {kind}, and must hold gpt2")
    return True


def read_gpt2(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """The weights under nanoGPT's names, the options that a run must have for them, and what ours computes otherwise.

    Raises:
        UserError: a file is missing or damaged, or the model is another one than ours.
    """
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    sizes = {key: content.get(key) for key in ("n_layer", "n_head", "n_embd")}
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{folder / CONFIG} must give {key} as a number, got {size!r}")
    for key, accepted in _SAME.items():
        value = content.get(key, accepted[0])
        if value not in accepted and not (key == "n_inner" and value == 4 * sizes["n_embd"]):
            raise UserError(f"init_from {folder} is another model than ours: its {key} is {value!r}")
    weights = {}
    for name, tensor in _tensors(folder).items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if _CAUSAL_MASK.fullmatch(name):
            continue
        if (
            tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16)
            or not tensor.isfinite().all()
        ):
            raise UserError(f"init_from {folder}: {name} must hold finite numbers up to fp32")
        weights[name] = tensor.t() if _TURNED.fullmatch(name) and tensor.dim() == 2 else tensor
    head = weights.pop(HEAD, None)
    if head is not None and not (EMBEDDING in weights and torch.equal(head, weights[EMBEDDING])):
        raise UserError(f"init_from {folder} is another model than ours: its head is not its embedding")
    activation = content.get("activation_function", "gelu_new")
    notes = (
        ()
        if activation == "gelu"
        else (f"its {activation} is the exact GELU here, so numbers differ slightly",)
    )
    return weights, {**sizes, "bias": True, "position": "learned"}, notes


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, of one file or of those that its index names."""
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        try:
            files = sorted(
                set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            )
        except FileNotFoundError:
            raise UserError(
                f"{folder / WEIGHTS} is missing; weights are read from safetensors alone"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{folder / INDEX} is damaged") from None
    found: dict[str, Tensor] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / str(file)} is missing")
        try:
            found |= load_file(folder / file)
        except safetensors.SafetensorError as error:
            raise UserError(f"{folder / file} is damaged: {error}") from None
    return found
