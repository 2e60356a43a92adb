"""The per-case table: what was asked at each position, what was answered, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("masked", "intact", "corrupted")
ANSWERS = ("mask", "target", "other")
MASKED, INTACT, CORRUPTED = range(3)
MASK, TARGET, OTHER = range(3)
IGNORED = 9  # case of an ignored position; the others are kind * 3 + answer
VECTOR_SIZE = 22  # entries of a table


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

    Source: KERNELS section "Definition"; the loss is affine in the two penalties.
    """

    counts: Tensor
    nll: Tensor
    gap: Tensor
    n_positions: int

    def loss_at(self, pk: float | Tensor, pm: float | Tensor) -> Tensor:
        """Mean loss at any penalties, a 0-d tensor; NaN when there are no positions.

        Nothing is recomputed: loss = (S0 + pk * S1 + pm * S3) / n_positions.
        """
        rest = self.nll.clone()
        rest[MASKED, MASK].zero_()
        rest[INTACT, MASK].zero_()
        total = rest.sum() + pk * self.nll[MASKED, MASK] + pm * self.nll[INTACT, MASK]
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
        parts = [part.flatten().cpu().double() for part in (self.counts, self.nll, self.gap)]
        return torch.cat([*parts, torch.tensor([self.n_positions], dtype=torch.float64)])

    @classmethod
    def from_vector(cls, vector: Tensor) -> CaseTable:
        """The inverse of :meth:`to_vector`; reads one number back to the host."""
        counts, nll, gap, n = vector.split((9, 9, 3, 1))
        return cls(counts.round().long().view(3, 3), nll.view(3, 3), gap, int(n.item()))

    def __add__(self, other: CaseTable) -> CaseTable:
        return CaseTable(
            self.counts + other.counts,
            self.nll + other.nll,
            self.gap + other.gap,
            self.n_positions + other.n_positions,
        )


def tabulate(kind: Tensor, answer: Tensor, is_counted: Tensor, nll: Tensor, gap: Tensor) -> CaseTable:
    """Sum per-position values into a :class:`CaseTable`, in a fixed order (no atomics).

    Args:
        kind: (N,) integers into ``KINDS``.
        answer: (N,) integers into ``ANSWERS``.
        is_counted: (N,) bool, False where the position is ignored.
        nll: (N,) cross-entropy.
        gap: (N,) largest logit minus the logit of [MASK].
    """
    cell = torch.where(is_counted, kind * 3 + answer, IGNORED)
    in_cell = cell[:, None] == torch.arange(9, device=cell.device)  # (N, 9)
    in_kind = in_cell.view(-1, 3, 3).any(2)  # (N, 3)
    return CaseTable(
        counts=in_cell.sum(0).view(3, 3),
        nll=torch.where(in_cell, nll[:, None], 0.0).sum(0).view(3, 3),
        gap=torch.where(in_kind, gap[:, None], 0.0).sum(0),
        n_positions=cell.numel(),
    )
