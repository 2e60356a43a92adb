"""Problems for the kernels' terms, ways to launch them, and how far a result may be from the oracle's."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st

import oracle
from difftrain_kernels import triton_kernels as kernels
from difftrain_kernels.terms import PLAIN, PROBABILITY, Terms
from loss_problems import DTYPES, ROUNDING, SMALLEST, random_problem

# How the gradient is made: with the loss or from its statistics, into its own buffer or over the logits.
WAYS = (
    "from statistics",
    "from statistics, over the logits",
    "with the loss",
    "with the loss, over the logits",
)
# Roundings of one capped logit: tanh to 6, three products.
CAP_ROUNDINGS = 9
EPS = 2.0**-24


PROPERTY = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
CELLS = (0.25, 1.5, 0.75, 0.5, 1.25, 2.0, 1.75, 0.0, 3.0)
WEIGHT_DTYPES = [
    torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
]  # fmt: skip
# Each term, and values that it may have on n rows; tensors on the device are made by `on_device`.
VALUES = {
    "token_weights": lambda draw, n: _token_weights(draw, n),
    "case_weights": lambda draw, n: draw(st.sampled_from([CELLS, torch.tensor(CELLS).view(3, 3)])),
    "gate": lambda draw, n: "probability",
    "softcap": lambda draw, n: draw(st.sampled_from([2.0, 15.0, 50.0])),
    "label_smoothing": lambda draw, n: draw(st.sampled_from([0.1, 0.9])),
    "z_loss": lambda draw, n: draw(st.sampled_from([1e-4, 0.5])),
    "forbid_mask": lambda draw, n: True,
    "logit_scale": lambda draw, n: draw(
        st.sampled_from([0.375, 2.5, torch.tensor(0.375), torch.tensor(1.0)])
    ),
    "rows": lambda draw, n: True,
    "entropy": lambda draw, n: True,
}


def _token_weights(draw, n):
    """(n,) weights, or one for all; zeros and negative ones among them."""
    dtype = draw(st.sampled_from(WEIGHT_DTYPES))
    values = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.5, 0.3]), min_size=n, max_size=n))
    weights = torch.tensor(values, dtype=torch.float64).to(dtype)
    return weights[:1].expand(n) if n and draw(st.booleans()) else weights


def on_device(terms, device):
    tensors = ("token_weights", "case_weights", "logit_scale")
    return Terms(**{
        name: value.to(device) if name in tensors and isinstance(value, torch.Tensor) else value
        for name, value in vars(terms).items()
    })  # fmt: skip


@st.composite
def problems(draw, max_rows, vocab_sizes):
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=2, unique=True))
    n, vocab_size = draw(st.integers(1, max_rows)), draw(vocab_sizes)
    terms = Terms(**{name: VALUES[name](draw, n) for name in names})
    if terms.forbid_mask:
        vocab_size = max(2, vocab_size)
    mask_id = draw(st.sampled_from(sorted({0, vocab_size // 2, vocab_size - 1})))
    # Under a cap an offset, or a spread, would make ties of what differs.
    is_capped = terms.softcap is not None
    logits, y, x = random_problem(
        n, vocab_size, mask_id, draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 2**32 - 1)),
        spread=draw(st.sampled_from([1e-3, 3.0] if is_capped else [1e-3, 3.0, 30.0])),
        offset=0.0 if is_capped else draw(st.sampled_from([0.0, -1e3, 3e4])),
        tie_levels=draw(st.sampled_from([0, 1, 4])),
    )  # fmt: skip
    return {
        "logits": logits, "y": y, "x": x, "mask_id": mask_id, "terms": terms,
        "pk": draw(st.sampled_from([0.0, 0.25, 2.5])), "pm": draw(st.sampled_from([0.5, 1.0])),
        "padding": draw(st.sampled_from([0, 1, 8])), "phase": draw(st.sampled_from([0, 3])),
        "way": draw(st.sampled_from(WAYS)), "upstream": draw(st.sampled_from([1.0, -0.3, 1024.0])),
    }  # fmt: skip


def every_term(n, device):
    """All terms at once; the last row does not count."""
    weights = torch.linspace(0.5, 2.0, n, device=device)
    weights[-1] = 0.0
    return Terms(
        token_weights=weights, case_weights=CELLS, gate="probability", softcap=20.0, label_smoothing=0.1,
        z_loss=0.01, forbid_mask=True, logit_scale=0.75, rows=True, entropy=True,
    )  # fmt: skip


# Launches.


@dataclass
class Found:
    statistics: kernels.RowStatistics
    gradient: torch.Tensor
    sums: tuple[torch.Tensor, ...]  # the case table's


def launch(logits, y, x, mask_id, pk=1.0, pm=1.0, terms=PLAIN, *, way=WAYS[0], upstream=1.0, divisor=1.0):
    """Statistics, gradient of sum(row losses) * upstream / divisor, and sums by case, by the launchers alone."""
    out = logits if way.endswith("over the logits") else None
    if way.startswith("with"):
        statistics, gradient = kernels.launch_loss_and_gradient(
            logits, y, x, mask_id, pk, pm, upstream=upstream, divisor=divisor, terms=terms, gradient_out=out
        )
    else:
        statistics = kernels.launch_loss(logits, y, x, mask_id, pk, pm, terms=terms)
        gradient = kernels.launch_gradient(
            logits, y, statistics, torch.tensor(upstream, device=y.device), divisor=divisor, terms=terms,
            mask_id=mask_id, gradient_out=out,
        )  # fmt: skip
    return Found(statistics, gradient, kernels.launch_case_sums(statistics, terms))


def in_slices(logits, y, x, mask_id, pk, pm, terms, sizes, *, upstream=1.0, divisor=1.0):
    """The same from slices of the vocabulary, each as another device would have it."""
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    slices = [(start, logits[..., start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    messages = torch.stack(
        [kernels.launch_slice(part, y, mask_id, start=start, terms=terms) for start, part in slices]
    )
    statistics = kernels.launch_combine(messages, y, x, mask_id, pk, pm, vocab_size=sum(sizes), terms=terms)
    gradients = [
        kernels.launch_gradient(
            part, y - start, statistics, torch.tensor(upstream, device=y.device), divisor=divisor, terms=terms,
            mask_id=mask_id - start,
        )
        for start, part in slices
    ]  # fmt: skip
    return Found(statistics, torch.cat(gradients, dim=-1), kernels.launch_case_sums(statistics, terms))


def expected_of(logits, y, x, mask_id, pk, pm, terms):
    """The oracle's result; token weights as the kernel sees them, in fp32."""
    weights, scale = terms.token_weights, terms.logit_scale
    return oracle.diffusion_loss(
        logits.double().cpu().reshape(-1, logits.shape[-1]), y.cpu(), x.cpu(), mask_id, float(pk), float(pm),
        token_weights=None if weights is None else weights.cpu().float().double().flatten().numpy(),
        case_weights=None if terms.case_weights is None else np.reshape(
            torch.as_tensor(terms.case_weights, dtype=torch.float32).cpu().double().numpy(), (3, 3)
        ),
        gate=terms.gate, softcap=terms.softcap, label_smoothing=terms.label_smoothing, z_loss=terms.z_loss,
        forbid_mask=terms.forbid_mask, logit_scale=1.0 if scale is None else float(scale),
    )  # fmt: skip


