"""Adding to a leaf's ``.grad`` inside a backward, so that its gradient never exists beside it.

Autograd would be handed a gradient and add it; here the function adds and hands over None. Whoever waits for
that gradient on its way then waits in vain, so this is refused, or left to autograd, wherever someone may.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_accumulates(name: str, leaf: Tensor) -> None:
    """Raise ValueError where ``accumulate_into_grad`` would pass somebody by."""
    if not leaf.is_leaf:
        raise ValueError(f"accumulate_into_grad needs a leaf, got a {name} that other tensors made")
    if _has_hooks(leaf):
        raise ValueError(f"accumulate_into_grad needs a {name} without hooks, which would see no gradient")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError(
            "accumulate_into_grad needs one process: DDP and FSDP average gradients on their way to .grad"
        )


def _has_hooks(leaf: Tensor) -> bool:
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


def grad_behind(node: torch.autograd.graph.Node) -> Tensor | None:
    """The ``.grad`` that the running backward may be added to, for an edge of its graph; None: hand it to autograd.

    None too where ``torch.autograd.grad`` asks for the gradient, where a graph of the backward is made, and
    where hooks have come since the forward.
    """
    leaf = getattr(node, "variable", None)
    if leaf is None or torch.is_grad_enabled() or not _will_be_added(node):
        return None
    grad = leaf.grad
    is_plain = grad is not None and type(grad) is Tensor and grad.layout is torch.strided
    return grad if is_plain and not _has_hooks(leaf) else None


def _will_be_added(node: torch.autograd.graph.Node) -> bool:
    """Whether the running backward adds to this leaf's ``.grad``."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf whose gradient torch.autograd.grad gives back
        return False
