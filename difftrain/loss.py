"""The loss of a model on a batch: from its logits, or from its hidden states without logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from difftrain.config import Config
from difftrain.runtime import Runtime
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss

LARGE_LOGITS = 256 << 20  # bytes; the linear loss's workspace


def choose_loss(config: Config, vocab_size: int, runtime: Runtime) -> str:
    """What ``loss_impl`` means for this run: "linear", "logits" or "reference"."""
    if config.loss_impl != "auto":
        return config.loss_impl
    logits_bytes = config.batch_size * config.block_size * vocab_size * runtime.dtype.itemsize
    return "linear" if runtime.device.type == "cuda" and logits_bytes > LARGE_LOGITS else "logits"


def model_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    mask_id: int,
    pk: float | Tensor,
    pm: float | Tensor,
    *,
    runtime: Runtime,
    impl: str,
    **options: Any,
) -> Any:
    """The loss of ``model`` on x and y (B, T), computed under the run's autocast.

    Args:
        model: a Transformer, compiled or wrapped for several processes.
        impl: "linear", "logits" or "reference".
        options: of the loss function (``return_cases``, ``upstream_scale``).

    Returns:
        What the loss function returns.
    """
    with runtime.autocast():
        if impl == "linear":
            hidden = model(x, return_hidden=True)
            return fused_linear_diffusion_loss(hidden, head_weight(model), y, x, mask_id, pk, pm, **options)
        logits = model(x)
        how = "reference" if impl == "reference" else "auto"
        return fused_diffusion_loss(logits, y, x, mask_id, pk, pm, impl=how, **options)


def head_weight(model: nn.Module) -> Tensor:
    """The output layer's weight (V, D) of a Transformer, whatever it is wrapped in."""
    while not hasattr(model, "head"):
        model = model.module
    return model.head.weight
