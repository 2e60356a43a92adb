"""What a loss has beyond the two penalties: weights, terms, and changes of the logits. All off is the plain loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .term_validation import (
    check_bounded,
    check_case_weights,
    check_constant,
    check_flag,
    check_token_weights,
)
from .validation import check_choice

ARGMAX, PROBABILITY = GATES = ("argmax", "probability")


@dataclass(frozen=True)
class Terms:
    """Checked options of one call; the formula they belong to stands in ``reference.py``.

    Attributes:
        case_weights: the nine weights by case, row by row, as numbers or as a (3, 3) tensor on the
            device; None: ``pk`` and ``pm`` at their two cells, 1 elsewhere.
        gate: whether a case weight follows the prediction or the probability of each answer.
        token_weights: of y's shape, any real dtype and strides, no gradient; None: 1.
        softcap: c of c * tanh(logit / c); None: none.
        label_smoothing: share of the target that is spread over the vocabulary.
        z_loss: factor of the squared log-sum-exp.
        forbid_mask: whether [MASK] takes part in nothing, as if its logit were -inf.
        logit_scale: factor of the logits, a number or a 0-d tensor; None: 1.
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

    @property
    def has_own_sums(self) -> bool:
        """Whether the table's weighted sums differ from its sums of nll."""
        return self.token_weights is not None or self.label_smoothing > 0 or self.gate == PROBABILITY

    def kept(self) -> Terms:
        """The terms as they are now, for a backward before which a scale on the device may change."""
        if not isinstance(self.logit_scale, Tensor):
            return self
        return replace(self, logit_scale=self.logit_scale.clone())

    def of_rows(self, rows: slice | Tensor) -> Terms:
        """The terms of some of the flattened positions; of their weights only those are copied."""
        if self.token_weights is None:
            return self
        weights = self.token_weights
        if weights.dim() != 1:
            length = weights.shape[-1] if weights.dim() else 1
            weights = weights.reshape(weights.shape[:-1].numel(), length)  # of no position too
            place = rows
            if isinstance(rows, slice):
                place = torch.arange(
                    *rows.indices(weights.numel()), dtype=torch.int64, device=weights.device
                )
            weights = weights[place // max(1, length), place % max(1, length)]
            return replace(self, token_weights=weights)
        return replace(self, token_weights=weights[rows])


PLAIN = Terms()


def make_terms(
    shape: torch.Size,
    device: torch.device,
    *,
    token_weights: Tensor | None,
    case_weights: object,
    gate: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid_mask: bool,
    logit_scale: float | Tensor | None,
    rows: bool,
    entropy: bool,
) -> Terms:
    """The options of a call whose y has ``shape``, checked; see the losses' Raises."""
    if (
        token_weights is None
        and case_weights is None
        and softcap is None
        and logit_scale is None
        and gate is ARGMAX
        and type(label_smoothing) is float
        and type(z_loss) is float
        and not (label_smoothing or z_loss or rows or entropy)
        and forbid_mask is False
    ):
        return PLAIN  # as most calls are
    check_choice("gate", gate, GATES)
    if token_weights is not None:
        token_weights = check_token_weights(token_weights, shape, device)
    if case_weights is not None:
        case_weights = check_case_weights(case_weights, device)
    if softcap is not None:
        softcap = check_bounded("softcap", softcap, above=0.0)
    if isinstance(logit_scale, Tensor):
        logit_scale = check_constant("logit_scale", logit_scale, device)
    elif logit_scale is not None:
        logit_scale = check_bounded("logit_scale", logit_scale, above=0.0)
    made = Terms(
        case_weights=case_weights,
        gate=gate,
        token_weights=token_weights,
        softcap=softcap,
        label_smoothing=check_bounded("label_smoothing", label_smoothing, low=0.0, below=1.0),
        z_loss=check_bounded("z_loss", z_loss, low=0.0),
        forbid_mask=check_flag("forbid_mask", forbid_mask),
        logit_scale=logit_scale,
        rows=rows,
        entropy=entropy,
    )
    # A tensor is not compared: torch 2.11 cannot trace that.
    has_tensors = any(isinstance(t, Tensor) for t in (token_weights, case_weights, logit_scale))
    return PLAIN if not has_tensors and made == PLAIN else made
