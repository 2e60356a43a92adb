"""Evaluation: the loss on a run's fixed validation set, and what a checkpoint knows of any text."""

from difftrain.evaluation.validation_set import (
    FIXED,
    LEVELS,
    TRAINING,
    ValidationSet,
    evaluate,
    make_validation_set,
)

__all__ = ["FIXED", "LEVELS", "TRAINING", "ValidationSet", "evaluate", "make_validation_set"]
