"""In Hugging Face's Trainer: a model patched to compute our loss without logits, a collator, a Trainer.

Only ``DiffusionLossTrainer`` needs transformers and accelerate, and asks for them when it is first named.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from difftrain.errors import import_extra

if TYPE_CHECKING:
    from difftrain.hf.collating import DataCollatorForDiffusion
    from difftrain.hf.patching import patch, unpatch
    from difftrain.hf.trainer import DiffusionLossTrainer

__all__ = ["DataCollatorForDiffusion", "DiffusionLossTrainer", "patch", "unpatch"]

_HOMES = {
    "DataCollatorForDiffusion": "collating",
    "DiffusionLossTrainer": "trainer",
    "patch": "patching",
    "unpatch": "patching",
}

if not TYPE_CHECKING:  # where it would let any name pass

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'difftrain.hf' has no attribute {name!r}")
        if name == "DiffusionLossTrainer":
            import_extra("transformers", "hf")
            import_extra("accelerate", "hf")
        return getattr(import_module(f"difftrain.hf.{_HOMES[name]}"), name)
