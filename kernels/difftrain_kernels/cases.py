"""The per-case table: what was asked at each position, what was answered, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .validation import check_number, is_traced

KINDS = ("masked", "intact", "corrupted")
ANSWERS = ("mask", "target", "other")
MASKED, INTACT, CORRUPTED = range(3)
MASK, TARGET, OTHER = range(3)
IGNORED = 9  # case of an ignored position; the others are kind * 3 + answer
SUM_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A whole number travels as two fp64 numbers, this many times the first plus the second. Both stay
# exact while vectors are added up, 2^21 of them, where one of them alone would end at 2^53.
WORD = 2**32


@dataclass(frozen=True, eq=False, repr=False)
class CaseTable:
    """Counts and sums by kind of position (row) and by the model's answer (column).

    Rows: ``masked`` (x is [MASK], y is not), ``intact`` (x equals y and is not [MASK]) and
    ``corrupted`` (every other position that is not ignored; its target is normally [MASK]).
    Columns: the argmax was [MASK], was the target, was something else. Where the target is
    [MASK] itself, a right answer stands in the column ``mask``.

    Tables add up (``a + b``, ``sum(tables)``). Two are equal where all their numbers are, whatever
    device and float dtype these stand in, NaN being equal to NaN. A table has no hash, as its tensors
    can be written to. ``==``, ``repr``, ``to_vector`` and ``to_dict`` wait for a GPU; the rest does not.

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

    counts: Tensor = field(metadata={"shape": (3, 3), "is_whole": True})
    nll: Tensor = field(metadata={"shape": (3, 3), "is_whole": False})
    gap: Tensor = field(metadata={"shape": (3,), "is_whole": False})
    n_positions: int = field(metadata={"shape": (), "is_whole": True})
    weighted: Tensor | None = field(default=None, metadata={"shape": (3, 3), "is_whole": False})
    smoothing: Tensor | None = field(default=None, metadata={"shape": (3, 3), "is_whole": False})
    z_loss: Tensor | None = field(default=None, metadata={"shape": (), "is_whole": False})

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
            pk, pm = (
                p if isinstance(p, Tensor) else check_number(name, p, "a number or a 0-d tensor")
                for name, p in (("pk", pk), ("pm", pm))
            )
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
        """Share of each answer within its kind, (3, 3) fp64 (fp32 on mps); NaN for a kind without positions."""
        counts = self.counts.to(torch.float32 if self.counts.device.type == "mps" else torch.float64)
        return counts / counts.sum(1, keepdim=True)

    def mean_nll(self) -> Tensor:
        """Mean cross-entropy of each kind of position in nats, (3,) like ``nll``; NaN without positions."""
        return self.nll.sum(1) / self.counts.sum(1)

    def mean_gap(self) -> Tensor:
        """Mean of (largest logit - logit of [MASK]) of each kind, (3,) like ``gap``; NaN without positions."""
        return self.gap / self.counts.sum(1)

    def to(self, device: torch.device | str) -> CaseTable:
        """The table on another device."""
        values = (getattr(self, entry.name) for entry in fields(self))
        return CaseTable(*(v.to(device) if isinstance(v, Tensor) else v for v in values))

    def to_vector(self) -> Tensor:
        """All entries as one (VECTOR_SIZE,) fp64 vector on the CPU: what processes add up.

        Whole numbers are exact below 2^63, in a sum of up to 2^21 vectors too.
        """
        parts = []
        for entry in fields(self):
            value = self._on_cpu(entry.name)
            if value is None:  # nothing to add up
                value = torch.zeros(entry.metadata["shape"], dtype=torch.float64, device="cpu")
            value = value.flatten()
            parts += [value // WORD, value % WORD] if entry.metadata["is_whole"] else [value]
        return torch.cat([part.double() for part in parts])

    @classmethod
    def from_vector(cls, vector: Tensor) -> CaseTable:
        """The inverse of :meth:`to_vector`; reads one number back to the host."""
        parts = iter(vector.split(_sizes()))
        values = {}
        for entry in fields(cls):
            value = next(parts)
            if entry.metadata["is_whole"]:
                value = value.round().long() * WORD + next(parts).round().long()
            is_there = entry.default is not None or bool(value.any())
            values[entry.name] = value.view(entry.metadata["shape"]) if is_there else None
        return cls(**values | {"n_positions": int(values["n_positions"].item())})

    def to_dict(self) -> dict[str, Any]:
        """All entries as lists and numbers for JSON; what is not finite as "nan", "inf" or "-inf"."""
        entries = {entry.name: self._on_cpu(entry.name) for entry in fields(self)}
        values = {
            name: None if value is None else _plain(value.tolist()) for name, value in entries.items()
        }
        return values | {"dtype": str(self.nll.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseTable:
        """The inverse of :meth:`to_dict`, on the CPU; raises ValueError for what is no table."""
        names = [entry.name for entry in fields(cls)]
        if not isinstance(values, dict) or values.keys() != {*names, "dtype"}:
            got = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a case table must have the keys {', '.join(names)} and dtype, got {got}")
        if str(values["dtype"]) not in SUM_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(SUM_DTYPES)}, got {values['dtype']}")
        return cls(**{entry.name: _read(entry, values) for entry in fields(cls)})

    def _on_cpu(self, name: str) -> Tensor | None:
        """An entry as int64 or fp64; None for one that the loss did not have."""
        value = getattr(self, name)
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=torch.int64, device="cpu")
        value = value.cpu()  # first, since mps has no fp64
        return value.double() if value.is_floating_point() else value

    def __add__(self, other: CaseTable) -> CaseTable:
        if not isinstance(other, CaseTable):
            return NotImplemented
        pairs = ((getattr(self, e.name), getattr(other, e.name)) for e in fields(self))
        return CaseTable(*(b if a is None else a if b is None else a + b for a, b in pairs))

    def __radd__(self, other: int) -> CaseTable:
        """0 + table, with which ``sum`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CaseTable):
            return NotImplemented
        for a, b in ((self._on_cpu(e.name), other._on_cpu(e.name)) for e in fields(self)):
            if a is None or b is None:
                if a is not b:
                    return False
            elif not bool(((a == b) | ((a != a) & (b != b))).all()):
                return False
        return True

    def __repr__(self) -> str:
        """The table as a table: in each cell the count, its share of the row, and the mean nll."""
        if is_traced(self.counts):
            return f"CaseTable without contents on {self.counts.device}"
        table = self.to("cpu")
        counts, nll, rates = table.counts, table._on_cpu("nll"), table.rates()
        lines = [["", *ANSWERS, "all", "mean gap"]]
        for kind, name in enumerate(KINDS):
            cells = zip(counts[kind].tolist(), rates[kind].tolist(), nll[kind].tolist(), strict=True)
            n = int(counts[kind].sum())
            lines.append([name, *(_cell(count, rate, total) for count, rate, total in cells)])
            lines[-1] += [_cell(n, 1.0, nll[kind].sum().item()), _mean(table.gap[kind].item(), n)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        n_ignored = self.n_positions - int(counts.sum())
        title = (
            f"CaseTable of {self.n_positions:,} positions, {n_ignored:,} ignored: count, share, mean nll"
        )
        rows = (
            "  ".join(
                [name.ljust(widths[0]), *(p.rjust(w) for p, w in zip(parts, widths[1:], strict=True))]
            )
            for name, *parts in lines
        )
        return "\n".join([title, *rows])


def _cell(count: int, rate: float, total: float) -> str:
    return f"{count:,} {rate:4.0%} {_mean(total, count)}" if count else "0    -     -"


def _mean(total: float, count: int) -> str:
    return f"{total / count:.3f}" if count else "-"


def _sizes() -> list[int]:
    """How many entries of the vector each field takes, a whole number two parts of them."""
    return [
        math.prod(entry.metadata["shape"])
        for entry in fields(CaseTable)
        for _ in range(1 + entry.metadata["is_whole"])
    ]


VECTOR_SIZE = sum(_sizes())  # entries of a table


def _plain(value: Any) -> Any:
    """Numbers in nested lists as JSON has them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(entry: Any, values: dict[str, Any]) -> Tensor | int | None:
    """An entry of ``to_dict`` as the table has it."""
    shape, is_whole = entry.metadata["shape"], entry.metadata["is_whole"]
    if values[entry.name] is None and entry.default is None:
        return None
    dtype = torch.int64 if is_whole else SUM_DTYPES[values["dtype"]]
    try:
        numbers = _numbers(values[entry.name], int if is_whole else float)
        tensor = torch.tensor(numbers, dtype=dtype, device="cpu")
        fits = tensor.shape == shape and not (is_whole and (tensor < 0).any())
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fits = False
    if not fits:
        wanted = "integers >= 0" if is_whole else "numbers"
        raise ValueError(f"{entry.name} must hold {wanted} of shape {shape}, got {values[entry.name]!r}")
    return int(tensor) if is_whole and not shape else tensor


def _numbers(value: Any, kind: type) -> Any:
    """Nested lists of ``kind``; raises for what else stands in them."""
    if isinstance(value, list):
        return [_numbers(item, kind) for item in value]
    if kind is int and type(value) is not int:
        raise TypeError("not an int")
    return kind(value)


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
    in_cell = cell[:, None] == torch.arange(9, dtype=torch.int64, device=cell.device)  # (N, 9)
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
