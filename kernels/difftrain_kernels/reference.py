"""The definition of the loss: plain PyTorch, any device, every formula written once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cases
from .calls import LossCall, Result, prepare_call
from .cases import CaseTable
from .terms import PLAIN, PROBABILITY, Terms
from .validation import Penalty, check_logits


def diffusion_loss_reference(
    logits: Tensor,
    y: Tensor,
    x: Tensor,
    mask_id: int,
    pk: Penalty | None = None,
    pm: Penalty | None = None,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    return_cases: bool = False,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    case_weights: object = None,
    gate: str = "argmax",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid_mask: bool = False,
    logit_scale: float | Tensor | None = None,
    return_rows: bool = False,
    entropy: bool = False,
    shift: int = 0,
) -> Result:
    """Cross-entropy weighted by what the model predicts, in eager PyTorch.

    For each position with logits l, target y and input x::

        nll    = logsumexp(l) - l[y]                     (0 where y == ignore_index)
        weight = pk  if x == mask_id and y != mask_id and argmax(l) == mask_id
                 pm  if x == y       and x != mask_id and argmax(l) == mask_id
                 1   otherwise
        loss   = sum(weight * nll) / N                   (N counts ignored positions too)

    argmax takes the first maximum, and NaN counts as maximum. The weight is a constant: no
    gradient flows through it. Arithmetic is fp32 (fp64 for fp64 logits). With all options::

        z      = c * tanh(s * l / c)                     softcap c, logit_scale s; s * l without softcap
        z[mask_id] = -inf                                forbid_mask
        lse    = logsumexp(z),  p = softmax(z),  nll = lse - z[y],  the prediction is argmax(z)
        smooth = (1 - e) * nll + e * mean(lse - z)       label_smoothing e; over the words that take part
        weight = C[kind, answer]                         case_weights C; pk and pm are two of its cells
                 sum over answers of C[kind, answer] * p(answer)    where gate is "probability"
        row    = t * (weight * smooth + a * lse**2)      token_weights t, z_loss a
        loss   = sum(row) / N, or / normalizer           0 where the normalizer is 0

    p(answer) is p[mask_id], p[y] (0 where y is [MASK]) and the rest, so that for pk and pm the gate gives
    1 + (pk - 1) * p[mask_id] where masked and 1 + (pm - 1) * p[mask_id] where intact. All weights are
    constants. A position of token weight 0 does not count, as if it were ignored.

    Arguments, result and errors are those of :func:`difftrain_kernels.fused_diffusion_loss`. Derivatives
    of any order and torch.func's transforms work. A label outside [0, V) makes its row's loss and gradient NaN. An ignored row has loss 0 and gradient exactly
    0, whatever its logits hold. An empty batch gives NaN for "mean", 0 for "sum" and an empty tensor for
    "none".

    Source: the specification's ``diffusion_loss_function``; softcap, Gemma 2 (arXiv:2408.00118, section
    2); z-loss, PaLM (arXiv:2204.02311, section 5); label smoothing as ``torch.nn.functional.cross_entropy``.
    """
    logits = check_logits(logits)
    call = prepare_call(
        logits.shape[:-1], logits.shape[-1], logits, y, x, mask_id, pk, pm,
        ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, shift=shift,
        return_cases=return_cases, return_rows=return_rows, entropy=entropy, token_weights=token_weights,
        case_weights=case_weights, gate=gate, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        forbid_mask=forbid_mask, logit_scale=logit_scale,
    )  # fmt: skip
    return reference_loss(logits, call)


def reference_loss(logits: Tensor, call: LossCall) -> Result:
    """:func:`diffusion_loss_reference` of checked arguments."""
    scores = score(logits.reshape(-1, logits.shape[-1]), *call.labels, call.terms)
    loss = scores.row_loss
    if call.reduction != "none":
        loss = loss.sum() if call.reduction == "sum" else loss.mean()
    statistics = scores.detach()
    return call.result(
        loss, lambda: tabulate_cases(statistics, call.terms), lambda: row_values(statistics, call.terms)
    )


class Scores(NamedTuple):
    """What the logits and labels say of each row, (N,) each; 0 where a row does not count.

    Attributes:
        row_loss: its share of the loss's sum.
        case: as in ``cases.py``.
        gap: largest logit - logit of [MASK].
        factor: token weight * weight, NaN for a label that is none.
        others: what the terms need beside it, by the names of :func:`other_columns`.
    """

    row_loss: Tensor
    case: Tensor
    nll: Tensor
    gap: Tensor
    factor: Tensor
    others: dict[str, Tensor]

    def detach(self) -> Scores:
        *values, others = self
        return Scores(*(v.detach() for v in values), {name: v.detach() for name, v in others.items()})


def other_columns(terms: Terms) -> list[str]:
    """Names of the statistics that these terms need beside those of the plain loss."""
    names = ["weighted"] if terms.has_own_sums else []
    names += ["smoothing"] if terms.label_smoothing else []
    names += (
        ["z", "z_factor"] if terms.z_loss else []
    )  # token weight * a * lse^2, and 2 * a * lse * token weight
    names += ["p_target"] if terms.gate == PROBABILITY else []
    names += ["p_mask"] if terms.gate == PROBABILITY or terms.rows else []
    names += ["lse", "confidence"] if terms.rows else []
    return [*names, "entropy"] if terms.entropy else names


def score(logits_NV, y, x, mask_id, pk, pm, ignore_index, terms: Terms = PLAIN) -> Scores:
    """What the logits (N, V) and the labels (N,) say of each row, by differentiable operations."""
    y, x = y.long(), x.long()
    vocab_size = logits_NV.shape[1]
    is_counted, _ = _counted(y, ignore_index, terms, torch.promote_types(logits_NV.dtype, torch.float32))
    # Cleared before anything else, so that a NaN in a row that does not count cannot reach its gradient.
    bent_NV = bend(logits_NV.masked_fill(~is_counted[:, None], 0.0), terms, mask_id)
    column, _ = target_column(y, vocab_size)
    log_p_NV = torch.log_softmax(bent_NV, dim=-1)
    nll = -log_p_NV.gather(1, column).squeeze(1)
    smooth = nll
    if terms.label_smoothing:
        takes_part = columns_taking_part(vocab_size, mask_id, terms, nll.device)
        mean = log_p_NV.masked_fill(~takes_part, 0.0).sum(1) / (vocab_size - terms.forbid_mask)
        smooth = (1.0 - terms.label_smoothing) * nll - terms.label_smoothing * mean
    lse = torch.logsumexp(bent_NV, dim=-1) if terms.z_loss or terms.rows else None

    bent_NV, log_p_NV = bent_NV.detach(), log_p_NV.detach()
    predicted = bent_NV.argmax(dim=-1)
    top = bent_NV.gather(1, predicted[:, None]).squeeze(1)
    gap = top - bent_NV[:, mask_id]
    shown = {}
    if terms.gate == PROBABILITY or terms.rows:
        shown["p_mask"] = log_p_NV[:, mask_id].exp()
    if terms.rows:
        shown["confidence"] = log_p_NV.gather(1, predicted[:, None]).squeeze(1).exp()
    if terms.entropy:
        p_NV = log_p_NV.exp()
        shown["entropy"] = -torch.where(p_NV > 0, p_NV * log_p_NV, p_NV).sum(1)
    labels = (y, x, mask_id, pk, pm, ignore_index, vocab_size)
    return weigh(nll, smooth, lse, gap, predicted == mask_id, predicted == y, shown, *labels, terms)


def _counted(
    y: Tensor, ignore_index: int, terms: Terms, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Whether each row counts, (N,), and its token weight where there are any."""
    is_counted = y != ignore_index
    if terms.token_weights is None:
        return is_counted, None
    token_weight = terms.token_weights.reshape(-1).to(dtype)
    return is_counted & (token_weight != 0), token_weight


