"""difftrain: training masked-diffusion language models under a curriculum of masking penalties."""

from importlib import import_module

__version__ = "0.1.0"

_LOSSES = ("fused_diffusion_loss", "fused_linear_diffusion_loss")
__all__ = ["__version__", *_LOSSES]


def __getattr__(name: str):
    """Load the loss on first use, so that ``import difftrain`` does not import torch."""
    if name in _LOSSES:
        return getattr(import_module("difftrain_kernels"), name)
    raise AttributeError(f"module 'difftrain' has no attribute {name!r}")
