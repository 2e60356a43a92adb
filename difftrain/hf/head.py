"""A model's output layer, and what the model does between it and its logits: found and applied, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.errors import UserError
from difftrain.hf.sides import one_sided_layers
from difftrain_kernels.reference import bend
from difftrain_kernels.terms import Terms

# What configurations call a number between output layer and logits: the loss's term, and its value from theirs.
TERMS: dict[str, tuple[str, Callable[[float], float]]] = {
    "final_logit_softcapping": ("softcap", float),  # Gemma 2 and 3
    "logits_soft_cap": ("softcap", float),  # RecurrentGemma
    "output_logit_soft_cap": ("softcap", float),  # xLSTM
    "logit_scale": ("logit_scale", float),  # Cohere
    "lm_head_multiplier": ("logit_scale", float),  # Falcon-H1
    "logits_scaling": ("logit_scale", lambda divisor: 1.0 / divisor),  # Granite
}
PROBE_TOKENS = 4


def head_of(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits; raises UserError where there is none or it is more than that."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise UserError(
            f"model must have an output layer that get_output_embeddings() gives, got {type(model).__name__} without"
        )
    copies = getattr(head, "modules_to_save", None)  # peft trains a copy, and leaves the layer as it was
    if isinstance(copies, nn.ModuleDict) and len(names := list(head.active_adapters)) == 1:
        head = copies[names[0]]
    if getattr(type(head), "forward", None) is not nn.Linear.forward or "forward" in vars(head):
        raise UserError(
            f"the output layer must be a plain torch.nn.Linear, got {type(head).__module__}.{type(head).__name__}: "
            "leave it out of adapters, quantisation and offloading, or merge them first"
        )
    if head.weight.is_meta:
        raise UserError(
            "the output layer must have its weight, got one on meta: load or initialise it first"
        )
    return head


def whole_weight(head: nn.Linear) -> Tensor:
    """The layer's weight (V, D); raises UserError where this process holds none or a part of it."""
    weight = head.weight
    if weight.dim() != 2 or hasattr(weight, "placements"):
        raise UserError(
            "the output layer's weight must be whole while the model runs, got a part: "
            f"{type(weight).__name__} of shape {tuple(weight.shape)}; fully_shard gathers it in the module that it made"
        )
    return weight


@contextmanager
def in_place_of(head: nn.Linear, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts ``head(hidden)`` gives ``compute(hidden)``; hooks run, so that a sharded weight is gathered."""
    head.forward = compute
    try:
        yield
    finally:
        vars(head).pop("forward")  # torch.compile does not follow `del`


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model inside; None where it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def terms_of(model: nn.Module) -> dict[str, float]:
    """The terms of the loss, ``softcap`` and ``logit_scale``, that the model's configuration names."""
    config = text_config(model)
    values = {name: getattr(config, name, None) for name in TERMS}
    return {TERMS[name][0]: TERMS[name][1](value) for name, value in values.items() if value}


def checked_outputs(outputs: Any, n_heads: int) -> Mapping[str, Any]:
    """What the model returned; UserError where a loss of the one head would leave something of it out."""
    if not isinstance(outputs, Mapping) or "logits" not in outputs:
        raise UserError(f"the model must return a ModelOutput with logits, got {type(outputs).__name__}")
    if n_heads != 1:
        raise UserError(f"the output layer must run once in a forward pass, got {n_heads} times")
    if outputs.get("aux_loss") is not None:
        raise UserError(
            "the model must add no loss of its own, got aux_loss: set output_router_logits=False"
        )
    others = [
        name for name in outputs if name.endswith("logits") and name not in ("logits", "router_logits")
    ]
    if others:
        raise UserError(f"the model must have one head, got {', '.join(others)} beside logits")
    return outputs


def check_faithful(
    model: nn.Module, head: nn.Linear, terms: dict[str, float], sees_both_sides: bool
) -> None:
    """See that bent outputs of ``head`` are the model's logits, and that a token changes what lies before it.

    The head is made to give numbers of many sizes, in place of which the model must return what
    ``terms`` make of them, without a trained tensor between. Run in eval mode on four tokens.

    Raises:
        UserError: another computation, or a causal model or layer where ``sees_both_sides``.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            first = _probe(model, head, terms)
            if sees_both_sides:
                later = PROBE_TOKENS - 2  # not the last, which may be padding
                for is_padded in (False, True):
                    probe = partial(_probe, model, head, terms, is_padded=is_padded)
                    before = probe() if is_padded else first
                    if not (before[:, 0] != probe(changed=later)[:, 0]).any():
                        raise UserError(
                            f"{type(model).__name__} must see later tokens too, but position 0 does not depend on "
                            "them: it does not take config.is_causal=False (bidirectional=False leaves it so)"
                        )
                    if layers := one_sided_layers(model, probe, later):
                        raise UserError(
                            f"{type(model).__name__} must see later tokens in each layer, but {len(layers)} do "
                            f"not: {', '.join(layers)} (bidirectional=False leaves them so)"
                        )
    finally:
        for module, mode in modes.items():
            module.training = mode


def _probe(
    model: nn.Module,
    head: nn.Linear,
    terms: dict[str, float],
    *,
    is_padded: bool = False,
    changed: int = -1,
) -> Tensor:
    """The hidden states (1, 4, D) of a few tokens, after the model's logits were held against ``terms``."""
    device = head.weight.device
    place = torch.arange(PROBE_TOKENS, dtype=torch.int64, device=device)
    ids = ((place + (place == changed)) % head.out_features)[None]
    seen: list[Tensor] = []
    given: list[Tensor] = []

    def compute(hidden: Tensor) -> Tensor:
        size = whole_weight(head).shape[0]
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(
            *hidden.shape[:-1], size, generator=generator, dtype=torch.float32, device="cpu"
        )
        scores *= torch.logspace(-1, 2, size, dtype=torch.float32, device="cpu")
        seen.append(hidden.detach())
        given.append(scores.to(hidden))
        return given[-1]

    mask = {"attention_mask": (place < PROBE_TOKENS - 1).long()[None]} if is_padded else {}
    with in_place_of(head, compute):
        outputs = checked_outputs(model(input_ids=ids, **mask), len(seen))
    logits, (scores,) = outputs["logits"], given
    wanted = bend(scores.flatten(0, 1), Terms(**terms), 0).view_as(scores)
    if logits.shape != scores.shape or not _agree(logits.detach().to(wanted), wanted, scores.dtype):
        raise UserError(
            f"{type(model).__name__} does more between output layer and logits than is known here "
            f"({', '.join(f'{name} {value:g}' for name, value in terms.items()) or 'nothing'}): "
            "a loss without it would train another objective"
        )
    if logits.requires_grad:
        raise UserError(f"{type(model).__name__} has trained parameters after its output layer")
    return seen[0]


def _agree(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the roundings of a few operations in ``dtype``, which are not all to one side."""
    eps = torch.finfo(dtype).eps
    drift = ((found - wanted) * wanted).sum() / wanted.square().sum()
    return torch.allclose(found, wanted, rtol=4 * eps, atol=0) and bool(drift.abs() < max(eps / 2, 1e-5))
