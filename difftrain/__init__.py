"""difftrain: training masked-diffusion language models under a curriculum of masking penalties.

Every public name is loaded on first use, so that ``import difftrain`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from difftrain.config import Config
    from difftrain.errors import UserError
    from difftrain.run import Run
    from difftrain.sampling.loaded import load
    from difftrain.schedule import PenaltyTensors, learning_rate, masking_penalties
    from difftrain.training.from_python import train
    from difftrain.training.verdict import TrainingFailed
    from difftrain_kernels import (
        CaseTable,
        RowOutputs,
        diffusion_loss_reference,
        fused_diffusion_loss,
        fused_linear_diffusion_loss,
        recipes,
        vocab_parallel_diffusion_loss,
    )

__version__ = "0.1.0"

__all__ = [
    "CaseTable",
    "Config",
    "PenaltyTensors",
    "RowOutputs",
    "Run",
    "TrainingFailed",
    "UserError",
    "__version__",
    "diffusion_loss_reference",
    "fused_diffusion_loss",
    "fused_linear_diffusion_loss",
    "learning_rate",
    "load",
    "masking_penalties",
    "recipes",
    "train",
    "vocab_parallel_diffusion_loss",
]

_HOMES = {
    "CaseTable": "difftrain_kernels",
    "Config": "difftrain.config",
    "PenaltyTensors": "difftrain.schedule",
    "RowOutputs": "difftrain_kernels",
    "Run": "difftrain.run",
    "TrainingFailed": "difftrain.training.verdict",
    "UserError": "difftrain.errors",
    "diffusion_loss_reference": "difftrain_kernels",
    "fused_diffusion_loss": "difftrain_kernels",
    "fused_linear_diffusion_loss": "difftrain_kernels",
    "learning_rate": "difftrain.schedule",
    "load": "difftrain.sampling.loaded",
    "masking_penalties": "difftrain.schedule",
    "recipes": "difftrain_kernels",
    "train": "difftrain.training.from_python",
    "vocab_parallel_diffusion_loss": "difftrain_kernels",
}


if not TYPE_CHECKING:  # where it would let any name pass

    def __getattr__(name):
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'difftrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
