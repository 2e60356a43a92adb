"""The plain loss of few words on a CPU, by NumPy.

Rows so short cost less than the calls that read them, so what counts is how soon an operation begins, and how
many there are: NumPy's begin sooner than torch's, its argmax takes a third of the time, and none of them wakes
another thread, which costs more than it does. Where a product has woken them, torch's softmax is the sooner one.
Where NumPy is not installed, ``stepwise_reference.py`` takes these rows too. The formula is that of ``reference.py``.
What a row gets follows from that row alone.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cases
from .terms import PLAIN, Terms
from .validation import Penalty

try:
    import numpy as np
except ImportError:  # torch does not need it
    np = None  # type: ignore[assignment]

MOST_WORDS = 256  # rows of more cost more than the calls that read them
BLOCK = 2**17  # numbers that stay in a cache
Array = Any


def takes(vocab_size: int, device: torch.device, terms: Terms) -> bool:
    """Whether rows of so many logits are taken here, whatever their number."""
    is_short = vocab_size <= MOST_WORDS and device.type == "cpu" and np is not None
    return is_short and (terms is PLAIN or terms == PLAIN) and not _is_recorded()


def _is_recorded() -> bool:
    """Whether somebody writes torch's operations down, to run them on other logits."""
    if torch.jit.is_tracing():
        return True
    proxies = sys.modules.get(
        "torch.fx.experimental.proxy_tensor"
    )  # slow to import, and needed by who does so
    return bool(proxies and torch._C._len_torch_dispatch_stack() and proxies.get_proxy_mode())


class Scored(NamedTuple):
    """What forward finds of each row, arrays (N,) but for the first, which :func:`gradient` overwrites.

    Attributes:
        exps: (N, V) fp32 (fp64 for fp64), exp(logit - largest), or their shares of the row's sum.
        total: that sum.
        place: the target's in all logits, row after row; any of its row where there is none.
        nll: 0 where a row does not count, NaN where its label is none.
        factor: weight of the loss and of its gradient; 0 and NaN likewise.
        loss: their product.
        top: largest logit.
        gap: that less the logit of [MASK], whatever the row.
        marks: what :data:`CASES` and :func:`_factors` are looked up by.
        is_left_out: which rows do not count; None where all do.
    """

    exps: Tensor
    total: Array
    place: Array
    nll: Array
    factor: Array
    loss: Array
    top: Array
    gap: Array
    marks: Array
    is_left_out: Array


def score(
    logits: Tensor, label: Array, seen: Array, mask_id: int, pk: Penalty, pm: Penalty, is_left_out: Array | None,
    *, shares: bool = False,
) -> Scored:  # fmt: skip
    """What each row of logits (N, V), without gradient, and its labels, y and x (N,), say.

    Args:
        is_left_out: see :func:`left_out`.
        shares: whether torch's softmax is taken, the sooner one where the other threads are awake; of fp32 or fp64.
    """
    values, size = _values_of(logits), logits.shape[1]
    column, is_none = label if is_left_out is None else np.where(is_left_out, 0, label), None
    if not _are_in(column, size):
        is_none = (column < 0) | (column >= size)
        column = column.clip(0, size - 1)
    place = _first_of_rows(values) + column
    with np.errstate(all="ignore"):
        exps, said, top, total = _exponentiated(logits, values, shares)
        nll = np.log(total)
        nll -= values.reshape(-1).take(place) - top
        gap = top - values[:, mask_id]
        marks = _packed(is_left_out, said == label, said == mask_id, seen == label, seen == mask_id)
        factor = _factors(float(pk), float(pm), total.dtype).take(marks)
        if is_left_out is not None:
            nll[is_left_out] = 0.0
        if is_none is not None:
            nll[is_none] = factor[is_none] = np.nan
        return Scored(exps, total, place, nll, factor, factor * nll, top, gap, marks, is_left_out)


def score_rows(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int
) -> Scored:
    """:func:`score` of logits (N, V), without gradient, and of tensors y and x (N,)."""
    label = y.numpy()
    return score(logits, label, x.numpy(), mask_id, pk, pm, left_out(label, ignore_index))


def left_out(label: Array, ignore_index: int) -> Array | None:
    """Which rows do not count; None where all do."""
    is_left_out = label == ignore_index
    return is_left_out if np.count_nonzero(is_left_out) else None


def _packed(first: Array | None, *others: Array) -> Array:
    """Truths (N,) as the digits of numbers of 8 bits, the first one's being the highest; 0 for one that is None."""
    if first is None:
        first, *others = others
    number = first.view(np.uint8)
    for digit in others:
        number = number + number
        number += digit.view(np.uint8)
    return number


@lru_cache(maxsize=8)
def _factors(pk: float, pm: float, dtype: Any) -> Array:
    """The weight of each number of marks."""
    counted = (1, 1, 1, 1, 1, pk, pm, 1)
    return np.array((*counted, *counted, *(0,) * 16)).astype(dtype)  # too large a number is infinite


def _first_of_rows(values: Array) -> Array:
    """Where each row begins among all numbers."""
    return np.arange(0, values.size, values.shape[1])


def _values_of(logits: Tensor) -> Array:
    """The logits row after row in fp32 (fp64 for fp64)."""
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return np.ascontiguousarray(wide.numpy())


