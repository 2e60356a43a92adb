"""What a loss has beyond the two penalties: weights, terms, and changes of the logits. All off is today's loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ARGMAX, PROBABILITY = GATES = ("argmax", "probability")


@dataclass(frozen=True)
class Terms:
    """Checked options of one call; the formula they belong to stands in ``reference.py``.

    Attributes:
        case_weights: the nine weights by case, row by row, as numbers or as a (3, 3) fp32 tensor on the
            device; None: ``pk`` and ``pm`` at their two cells, 1 elsewhere.
        gate: whether a case weight follows the prediction or the probability of each answer.
        token_weights: of y's shape, any real dtype and strides, no gradient; None: 1.
        softcap: c of c * tanh(logit / c); None: none.
        label_smoothing: share of the target that is spread over the vocabulary.
        z_loss: factor of the squared log-sum-exp.
        forbid_mask: whether [MASK] takes part in nothing, as if its logit were -inf.
        logit_scale: factor of the logits, a number or a 0-d fp32 tensor; None: 1.
        rows: whether the statistics hold what :class:`RowOutputs` shows of each row.
        entropy: whether the entropy is among it.
    """

    case_weights: tuple[float, ...] | Tensor | None = None
    gate: str = ARGMAX
    token_weights: Tensor | None = None
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    forbid_mask: bool = False
    logit_scale: float | Tensor | None = None
    rows: bool = False
    entropy: bool = False


PLAIN = Terms()
