"""The per-case table: what was asked at each position, what was answered, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("masked", "intact", "corrupted")
ANSWERS = ("mask", "target", "other")
MASKED, INTACT, CORRUPTED = range(3)
MASK, TARGET, OTHER = range(3)
IGNORED = 9  # case of an ignored position; the others are kind * 3 + answer
SIZES = {"counts": 9, "nll": 9, "gap": 3, "n_positions": 1, "weighted": 9, "smoothing": 9, "z_loss": 1}
VECTOR_SIZE = sum(SIZES.values())  # entries of a table


@dataclass(frozen=True)
class CaseTable:
    """Counts and sums by kind of position (row) and by the model's answer (column).

    Rows: ``masked`` (x is [MASK], y is not), ``intact`` (x equals y and is not [MASK]) and
    ``corrupted`` (every other position that is not ignored; its target is normally [MASK]).
    Columns: the argmax was [MASK], was the target, was something else. Where the target is
    [MASK] itself, a right answer stands in the column ``mask``.

    Attributes:
        counts: (3, 3) int64, positions in each cell.
        nll: (3, 3) fp32 (fp64 for fp64 logits), sum of the unweighted cross-entropy, in nats.
        gap: (3,) like ``nll``, sum over each kind of (largest logit - logit of [MASK]), at least 0.
        n_positions: all positions, ignored ones included; the divisor of the mean.
        weighted: (3, 3) like ``nll``, sum of token weight * cross-entropy with the smoothed target: what
            the case weights multiply. ``nll`` itself where there is neither. Where the gate is
            "probability", each position's is shared among the three answers by their probabilities.
        smoothing: (3, 3) of it, what label smoothing adds; None without.
        z_loss: 0-d, sum of token weight * z_loss * lse**2; None without.

    Source: the loss is affine in the weights by case.
    """

    counts: Tensor
    nll: Tensor
    gap: Tensor
    n_positions: int
    weighted: Tensor | None = None
    smoothing: Tensor | None = None
    z_loss: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weighted is None:
            object.__setattr__(self, "weighted", self.nll)

    def loss_at(
        self,
        pk: float | Tensor = 1.0,
        pm: float | Tensor = 1.0,
        *,
        case_weights: Tensor | Sequence[Sequence[float]] | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Mean loss at any penalties, a 0-d tensor; NaN when there are no positions.

        Nothing is recomputed: loss = (S0 + pk * S1 + pm * S3) / n_positions, and the z-loss beside it.

        Args:
            pk, pm: the penalties.
            case_weights: all nine weights instead, as the losses take them.
            normalizer: the divisor in place of ``n_positions``.
        """
        if case_weights is None:
            rest = self.weighted.clone()
            rest[MASKED, MASK].zero_()
            rest[INTACT, MASK].zero_()
            total = rest.sum() + pk * self.weighted[MASKED, MASK] + pm * self.weighted[INTACT, MASK]
        else:
            total = sum(case_weights[k][a] * self.weighted[k, a] for k in range(3) for a in range(3))
        if self.z_loss is not None:
            total = total + self.z_loss
        if normalizer is not None:
            return total / normalizer
        return total / self.n_positions if self.n_positions else total * torch.nan

    def rates(self) -> Tensor:
        """Share of each answer within its kind, (3, 3) fp32; NaN for a kind without positions."""
        return self.counts / self.counts.sum(1, keepdim=True)

    def mean_nll(self) -> Tensor:
        """Mean cross-entropy of each kind of position in nats, (3,); NaN without positions."""
        return self.nll.sum(1) / self.counts.sum(1)

    def mean_gap(self) -> Tensor:
        """Mean of (largest logit - logit of [MASK]) of each kind, (3,); NaN without positions."""
        return self.gap / self.counts.sum(1)

    def to_vector(self) -> Tensor:
        """All entries as one (VECTOR_SIZE,) fp64 vector on the CPU: what processes add up."""
        # mps has no fp64, so the tables move to the CPU first.
        values = {name: getattr(self, name) for name in SIZES}
        parts = [
            torch.zeros(size, dtype=torch.float64, device="cpu")
            if values[name] is None
            else torch.as_tensor(values[name], device="cpu").double().flatten()
            for name, size in SIZES.items()
        ]
        return torch.cat(parts)

    @classmethod
    def from_vector(cls, vector: Tensor) -> CaseTable:
        """The inverse of :meth:`to_vector`; reads one number back to the host."""
        parts = dict(zip(SIZES, vector.split(tuple(SIZES.values())), strict=True))
        smoothing, z_loss = parts["smoothing"], parts["z_loss"]
        return cls(
            counts=parts["counts"].round().long().view(3, 3),
            nll=parts["nll"].view(3, 3),
            gap=parts["gap"],
            n_positions=int(parts["n_positions"].item()),
            weighted=parts["weighted"].view(3, 3),
            smoothing=smoothing.view(3, 3) if smoothing.any() else None,
            z_loss=z_loss[0] if z_loss.any() else None,
        )

    def __add__(self, other: CaseTable) -> CaseTable:
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in SIZES}
        return CaseTable(
            **{name: b if a is None else a if b is None else a + b for name, (a, b) in pairs.items()}
        )


def tabulate(
    kind: Tensor,
    answer: Tensor,
    is_counted: Tensor,
    nll: Tensor,
    gap: Tensor,
    *,
    weighted: Tensor | None = None,
    smoothing: Tensor | None = None,
    z: Tensor | None = None,
    shares: tuple[Tensor, Tensor] | None = None,
) -> CaseTable:
    """Sum per-position values into a :class:`CaseTable`, in a fixed order (no atomics).

    Args:
        kind: (N,) integers into ``KINDS``.
        answer: (N,) integers into ``ANSWERS``.
        is_counted: (N,) bool, False where the position does not count.
        nll: (N,) cross-entropy.
        gap: (N,) largest logit minus the logit of [MASK].
        weighted, smoothing: (N,) of the table's sums of these names, where they differ from ``nll`` and 0.
        z: (N,) token weight * z_loss * lse**2.
        shares: (N,) each, the probabilities of [MASK] and of the target, by which the former are shared.
    """
    cell = torch.where(is_counted, kind * 3 + answer, IGNORED)
    in_cell = cell[:, None] == torch.arange(9, device=cell.device)  # (N, 9)
    in_kind = in_cell.view(-1, 3, 3).any(2)  # (N, 3)

    def by_cell(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if shares is None:
            return torch.where(in_cell, values[:, None], 0.0).sum(0).view(3, 3)
        share = torch.stack((*shares, 1.0 - shares[0] - shares[1]), dim=1)  # (N, 3)
        shared = torch.where(share == 0, 0.0, share * values[:, None])
        return torch.where(in_kind[:, :, None], shared[:, None], 0.0).sum(0)

    return CaseTable(
        counts=in_cell.sum(0).view(3, 3),
        nll=torch.where(in_cell, nll[:, None], 0.0).sum(0).view(3, 3),
        gap=torch.where(in_kind, gap[:, None], 0.0).sum(0),
        n_positions=cell.numel(),
        weighted=by_cell(weighted),
        smoothing=by_cell(smoothing),
        z_loss=None if z is None else z.sum(),
    )