# Budgets.


@dataclass
class Budget:
    """Errors allowed of each row (N,), in fp32: of nll and lse 3e-6, of probabilities 1e-6, and where there
    is a soft cap what its rounding of the logits brings."""

    capped: np.ndarray  # of a difference of two capped logits, and so of a probability's logarithm
    nll: np.ndarray
    lse: np.ndarray
    p: np.ndarray
    weight: np.ndarray  # by case

    @classmethod
    def of(cls, expected, largest, terms):
        capped = 2 * CAP_ROUNDINGS * EPS * largest if terms.softcap else np.zeros_like(largest)
        nll = 3e-6 * np.fmax(1, np.fmax(expected.nll, expected.smooth)) + capped
        lse = 3e-6 * np.fmax(1, np.abs(expected.lse)) + capped
        p = 1e-6 + capped
        weight = np.zeros_like(p)
        if terms.gate == PROBABILITY:
            cells = (
                [1.0]
                if terms.case_weights is None
                else torch.as_tensor(terms.case_weights).flatten().tolist()
            )
            weight = 4 * p * max(1.0, *map(abs, cells))
        return cls(capped, nll, lse, p, weight)


def assert_near_oracle(found, expected, logits, y, mask_id, terms=PLAIN, *, scale=1.0):
    """Cases exactly; columns, gradient and sums within the budget, and one rounding of the gradient.

    ``logits`` are those that were read, ``scale`` what the gradient was multiplied with.
    """
    case = found.statistics.case.cpu().numpy()
    assert np.where(case == 9, -1, case).tolist() == expected.case.tolist()
    p, slope, largest = _softmax(logits, mask_id, terms)
    budget = Budget.of(expected, largest, terms)
    weights = np.ones(len(case))
    if terms.token_weights is not None:
        weights = terms.token_weights.cpu().float().double().flatten().numpy()
    _assert_columns(found.statistics, expected, weights, budget, terms)
    _assert_gradient(found.gradient, expected, y, mask_id, weights, p, slope, budget, terms, scale)
    _assert_sums(found.sums, expected, terms)


