"""The reference in two steps without autograd: the statistics of rows, and their gradient from these.

For whoever makes the gradient himself: the loss of CPU tensors, chunks of the linear loss, and operators,
inside which autograd does not record. The formula is that of ``reference.py``.

On a CPU, rows are taken in blocks that stay in the cache: each step reads the logits from memory once,
the second writes the gradient once, and all between happens in one buffer. What a row gets follows from
that row alone, by operations whose order its length gives, whatever block it is in.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import cases, small_vocabulary
from .reference import (
    Scores,
    bend,
    columns_taking_part,
    other_columns,
    tabulate_cases,
    target_column,
    weigh,
)
from .row_blocks import blocks_of
from .terms import PLAIN, PROBABILITY, Terms
from .validation import Penalty

# Columns of the plain loss: weighted loss, nll, gap, factor of the gradient; and of the softmax the
# largest logit and the sum of exp(logit - largest).
N_STATISTICS = 6
# exp of less is below the normal numbers, where arithmetic takes a hundred times as long: it counts as 0.
SMALLEST = {torch.float32: -87.3, torch.float64: -708.3}
LOWEST = {dtype: torch.full((1, 1), -torch.inf, dtype=dtype, device="cpu") for dtype in SMALLEST}


def score_rows(
    logits: Tensor, y: Tensor, x: Tensor, mask_id: int, pk: Penalty, pm: Penalty, ignore_index: int,
    terms: Terms = PLAIN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The statistics of rows of logits (N, V): case (N,) int32, and columns fp32 (fp64 for fp64).

    The columns are (6 + further, N): those of :func:`other_columns` follow the plain loss's.
    """
    with torch.no_grad():
        if small_vocabulary.takes(logits.shape[-1], logits.device, terms):
            labels = (y, x, mask_id, pk, pm, ignore_index)
            return small_vocabulary.statistics(small_vocabulary.score_rows(logits.detach(), *labels))
        y, x = y.long(), x.long()
        vocab_size = logits.shape[1]
        column, is_label = _target_column(y, vocab_size)
        seen = torch.cat((column, torch.full_like(column, mask_id)), 1)
        parts = [_read_block(*block, mask_id=mask_id, terms=terms) for block in blocks_of(logits, seen)]
        three, total, *sums = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        top = three.amax(1)
        at_target, at_mask, _ = three.unbind(1)
        is_all_counted = is_label is None and not 0 <= ignore_index < vocab_size
        is_top = three == top[:, None]
        case = _cases(logits, y, x, seen, is_top, is_label, is_all_counted, mask_id, ignore_index, terms)
        gap, log_total = top - at_mask, total.log()
        nll = log_total - (at_target - top)
        if terms == PLAIN and logits.device.type == "cpu":
            row_loss, factor = _weigh_plain(case, nll, gap, pk, pm, is_label, is_all_counted)
            return case, torch.stack((row_loss, nll, gap, factor, top, total))
        smooth = nll
        if terms.label_smoothing:
            mean = sums[0] / (vocab_size - terms.forbid_mask) - log_total
            smooth = (1.0 - terms.label_smoothing) * nll - terms.label_smoothing * mean
        lse = top + log_total if terms.z_loss or terms.rows else None
        shown = {}
        if terms.gate == PROBABILITY or terms.rows:
            shown["p_mask"] = torch.exp(at_mask - top) / total
        if terms.rows:
            shown["confidence"] = 1.0 / total
        if terms.entropy:
            shown["entropy"] = log_total - sums[-1] / total
        answer = case % 3
        scores = weigh(
            nll, smooth, lse, gap, answer == cases.MASK, answer == cases.TARGET, shown,
            y, x, mask_id, pk, pm, ignore_index, vocab_size, terms,
        )  # fmt: skip
        row_loss, case, nll, gap, factor, others = scores
        further = (others[name] for name in other_columns(terms))
        return case.int(), torch.stack((row_loss, nll, gap, factor, top, total, *further))