def _are_in(label: Array, size: int) -> bool:
    unsigned = label.view(np.uint64 if label.itemsize == 8 else np.uint32)  # what is negative becomes large
    return not len(label) or int(np.maximum.reduce(unsigned)) < size


def _exponentiated(logits: Tensor, values: Array, shares: bool) -> tuple[Tensor, Array, Array, Array]:
    """What :class:`Scored` calls exps, the predictions, what it calls top, and what it calls total."""
    if not shares:
        exps = torch.empty_like(torch.from_numpy(values))
        return exps, *_exponentiate(values, exps.numpy())
    said, exps = values.argmax(1), torch.softmax(logits, 1)
    place = _first_of_rows(values) + said
    return exps, said, values.reshape(-1).take(place), 1.0 / exps.numpy().reshape(-1).take(place)


def _exponentiate(values: Array, exps: Array) -> tuple[Array, Array, Array]:
    """Each row's prediction, its logit and the sum of exp(logit - that), which is written to ``exps``."""
    rows = max(1, BLOCK // values.shape[1])
    if len(values) > rows:
        starts = range(0, len(values), rows)
        parts = [
            _exponentiate(values[start : start + rows], exps[start : start + rows]) for start in starts
        ]
        said, top, total = (np.concatenate(part) for part in zip(*parts, strict=True))
        return said, top, total
    said = values.argmax(1)  # the first; NaN counts as one
    top = values.reshape(-1).take(_first_of_rows(values) + said)
    np.exp(np.subtract(values, top[:, None], out=exps), out=exps)
    return said, top, np.einsum("ij->i", exps)


def reduced(losses: Array, reduction: str) -> Tensor:
    """Rows (N,), as the reduction wants them; for "none" in their memory."""
    if reduction == "none":
        return torch.from_numpy(losses)
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(losses)
        if reduction == "mean":  # of no rows too
            total = total / losses.dtype.type(len(losses))
    return torch.from_numpy(np.asarray(total))


def divided(factor: Array, divisor: float) -> Array:
    """The factors of rows whose losses are divided by this."""
    with np.errstate(all="ignore"):
        return factor * factor.dtype.type(1 / divisor)


def gradient(exps: Tensor, total: Array | None, place: Array, factor: Array) -> Tensor:
    """The gradient of sum(nll * factor), in the memory of ``exps``; see :class:`Scored`.

    The total of shares, which is 1, is None. Rows that do not count are 0 where their exps are finite; of logits
    that were given :func:`scale_` clears the others.
    """
    made = exps.numpy()
    with np.errstate(all="ignore"):
        made *= (factor if total is None else factor / total)[:, None]
        made.reshape(-1)[place] -= factor
    return exps


def scale_(gradient: Tensor, upstream: Tensor, is_left_out: Array) -> Tensor:
    """The gradient (N, V) in place for the one that reached the loss, 0-d, or its rows, (N,)."""
    if upstream.dim():
        gradient.mul_(upstream[:, None])
    elif upstream.item() != 1.0:
        gradient.mul_(upstream)
    if is_left_out is not None:  # whose logits, and what reached them, may be anything
        gradient.numpy()[is_left_out] = 0.0
    return gradient


def gradient_again(logits: Tensor, label: Array, factor: Array, *, shares: bool = False) -> Tensor:
    """:func:`gradient` of logits (N, V), without gradient, and labels y (N,) that were scored before."""
    values = _values_of(logits)
    with np.errstate(all="ignore"):
        exps, _, _, total = _exponentiated(logits, values, shares)
    place = _first_of_rows(values) + label.clip(0, logits.shape[1] - 1)
    return gradient(exps, None if shares else total, place, factor)


def statistics(scored: Scored) -> tuple[Tensor, Tensor]:
    """Of the rows that were scored, as ``stepwise_reference.score_rows`` gives them."""
    gap = scored.gap
    if scored.is_left_out is not None:
        gap = np.where(scored.is_left_out, 0.0, gap).astype(gap.dtype)
    columns = (scored.loss, scored.nll, gap, scored.factor, scored.top, scored.total)
    return torch.from_numpy(CASES.take(scored.marks).astype(np.int32)), torch.from_numpy(np.array(columns))


def _case_of(marks: int) -> int:
    """A row's case, from what :func:`score` packs."""
    x_is_mask, x_is_y, says_mask, says_target, is_left_out = (marks >> bit & 1 for bit in range(5))
    if is_left_out:
        return cases.IGNORED
    kind = (cases.CORRUPTED, cases.MASKED, cases.INTACT, cases.CORRUPTED)[x_is_mask + 2 * x_is_y]
    return kind * 3 + (cases.MASK if says_mask else cases.TARGET if says_target else cases.OTHER)


CASES: Array = None if np is None else np.array([_case_of(marks) for marks in range(32)], dtype=np.intp)


def sum_cases(marks: Array, nll: Array, gap: Array) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    """Of the case table all but ``n_positions``, in its order; in fp64, one row after the other."""
    case = CASES.take(marks)
    counts, of_nll, of_gap = (
        np.bincount(case, weights, 10)[:9].reshape(3, 3) for weights in (None, nll, gap)
    )
    with np.errstate(over="ignore"):
        of_gap = np.add.reduce(of_gap, 1)
        of_nll, of_gap = (torch.from_numpy(sums.astype(nll.dtype)) for sums in (of_nll, of_gap))
    return torch.from_numpy(counts), of_nll, of_gap, None, None, None
