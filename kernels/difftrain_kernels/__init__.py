"""The masked-diffusion loss: cross-entropy whose weight depends on what the model predicts."""

from .cases import CaseTable
from .linear_loss import fused_linear_diffusion_loss
from .logits_loss import fused_diffusion_loss
from .parallel_loss import vocab_parallel_diffusion_loss
from .reference import diffusion_loss_reference

__all__ = [
    "CaseTable",
    "diffusion_loss_reference",
    "fused_diffusion_loss",
    "fused_linear_diffusion_loss",
    "vocab_parallel_diffusion_loss",
]
