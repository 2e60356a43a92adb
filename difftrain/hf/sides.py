"""Which of a model's layers let a token change what lies behind it alone: those that stay causal in a hybrid model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def one_sided_layers(model: nn.Module, run: Callable[[], object], later: int) -> list[str]:
    """Names of the layers in which position ``later`` depends on the first, but the first not on it.

    Layers are the items of the model's ModuleLists that turn hidden states (B, T, D) into such. Each is run thrice, in
    the place where ``run()`` runs it, with its own arguments.
    """
    found: list[str] = []
    with ExitStack() as stack:
        for prefix, modules in model.named_modules():
            for number, layer in enumerate(modules if isinstance(modules, nn.ModuleList) else ()):
                hook = partial(_look, f"{prefix}.{number}", found, later)
                # Before others, while a sharded layer's weights are there.
                handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        run()
    return found


def _look(
    name: str,
    found: list[str],
    later: int,
    layer: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    result = _states(output)
    are_states = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.is_floating_point()
    if not are_states or result is None or result.shape[:2] != hidden.shape[:2]:
        return

    def changed_at(place: int) -> Tensor:
        other = hidden.clone()
        other[:, place] = 1.0 - other[:, place]
        if args:
            return _states(layer.forward(other, *args[1:], **kwargs))
        return _states(layer.forward(**kwargs | {"hidden_states": other}))

    with torch.no_grad():
        sees_earlier = (changed_at(0)[:, later] != result[:, later]).any()
        sees_later = (changed_at(later)[:, 0] != result[:, 0]).any()
    if sees_earlier and not sees_later:
        found.append(name)


def _states(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None
