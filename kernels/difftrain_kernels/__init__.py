"""The masked-diffusion loss: cross-entropy whose weight depends on what the model predicts."""

from . import recipes
from .cases import CaseTable
from .linear_loss import fused_linear_diffusion_loss
from .logits_loss import fused_diffusion_loss
from .parallel_loss import vocab_parallel_diffusion_loss
from .reference import diffusion_loss_reference
from .rows import RowOutputs

__all__ = [
    "CaseTable",
    "RowOutputs",
    "diffusion_loss_reference",
    "fused_diffusion_loss",
    "fused_linear_diffusion_loss",
    "recipes",
    "vocab_parallel_diffusion_loss",
]
