"""The plain loss of few words on a CPU, by NumPy.

Rows so short cost less than the calls that read them, so what counts is how soon an operation begins, and how
many there are: NumPy's begin sooner than torch's, its argmax takes a third of the time, and none of them wakes
another thread, which costs more than it does. Where NumPy is not installed, ``stepwise_reference.py`` takes these
rows too. The formula is that of ``reference.py``. What a row gets follows from that row alone.
"""

from __future__ import annotations

import sys
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
LEFT_OUT = 8  # mark of a row that does not count
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
        exps: (N, V) fp32 (fp64 for fp64), exp(logit - largest).
        total: their sum.
        place: the target's in all logits, row after row; any of its row where there is none.
        nll: 0 where a row does not count, NaN where its label is none.
        factor: weight of the loss and of its gradient; 0 and NaN likewise.
        top: largest logit.
        at_mask: that of [MASK].
        said: the predictions.
        marks: 1 where x is [MASK], + 2 where it is the target, + 4 where the prediction is [MASK]; or LEFT_OUT.
        is_left_out: which rows do not count; None where all do.
    """

    exps: Tensor
    total: Array
    place: Array
    nll: Array
    factor: Array
    top: Array
    at_mask: Array
    said: Array
    marks: Array
    is_left_out: Array

    @property
    def row_loss(self) -> Tensor:
        """Of each row, (N,)."""
        with np.errstate(all="ignore"):
            return torch.from_numpy(self.factor * self.nll)


def score(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int
) -> Scored:
    """What each row of logits (N, V), without gradient, and its labels (N,) say."""
    values, exps = _widened(logits)
    label, seen, size = y.numpy(), x.numpy(), logits.shape[1]
    column, is_left_out, is_none = label, None, None
    if 0 <= ignore_index < size or not _are_in(label, size):
        is_left_out = label == ignore_index
        column = np.where(is_left_out, 0, label)
        if not _are_in(column, size):
            is_none = (column < 0) | (column >= size)
            column = column.clip(0, size - 1)
    place = _first_of_rows(values) + column
    with np.errstate(all="ignore"):
        said, top, total = _exponentiate(values, exps.numpy())
        nll = np.log(total.astype(np.float64))
        nll -= values.reshape(-1).take(place) - top
        nll = nll.astype(top.dtype)
        marks = (said == mask_id).view(np.uint8) * np.uint8(4)
        marks += (seen == label).view(np.uint8) * np.uint8(2)
        marks += seen == mask_id
        if is_left_out is not None:
            marks[is_left_out], nll[is_left_out] = LEFT_OUT, 0.0
        factor = np.array((1, 1, 1, 1, 1, float(pk), float(pm), 1, 0)).astype(top.dtype).take(marks)
    if is_none is not None:
        nll[is_none] = factor[is_none] = np.nan
    return Scored(exps, total, place, nll, factor, top, values[:, mask_id], said, marks, is_left_out)


def _first_of_rows(values: Array) -> Array:
    """Where each row begins among all numbers."""
    return np.arange(0, values.size, values.shape[1])


def _widened(logits: Tensor) -> tuple[Array, Tensor]:
    """The logits row after row in fp32 (fp64 for fp64), and memory for as many numbers."""
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    memory = torch.empty_like(wide, memory_format=torch.contiguous_format)
    return np.ascontiguousarray(wide.numpy()), memory


def _are_in(label: Array, size: int) -> bool:
    unsigned = label.view(np.uint64 if label.itemsize == 8 else np.uint32)  # what is negative becomes large
    return not len(label) or int(np.maximum.reduce(unsigned)) < size


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


def reduced(row_loss: Tensor, reduction: str) -> Tensor:
    """``reduce_rows`` of a new tensor: the same bits, of operations that begin sooner."""
    if reduction == "none":
        return row_loss
    total = row_loss.sum()
    return total if reduction == "sum" else total / len(row_loss)


def gradient(exps: Tensor, total: Array, place: Array, factor: Array, divisor: float) -> Tensor:
    """The gradient of sum(nll * factor) / divisor, in the memory of ``exps``; see :class:`Scored`.

    What rows that do not count hold is cleared by :func:`scale_`, which has to follow where there are such.
    """
    made = exps.numpy()
    with np.errstate(all="ignore"):
        factor = factor / factor.dtype.type(divisor)
        made *= (factor / total)[:, None]
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


def gradient_again(logits: Tensor, y: Tensor, factor: Array, divisor: float) -> Tensor:
    """:func:`gradient` of logits (N, V), without gradient, and labels (N,) that were scored before."""
    values, exps = _widened(logits)
    with np.errstate(all="ignore"):
        _, _, total = _exponentiate(values, exps.numpy())
    place = _first_of_rows(values) + y.numpy().clip(0, logits.shape[1] - 1)
    return gradient(exps, total, place, factor, divisor)


def find_cases(scored: Scored, y: Tensor) -> tuple[Array, Array]:
    """The case of each row that was scored, (N,) int32, and largest logit - logit of [MASK], whatever the row."""
    case = CASES.take(scored.marks + (scored.said == y.numpy()) * np.uint8(16))
    with np.errstate(all="ignore"):
        gap = scored.top - scored.at_mask
    return case, gap


def statistics(scored: Scored, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows that were scored, as ``stepwise_reference.score_rows`` gives them."""
    case, gap = find_cases(scored, y)
    if scored.is_left_out is not None:
        gap[scored.is_left_out] = 0.0
    columns = (scored.row_loss.numpy(), scored.nll, gap, scored.factor, scored.top, scored.total)
    return torch.from_numpy(case), torch.from_numpy(np.array(columns))


def _case_of(number: int) -> int:
    """A row's case, from its marks, and + 16 where the prediction is the target."""
    x_is_mask, x_is_y, says_mask, is_left_out, says_target = (number >> bit & 1 for bit in range(5))
    if is_left_out:
        return cases.IGNORED
    kind = (cases.CORRUPTED, cases.MASKED, cases.INTACT, cases.CORRUPTED)[x_is_mask + 2 * x_is_y]
    return kind * 3 + (cases.MASK if says_mask else cases.TARGET if says_target else cases.OTHER)


CASES: Array = None if np is None else np.array([_case_of(number) for number in range(32)], dtype=np.int32)


def sum_cases(case: Array, nll: Array, gap: Array) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    """Of the case table all but ``n_positions``, in its order; in fp64, one row after the other."""
    counts, of_nll, of_gap = (
        np.bincount(case, weights, 10)[:9].reshape(3, 3) for weights in (None, nll, gap)
    )
    with np.errstate(over="ignore"):
        of_nll, of_gap = (torch.from_numpy(sums.astype(nll.dtype)) for sums in (of_nll, of_gap.sum(1)))
    return torch.from_numpy(counts), of_nll, of_gap, None, None, None