def bend(logits: Tensor, terms: Terms, mask_column: int) -> Tensor:
    """The logits that the softmax sees, in fp32 (fp64 for fp64)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if terms.logit_scale is not None:
        scale = terms.logit_scale
        wide = wide * (scale.to(wide.dtype) if isinstance(scale, Tensor) else scale)
    if terms.softcap is not None:
        wide = terms.softcap * torch.tanh(wide / terms.softcap)
    if terms.forbid_mask:
        takes_part = columns_taking_part(logits.shape[1], mask_column, terms, logits.device)
        wide = wide.masked_fill(~takes_part, -torch.inf)
    return wide


def columns_taking_part(size: int, mask_column: int, terms: Terms, device: torch.device) -> Tensor:
    """Which of so many columns take part, (size,) bool; ``mask_column`` may lie outside them."""
    column = torch.arange(size, dtype=torch.int64, device=device)
    return column != mask_column if terms.forbid_mask else column >= 0


def target_column(y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which of so many columns is the target's, (N, 1), and whether one is, (N,); 0 where none is."""
    is_here = (y >= 0) & (y < size)
    return torch.where(is_here, y, 0).long()[:, None], is_here


def weigh(
    nll, smooth, lse, gap, says_mask, says_target, shown, y, x, mask_id, pk, pm, ignore_index, vocab_size, terms
) -> Scores:  # fmt: skip
    """What the labels make of each row's nll and answer."""
    is_counted, token_weight = _counted(y, ignore_index, terms, nll.dtype)
    _, is_label = target_column(y, vocab_size)
    if terms.forbid_mask:
        is_label = is_label & (y != mask_id)
    # Not of a row that does not count: the NaN would stop short of its gradient, but anomaly detection would see it.
    poison = torch.ones_like(nll).masked_fill(is_counted & ~is_label, torch.nan)
    is_plain_target = smooth is nll
    nll = torch.where(is_counted, nll * poison, 0.0)
    smooth = nll if is_plain_target else torch.where(is_counted, smooth * poison, 0.0)

    is_masked = (x == mask_id) & (y != mask_id)
    is_intact = (x == y) & (x != mask_id)
    kind = torch.where(is_masked, cases.MASKED, torch.where(is_intact, cases.INTACT, cases.CORRUPTED))
    answer = torch.where(says_mask, cases.MASK, torch.where(says_target, cases.TARGET, cases.OTHER))
    cell = kind * 3 + answer
    shown = {name: torch.where(is_counted, value, 0.0) for name, value in shown.items()}
    if terms.gate == PROBABILITY:
        has_share = is_counted & is_label & (y != mask_id)
        shown["p_target"] = torch.where(has_share, torch.exp(-nll.detach()), 0.0)
    weight = _case_weight(cell, kind, shown, pk, pm, terms, nll)

    row_loss, factor = weight * smooth, torch.where(is_counted, weight * poison, 0.0)
    others = dict(shown)
    if token_weight is not None:
        token_weight = torch.where(is_counted, token_weight, 0.0)
        row_loss, factor = row_loss * token_weight, factor * token_weight
    if terms.has_own_sums:
        others["weighted"] = smooth if token_weight is None else smooth * token_weight
    if terms.label_smoothing:
        others["smoothing"] = smooth - nll if token_weight is None else (smooth - nll) * token_weight
    if lse is not None:
        lse = others["lse"] = torch.where(is_counted, lse, 0.0)
    if terms.z_loss:
        scale = terms.z_loss if token_weight is None else terms.z_loss * token_weight
        others["z"], others["z_factor"] = scale * lse.square(), 2.0 * scale * lse.detach() * poison
        row_loss = row_loss + others["z"]
    case = torch.where(is_counted, cell, cases.IGNORED)
    gap = torch.where(is_counted, gap, 0.0)
    return Scores(row_loss, case, nll, gap, factor, others)