def _softmax(logits, mask_id, terms):
    """In fp64: probabilities, slope of the logits, and the largest |z| of each row."""
    scale = 1.0 if terms.logit_scale is None else float(terms.logit_scale)
    z, slope = logits.double().cpu().numpy().reshape(-1, logits.shape[-1]) * scale, np.float64(scale)
    if terms.softcap is not None:
        slope = scale / np.cosh(z / terms.softcap) ** 2
        z = terms.softcap * np.tanh(z / terms.softcap)
    if terms.forbid_mask:
        z[:, mask_id] = -math.inf
    exps = np.exp(z - z.max(1, initial=-math.inf, keepdims=True))
    largest = np.abs(np.where(np.isfinite(z), z, 0.0)).max(1, initial=0.0)
    return exps / exps.sum(1, keepdims=True), np.broadcast_to(slope, z.shape), largest


def _assert_columns(statistics, expected, weights, budget, terms):
    w, counted = np.abs(weights), expected.case >= 0
    z = weights * terms.z_loss * expected.lse**2 if terms.z_loss else np.zeros_like(weights)
    z_error = w * terms.z_loss * 2 * (np.abs(expected.lse) + 1) * budget.lse if terms.z_loss else 0.0
    row_error = (
        w * (np.abs(expected.weight) * budget.nll + budget.weight * np.abs(expected.smooth)) + z_error
    )
    exact = {
        "ROW_LOSS": (expected.row_loss, row_error + EPS * np.abs(expected.row_loss)),
        "NLL": (expected.nll, budget.nll),
        "WEIGHTED": (weights * expected.smooth, w * budget.nll),
        "SMOOTHING": (weights * (expected.smooth - expected.nll), 2 * w * budget.nll),
        "Z": (z, z_error),
        "LSE": (expected.lse, budget.lse),
        "P_MASK": (expected.p_mask, budget.p * np.fmax(expected.p_mask, 1e-3)),
        "CONFIDENCE": (expected.confidence, budget.p),
        "ENTROPY": (expected.entropy, (3e-6 + budget.capped) * (1 + expected.entropy)),
    }
    for name in kernels.columns(terms):
        got = statistics.column(name, terms).double().cpu().numpy()
        assert (got[~counted] == 0).all(), f"{name} of rows that do not count"
        if name in exact:
            value, error = exact[name]
            good = (np.abs(got - value) <= error) | (got == value) | (np.isnan(got) & np.isnan(value))
            assert good[counted].all(), (name, got[counted & ~good], value[counted & ~good])


