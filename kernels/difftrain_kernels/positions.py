"""Which positions take part in a linear head's matrix products: those that count, in their order.

A position that does not count (ignored, or of token weight 0) has loss 0 and no gradient, so its rows of hidden
states need not be multiplied. The host sets the size of a product, so it must know how many positions count.

- On the CPU it looks: nothing waits there.
- On a GPU looking stops the host until the device has caught up. The caller may state it (``counted``): whoever
  loads labels, or draws masks from a counter-based generator, knows it without asking. It is checked on the device:
  positions beyond the stated number make every result NaN.
- Unstated, a GPU multiplies every row. A count copied to the host aside, and used if it has come, would make the
  shapes of products, and so bits, depend on when. A product that reads its size on the device (torch's grouped
  one) cannot add to an fp32 sum; one of ours would have to reach the library's rate.

The gathered rows begin with all that count, in order, and end with some that do not, up to a whole tile of a
product. The products' shapes depend on the stated number alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases import IGNORED
from .terms import Terms

TILE_ROWS = 128  # a matrix product works on tiles of so many rows


@dataclass(frozen=True)
class Positions:
    """The K positions of N that take part.

    Attributes:
        n: N.
        index: (K,) int64; None where all do.
        is_left_out: (K,) bool, those that do not count all the same; None where none is.
        missing: (N,) fp32, NaN for positions that count, of which more than K may; None where they cannot.
    """

    n: int
    index: Tensor | None = None
    is_left_out: Tensor | None = None
    missing: Tensor | None = None

    @property
    def n_taken(self) -> int:
        return self.n if self.index is None else len(self.index)

    def take(self, values: Tensor) -> Tensor:
        """(..., N) to (..., K)."""
        return values if self.index is None else values.index_select(-1, self.index)

    def states(self, hidden: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """(rows, D) of hidden (..., D) for some of the K; 0 for those that do not count, whatever they hold."""
        states = rows_of(hidden, rows if self.index is None else self.index[rows]).to(dtype)
        if self.is_left_out is not None:
            # A NaN in a position that does not count would pass through 0 * NaN into the weight's gradient.
            states = states.masked_fill(part_of(self.is_left_out, rows).unsqueeze(1), 0.0)
        if self.missing is not None and rows.start == 0:
            states[:1] += self.poison().to(dtype)
        return states

    def poison(self) -> Tensor:
        """0-d: NaN where more positions count than take part, else 0."""
        return self.missing.index_fill(0, self.index, 0.0).sum()

    def spread(self, case: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics of all N from those of the K: the others do not count, or are missing."""
        if self.index is None:
            return case, columns
        all_columns = columns.new_zeros(len(columns), self.n)
        if self.missing is not None:
            all_columns += self.missing.to(columns.dtype)
        all_case = case.new_full((self.n,), IGNORED)
        return all_case.index_copy_(0, self.index, case), all_columns.index_copy_(1, self.index, columns)

    def empty_gradient(self, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(N, D) for the gradient of hidden states, of which rows that do not take part are made already."""
        gradient = torch.empty(self.n, width, dtype=dtype, device=device)
        if self.missing is not None:
            gradient.copy_(self.missing[:, None])
        elif self.index is not None:
            gradient.zero_()
        return gradient


@dataclass(frozen=True)
class TakenRows:
    """The positions that take part in one pass, and what belongs to them.

    Attributes:
        hidden: (..., D) of all N; what follows is of the K, where it has rows.
        weighting: x, pk and pm; or None where there is ``saved``, statistics of an earlier pass.
        upstream: 0-d or (K,); None: 1.
    """

    positions: Positions
    hidden: Tensor
    y: Tensor
    terms: Terms
    weighting: tuple | None
    saved: tuple[Tensor, Tensor] | None
    upstream: Tensor | None

    @classmethod
    def of(cls, positions, hidden, y, terms, weighting, saved, upstream) -> TakenRows:
        """Of what belongs to all N."""
        take = positions.take
        if positions.index is not None and terms.token_weights is not None:
            terms = replace(terms, token_weights=take(terms.token_weights.reshape(-1)))
        if weighting is not None:
            weighting = (take(weighting[0]), *weighting[1:])
        if saved is not None:
            saved = tuple(take(part) for part in saved)
        if upstream is not None and upstream.dim():
            upstream = take(upstream)
        return cls(positions, hidden, take(y), terms, weighting, saved, upstream)

    def __len__(self) -> int:
        return self.y.shape[0]

    def states(self, chunk: slice, dtype: torch.dtype) -> Tensor:
        return self.positions.states(self.hidden, chunk, dtype)

    def upstream_of(self, chunk: slice, part: tuple[Tensor, Tensor]) -> Tensor:
        """0-d or (rows,), for a chunk with these statistics."""
        if self.upstream is None:
            return part[1].new_ones(())
        return part_of(self.upstream, chunk) if self.upstream.dim() else self.upstream


def choose_positions(is_left_out: Tensor, counted: int | None, *, may_look: bool) -> Positions:
    """Which positions take part, by which of them do not count, (N,) bool.

    Args:
        counted: at least as many as do.
        may_look: whether nothing waits where the host reads a tensor.

    Raises:
        ValueError: ``counted`` is too small, and the host may look.
    """
    n = is_left_out.shape[0]
    if may_look:
        n_counted = n - int(is_left_out.sum())
        check_enough(counted, n_counted)
        if n_counted == n:
            return Positions(n)
        return Positions(n, torch.nonzero(~is_left_out).squeeze(1))
    taken = n if counted is None else max(1, -(-counted // TILE_ROWS)) * TILE_ROWS
    if taken >= n:
        return Positions(n, is_left_out=is_left_out)
    index = torch.argsort(is_left_out.to(torch.uint8), stable=True)[:taken]
    missing = torch.zeros(n, dtype=torch.float32, device=is_left_out.device)
    missing.masked_fill_(~is_left_out, torch.nan)
    return Positions(n, index, is_left_out.index_select(0, index), missing)


def check_enough(counted: int | None, n_counted: int) -> None:
    """Raise ValueError where more positions count than was stated."""
    if counted is not None and n_counted > counted:
        raise ValueError(f"counted must be at least {n_counted}, as many positions count, got {counted}")


def slices_of(n: int, size: int):
    """The slices of so many rows; one, empty, of none: sums begin there."""
    for start in range(0, max(n, 1), size):
        yield slice(start, start + size)


def part_of(values: Tensor, rows: slice) -> Tensor:
    """Some rows; the tensor itself where these are all: a slice costs the host time."""
    return values if rows.start == 0 and rows.stop >= values.shape[0] else values[rows]


def rows_of(hidden: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of (..., D), counted over all leading dimensions; of a view that is no (N, D) only they are copied."""
    if hidden.dim() == 2:
        return part_of(hidden, rows) if isinstance(rows, slice) else hidden.index_select(0, rows)
    length = hidden.shape[-2] if hidden.dim() > 1 else 1
    hidden = hidden.reshape(-1, length, hidden.shape[-1])
    if isinstance(rows, slice):
        rows = torch.arange(
            *rows.indices(hidden.shape[0] * length), dtype=torch.int64, device=hidden.device
        )
    return hidden[rows // max(1, length), rows % max(1, length)]
