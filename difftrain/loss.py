"""The loss of a model on a batch: from its logits, or from its hidden states without logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from difftrain.config import Config
from difftrain.data.corruption import LEAST_P_MASK
from difftrain.data.levels import weight_of_level
from difftrain.runtime import Runtime
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss, recipes
from difftrain_kernels.reference import bend
from difftrain_kernels.terms import PLAIN, Terms

LARGE_LOGITS = 256 << 20  # bytes; the linear loss's workspace


def choose_loss(config: Config, vocab_size: int, runtime: Runtime) -> str:
    """What ``loss_impl`` means for this run: "linear", "logits" or "reference"."""
    if config.loss_impl != "auto":
        return config.loss_impl
    logits_bytes = config.batch_size * config.block_size * vocab_size * runtime.dtype.itemsize
    return "linear" if runtime.device.type == "cuda" and logits_bytes > LARGE_LOGITS else "logits"


def token_weights(x: Tensor, p_mask: Tensor | None, mask_id: int, config: Config) -> Tensor | None:
    """The weight of each position by the run's recipe, (B, T) fp32; None where all weigh 1.

    Args:
        x: (B, T), what the model sees.
        p_mask: (B, 1), with what probability each token became [MASK]; None where that is not the recipe.
    """
    if p_mask is None:
        return None
    is_masked = x == mask_id
    if config.token_weighting == "uniform":
        return is_masked.float()
    level = (p_mask - LEAST_P_MASK) / (1.0 - LEAST_P_MASK)
    # Their divisor is the mean's: MDLM's supervised tokens are all.
    recipe = {"llada": recipes.llada, "mdlm": recipes.mdlm}[config.recipe]
    return recipe(is_masked, p_mask)["token_weights"] * weight_of_level(level, config.mask_level)


def wants_count(config: Config, impl: str, runtime: Runtime) -> bool:
    """Whether the loss is to be told how many positions are masked: on a GPU the linear one leaves out the rest.

    Args:
        impl: what :func:`choose_loss` chose.
    """
    is_masked_alone = config.mode == "diffusion" and config.recipe != "specification"
    if config.mask_level == "cosine":  # whose last bit may be another one on the host
        return False
    return is_masked_alone and impl == "linear" and runtime.device.type == "cuda"


def loss_terms(config: Config) -> dict[str, Any]:
    """What the configuration adds to the loss beside weights, as its options; without those that are off."""
    terms: dict[str, Any] = {
        "softcap": config.softcap,
        "label_smoothing": config.label_smoothing,
        "z_loss": config.z_loss,
        "forbid_mask": config.forbids_mask,
    }
    if config.has_penalties and config.gate == "probability":
        terms["gate"] = config.gate
    return {name: value for name, value in terms.items() if value}


def bent_logits(model: nn.Module, mask_id: int, config: Config) -> Callable[[Tensor], Tensor]:
    """The model as the loss sees it, ids (B, T) to logits (B, T, V): capped, and [MASK] at -inf if forbidden."""
    terms = _bending(config)
    if terms == PLAIN:
        return model

    def logits_of(x: Tensor) -> Tensor:
        logits = model(x)
        return bend(logits.flatten(0, 1), terms, mask_id).view_as(logits)

    return logits_of


def bend_rows(logits: Tensor, mask_id: int, config: Config) -> Tensor:
    """Logits (N, V) as the loss sees them; the argument itself where the configuration changes nothing."""
    terms = _bending(config)
    return logits if terms == PLAIN else bend(logits, terms, mask_id)


def _bending(config: Config) -> Terms:
    return Terms(softcap=config.softcap or None, forbid_mask=config.forbids_mask)


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
        options: of the loss function (``return_cases``, ``token_weights``, those of :func:`loss_terms`).

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