def _assert_gradient(gradient, expected, y, mask_id, weights, p, slope, budget, terms, scale):
    """What is a difference may err by the size of its parts."""
    n, vocab_size = p.shape
    counted, y = expected.case >= 0, y.cpu().long().numpy()
    weight, words = np.abs(expected.weight), max(1, vocab_size - terms.forbid_mask)
    z_slope = 2 * terms.z_loss * np.abs(expected.lse) if terms.z_loss else np.zeros(n)
    size = (weight + z_slope)[:, None] * p + (weight * terms.label_smoothing / words)[:, None]
    from_weight = np.zeros(n) if not terms.z_loss else 2 * terms.z_loss * budget.lse
    from_weight = from_weight + budget.weight
    error = from_weight[:, None] * (p + terms.label_smoothing / words)
    for i in np.nonzero(counted & (y >= 0) & (y < vocab_size))[0]:
        others = p[i, np.arange(vocab_size) != y[i]].sum()  # 1 - p, but exact
        size[i, y[i]] = (weight[i] + z_slope[i]) * others + z_slope[i] + weight[i] * terms.label_smoothing
        error[i, y[i]] = from_weight[i] * (1.0 if terms.z_loss or terms.label_smoothing else others)
    relative = (1.2e-6 + 2 * budget.capped)[:, None]
    if terms.softcap:  # where tanh is flat its slope is exp(-2a), with the rounding of a
        relative = relative + 8 * EPS * (1 + np.abs(np.log(np.fmax(slope, 1e-30))))
    error += np.maximum(relative * size, 1e-9 * (weight + z_slope)[:, None])
    exact = expected.gradient * scale
    error *= (np.abs(scale * weights))[:, None] * np.fmax(slope, 1e-25)  # of tanh it never is quite 0
    dtype = gradient.dtype
    error += ROUNDING[dtype] * np.abs(exact) + SMALLEST[dtype]

    got = gradient.double().cpu().numpy().reshape(exact.shape)
    assert (got[~counted] == 0).all(), "rows that do not count have gradient exactly 0"
    if terms.forbid_mask:
        assert (got[:, mask_id] == 0).all(), "a forbidden word has gradient exactly 0"
    good = (np.abs(got - exact) <= error) | (got == exact) | (np.isnan(got) & np.isnan(exact))
    good |= np.isinf(got) & (np.abs(exact) > torch.finfo(dtype).max)
    assert good.all(), (np.argwhere(~good)[:3], got[~good][:3], exact[~good][:3], error[~good][:3])


def _assert_sums(sums, expected, terms):
    counts, nll, gap, *more = (part.double().cpu().numpy() for part in sums)
    assert counts.tolist() == expected.counts.tolist()
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(nll, expected.nll_sums, **close)
    np.testing.assert_allclose(gap, expected.gap_sums, **close)
    weighted, smoothing, z = more or (nll, np.zeros((3, 3)), 0.0)
    # A sum of parts of either sign errs by their size, which is not known here.
    size = 1e-5 * (1 + np.abs(expected.row_loss[np.isfinite(expected.row_loss)]).sum())
    np.testing.assert_allclose(weighted, expected.weighted_sums, rtol=2e-5, atol=size)
    # Without smoothing there is nothing to add, to a label outside the vocabulary either.
    exact = expected.smoothing_sums if terms.label_smoothing else np.zeros((3, 3))
    np.testing.assert_allclose(smoothing, exact, rtol=2e-5, atol=size)
    np.testing.assert_allclose(z, expected.z_sum, rtol=2e-5, atol=size)