def _target_column(y: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """:func:`target_column`, but None where every row has one and that costs no wait to know."""
    if y.device.type == "cpu" and len(y):
        least, most = (bound.item() for bound in y.aminmax())
        if least >= 0 and most < size:
            return y.long()[:, None], None
    return target_column(y, size)


def _read_block(
    logits: Tensor, seen: Tensor, buffer: Tensor, *, mask_id: int, terms: Terms
) -> list[Tensor]:
    """Of each row the target's logit, [MASK]'s and the largest other (n, 3); the sum of exp(logit - top); sums for terms.

    Args:
        seen: (n, 2), the columns of the target and of [MASK].
        buffer: (n, V), written to.
    """
    z = buffer.copy_(bend(logits, terms, mask_id) if _bends(terms) else logits)
    pair = z.gather(1, seen)
    z.scatter_(1, seen, LOWEST[z.dtype].to(z.device).expand_as(pair))
    three = torch.cat((pair, z.amax(1, keepdim=True)), 1)
    z.scatter_(1, seen, pair).sub_(three.amax(1, keepdim=True))
    sums = []
    if terms.label_smoothing:
        takes_part = columns_taking_part(z.shape[1], mask_id, terms, z.device)
        sums.append(z.masked_fill(~takes_part, 0.0).sum(1))
    exps = _exp_(z.clone() if terms.entropy else z)
    if terms.entropy:
        sums.append(torch.where(exps > 0, exps * z, exps).sum(1))
    return [three, exps.sum(1), *sums]


def _exp_(z: Tensor) -> Tensor:
    """exp of numbers up to 0, in place."""
    return torch.threshold_(z, SMALLEST[z.dtype], -torch.inf).exp_()


def _case_of(is_ignored, target_is_top, mask_is_top, other_is_top, x_is_y, x_is_mask, y_is_mask) -> int:
    """A row's case, from its labels and from what is largest in it; OPEN unless that is one word alone."""
    if is_ignored:
        return cases.IGNORED
    if other_is_top + (mask_is_top or target_is_top if y_is_mask else mask_is_top + target_is_top) != 1:
        return OPEN
    is_masked, is_intact = x_is_mask and not y_is_mask, x_is_y and not x_is_mask
    kind = cases.MASKED if is_masked else cases.INTACT if is_intact else cases.CORRUPTED
    return kind * 3 + (cases.MASK if mask_is_top else cases.TARGET if target_is_top else cases.OTHER)


OPEN = 10  # the largest case
# By the seven answers as bits of a number, the first the highest; it is asked last, and only where it may be yes.
CASES = torch.tensor(
    [_case_of(*answers) for answers in itertools.product((False, True), repeat=7)],
    dtype=torch.int32, device="cpu",
)  # fmt: skip
BITS = torch.tensor([32, 16, 8, 4, 2, 1, 64], dtype=torch.float32, device="cpu")


def _cases(
    logits, y, x, seen, is_top, is_label, is_all_counted, mask_id, ignore_index, terms
) -> Tensor:  # fmt: skip
    """The case of each row, (N,) int32, without argmax, the slowest pass of all, wherever one word is largest alone.

    Args:
        seen: (N, 2), the columns of the target and of [MASK].
        is_top: (N, 3), whether the target's logit, [MASK]'s and the largest other are the largest of all.
        is_label: (N,), whether y is a label; None where it is known to be one everywhere.
    """
    is_on_cpu = logits.device.type == "cpu"
    rows = slice(None)
    if is_on_cpu:
        bits = [is_top, x[:, None] == seen, (y == mask_id)[:, None]]
        bits += [] if is_all_counted else [(y == ignore_index)[:, None]]
        numbers = torch.cat(bits, 1).float().mv(BITS[:6] if is_all_counted else BITS)
        case = CASES.index_select(0, numbers.int())
        if is_label is not None:
            case.masked_fill_(~is_label & (y != ignore_index), OPEN)
        if not len(case) or case.max().item() != OPEN:
            return case
        rows = (case == OPEN).nonzero().squeeze(1)
        y, x, logits = y[rows], x[rows], logits.index_select(0, rows)
    predicted = torch.cat([bend(block, terms, mask_id).argmax(1) for block, _ in blocks_of(logits)])
    is_masked = (x == mask_id) & (y != mask_id)
    is_intact = (x == y) & (x != mask_id)
    kind = torch.where(is_masked, cases.MASKED, torch.where(is_intact, cases.INTACT, cases.CORRUPTED))
    answer = torch.where(predicted == y, cases.TARGET, cases.OTHER)
    found = (kind * 3 + torch.where(predicted == mask_id, cases.MASK, answer)).int()
    return (
        case.index_copy_(0, rows, found)
        if is_on_cpu
        else found.masked_fill_(y == ignore_index, cases.IGNORED)
    )


def _weigh_plain(case, nll, gap, pk, pm, is_label, is_all_counted) -> tuple[Tensor, Tensor]:
    """Each row's loss and the factor of its gradient; clears nll and gap of rows that do not count."""
    if isinstance(pk, Tensor) or isinstance(pm, Tensor):
        weights = nll.new_ones(10)
        weights[3 * cases.MASKED + cases.MASK], weights[3 * cases.INTACT + cases.MASK] = pk, pm
        weights[cases.IGNORED] = 0.0
    else:
        weights = (pk, 1.0, 1.0, pm, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
        weights = torch.tensor(weights, dtype=nll.dtype, device=nll.device)
    factor = weights.index_select(0, case)
    if is_label is not None:
        nll.masked_fill_(~is_label, torch.nan)
        factor.masked_fill_(~is_label, torch.nan)
    if not is_all_counted:
        is_left_out = case == cases.IGNORED
        for values in (nll, gap, factor):
            values.masked_fill_(is_left_out, 0.0)
    return factor * nll, factor


def scores_of(statistics: tuple[Tensor, Tensor], terms: Terms) -> Scores:
    """What :func:`score_rows` found, by name."""
    case, columns = statistics
    others = dict(zip(other_columns(terms), columns[N_STATISTICS:], strict=True))
    return Scores(columns[0], case, *columns[1:4], others)


def sum_cases(statistics: tuple[Tensor, Tensor], terms: Terms) -> tuple[Tensor | None, ...]:
    """Of the case table all but ``n_positions``, in its order; None for what the terms do not have."""
    case, columns = statistics
    if case.device.type != "cpu" or terms.gate == PROBABILITY:
        table = tabulate_cases(scores_of(statistics, terms), terms)
        weighted = table.weighted if terms.has_own_sums else None
        return table.counts, table.nll, table.gap, weighted, table.smoothing, table.z_loss

    def by_case(values: Tensor | None) -> Tensor | None:
        """Added up in fp64, one row after the other."""
        if values is None:
            return None
        return torch.bincount(case, values.double(), minlength=10)[:9].view(3, 3)

    scores = scores_of(statistics, terms)
    sums = [
        by_case(v)
        for v in (scores.nll, scores.gap, *(scores.others.get(n) for n in ("weighted", "smoothing")))
    ]
    nll, gap, *others = (
        None if v is None else v.to(columns.dtype) for v in (sums[0], sums[1].sum(1), *sums[2:])
    )
    z = scores.others.get("z")
    return (
        torch.bincount(case, minlength=10)[:9].view(3, 3),
        nll,
        gap,
        *others,
        None if z is None else z.sum(),
    )


def _bends(terms: Terms) -> bool:
    """Whether the softmax sees other logits than those given."""
    return terms.softcap is not None or terms.logit_scale is not None or terms.forbid_mask


def row_gradients(
    logits: Tensor, y: Tensor, statistics: tuple[Tensor, Tensor], upstream: Tensor, divisor: float,
    *, mask_id: int, terms: Terms = PLAIN,
) -> Tensor:  # fmt: skip
    """The gradient of sum(row losses * upstream) / divisor, (N, V) in the logits' dtype; new.

    Args:
        statistics: what :func:`score_rows` returned for these logits and labels.
        upstream: 0-d or (N,).
    """
    case, columns = statistics
    if small_vocabulary.takes(logits.shape[-1], logits.device, terms):
        factor = small_vocabulary.divided(columns[3].numpy(), divisor)
        made = small_vocabulary.gradient_again(logits.detach(), y.numpy(), factor)
        is_left_out = case.numpy() == cases.IGNORED
        return small_vocabulary.scale_(made, upstream, is_left_out).to(logits.dtype)
    _, _, _, factor, top, total, *others = columns.unbind()
    scale, z_factor = upstream / divisor, None
    if terms.z_loss:
        z_factor = others[other_columns(terms).index("z_factor")] * scale
    slants = slants_of(factor * scale, z_factor, total, logits.shape[1] - terms.forbid_mask, terms)
    column, _ = _target_column(y, logits.shape[1])
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for block, out, target, largest, *vectors, buffer in blocks_of(logits, gradient, column, top, *slants):
        bent = bend(block, terms, mask_id) if _bends(terms) else block
        if bent.dtype != buffer.dtype:  # no operation is fast on two dtypes
            bent = buffer.copy_(bent)
        exps = _exp_(torch.sub(bent, largest[:, None], out=buffer))
        slanted = slant(
            exps, vectors, target, bent, mask_id, terms, out if out.dtype == exps.dtype else exps
        )
        if slanted is not out:
            out.copy_(slanted)
    # The logits of rows that do not count may be anything.
    if logits.device.type != "cpu":
        return gradient.masked_fill_((case == cases.IGNORED)[:, None], 0.0)
    if len(case) and case.max().item() == cases.IGNORED:
        gradient.index_fill_(0, (case == cases.IGNORED).nonzero().squeeze(1), 0.0)
    return gradient


def slants_of(
    factor: Tensor, z_factor: Tensor | None, total: Tensor, n_words: int | Tensor, terms: Terms
) -> list[Tensor]:
    """For the gradient of rows p * (factor + z_factor) - factor * smoothed target, (N,) each.

    What each exp, of which p is a share of ``total``, is multiplied by; what is then added at the target;
    and, with label smoothing, what is added everywhere.

    Args:
        n_words: how many words take part.
    """
    slants = [(factor if z_factor is None else factor + z_factor) / total]
    if not terms.label_smoothing:
        return [*slants, -factor]
    share = terms.label_smoothing
    return [*slants, (share - 1.0) * factor, factor * (-share / n_words)]


def slant(
    exps: Tensor, slants: list[Tensor], column: Tensor, bent: Tensor, mask_column: int, terms: Terms, out: Tensor
) -> Tensor:  # fmt: skip
    """The gradient of rows (n, V), or of a slice of them, times the slope of their logits; ``out``, which may be exps.

    Args:
        slants: see :func:`slants_of`.
        column: (n, 1), the target's.
        bent: the logits that the exps were made of.
        mask_column: [MASK]'s, which may lie outside.
    """
    per_exp, at_target, *everywhere = slants
    gradient = torch.mul(exps, per_exp[:, None], out=out).scatter_add_(1, column, at_target[:, None])
    for added in everywhere:
        gradient += added[:, None]
    if terms.softcap is not None:
        gradient *= 1.0 - (bent / terms.softcap).square()
    if terms.logit_scale is not None:
        scale = terms.logit_scale
        gradient *= scale.to(gradient.dtype) if isinstance(scale, Tensor) else scale
    if terms.forbid_mask and 0 <= mask_column < gradient.shape[1]:
        gradient[:, mask_column] = 0.0
    return gradient