def _case_weight(cell, kind, shown, pk, pm, terms, like) -> Tensor:
    """Each row's weight by case, a constant."""
    weights = terms.case_weights
    if weights is None:
        weights = (pk, 1.0, 1.0, pm, 1.0, 1.0, 1.0, 1.0, 1.0)
    elif isinstance(weights, Tensor):
        weights = weights.reshape(9).unbind()
    weights = [w.to(like.dtype) if isinstance(w, Tensor) else w for w in weights]
    weight = torch.ones_like(like).detach()
    if terms.gate == PROBABILITY:
        for k in range(3):
            mask, target, other = weights[3 * k : 3 * k + 3]
            expected = other + (mask - other) * shown["p_mask"] + (target - other) * shown["p_target"]
            weight = torch.where(kind == k, expected, weight)
        return weight
    for i, case_weight in enumerate(weights):
        if isinstance(case_weight, Tensor) or case_weight != 1.0:
            weight = torch.where(cell == i, case_weight, weight)
    return weight


def tabulate_cases(scores: Scores, terms: Terms = PLAIN) -> CaseTable:
    """The :class:`CaseTable` of rows."""
    case, others = scores.case, scores.others
    shares = None
    if terms.gate == PROBABILITY:
        shares = (others["p_mask"], others["p_target"])
    return cases.tabulate(
        case // 3, case % 3, case != cases.IGNORED, scores.nll, scores.gap,
        weighted=others.get("weighted"), smoothing=others.get("smoothing"), z=others.get("z"), shares=shares,
    )  # fmt: skip


def row_values(scores: Scores, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """The case of each row, and what :class:`RowOutputs` shows of it, by name."""
    names = ["lse", "p_mask", "confidence", *(["entropy"] if terms.entropy else [])]
    return scores.case, {"nll": scores.nll, **{name: scores.others[name] for name in names}}
