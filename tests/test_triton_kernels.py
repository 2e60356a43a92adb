"""Third link of the chain of trust: the Triton kernels against the oracle, on CUDA or interpreted."""

import math
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from difftrain_kernels import fused_diffusion_loss

triton_kernels = pytest.importorskip("difftrain_kernels.triton_kernels")

# numpy warns where hardware computes inf and NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Unit roundoff, and half of the smallest number.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 1e-38, torch.bfloat16: 1e-38, torch.float16: 2**-25}
PROPERTY = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
# Modes of the gradient: (upstream_scale, overwrite_logits); the upstream of the tests is rarely 0.5.
MODES = {
    "in backward": (None, False),
    "in backward, over the logits": (None, True),
    "stated": (0.5, False),
    "stated, over the logits": (0.5, True),
}


@contextmanager
def rows_are(family):
    """Choose how rows are cut: "small", or "streamed" with blocks small enough for short rows."""
    choose = triton_kernels.choose_tile
    if family == "streamed":
        triton_kernels.choose_tile = lambda vocab_size: triton_kernels.Tile(warps=1, repeat=2)
    try:
        yield
    finally:
        triton_kernels.choose_tile = choose


@pytest.fixture(params=["small", "streamed"])
def family(request):
    with rows_are(request.param):
        yield request.param


def random_problem(n, vocab_size, mask_id, dtype, *, seed=0, spread=2.0, offset=0.0, tie_levels=0):
    """Logits (n, V) and labels in which every kind of position and ignored ones occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab_size, generator=generator, dtype=torch.float64) * spread
    logits[::2, mask_id] += 2 * spread
    if tie_levels:
        logits = (logits / spread * tie_levels).round() * spread / tie_levels
    y = torch.randint(0, vocab_size, (n,), generator=generator)
    x = torch.where(torch.rand(n, generator=generator) < 0.4, mask_id, y)
    corrupted = torch.rand(n, generator=generator) < 0.25
    x = torch.where(corrupted, torch.randint(0, vocab_size, (n,), generator=generator), x)
    y = torch.where(corrupted, mask_id, y)
    y[torch.rand(n, generator=generator) < 0.15] = -1
    return (logits + offset).to(dtype), y, x


def strided_copy(rows, *, padding=0, phase=0, fill=NAN):
    """The same rows ``V + padding`` apart, the first ``phase`` elements into a buffer of ``fill``."""
    n, vocab_size = rows.shape
    stride = vocab_size + padding
    buffer = torch.full((phase + n * stride + 64,), fill, dtype=rows.dtype, device=rows.device)
    view = buffer.as_strided((n, vocab_size), (stride, 1), phase)
    view.copy_(rows)
    return view, buffer


def loss_and_gradient(logits, y, x, mask_id, pk=0.25, pm=0.5, *, upstream=None, **options):
    """Loss, gradient and case table; the logits are a node inside the graph, as a model's are."""
    node = logits.detach().requires_grad_().view_as(logits)
    gradients = []
    node.register_hook(gradients.append)
    loss, cases = fused_diffusion_loss(node, y, x, mask_id, pk, pm, return_cases=True, impl="triton", **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), gradients[0], cases


def assert_near_oracle(loss, gradient, cases, expected, upstream, reduction, stated=None):
    """nll to 3e-6, probabilities to 1e-6 or 1e-9, and one rounding of the output.

    Two roundings with ``stated``: what the gradient over the logits was first made for.
    """
    n = len(expected.nll)
    nll_error = 3e-6 * np.maximum(1, expected.nll) * expected.weight
    if reduction == "none":
        assert (np.abs(loss.double().cpu().numpy() - expected.row_loss) <= nll_error).all()
    elif n:
        size = n if reduction == "mean" else 1
        sum_error = 3e-7 * expected.row_loss.sum()
        assert abs(loss.item() - expected.loss(reduction)) <= (nll_error.sum() + sum_error) / size
    scale = np.broadcast_to(upstream.double().cpu().numpy(), (n,)) / (max(n, 1) if reduction == "mean" else 1)
    exact = expected.gradient * scale[:, None]
    weight = np.abs(scale * expected.weight)[:, None]
    rounding, smallest = ROUNDING[gradient.dtype], SMALLEST[gradient.dtype]
    if stated:
        rounding, smallest = 2.1 * rounding, smallest * (1 + np.abs(scale[:, None] / stated) * n)
    # 1e-6 for the probability; its factor is rounded three times more.
    allowed = rounding * np.abs(exact) + np.maximum(1.2e-6 * np.abs(exact), 1e-9 * weight) + smallest
    error = np.abs(gradient.double().cpu().numpy() - exact)
    assert (error <= allowed).all(), np.max(error / allowed)
    assert cases.counts.tolist() == expected.counts.tolist()
    assert cases.n_positions == n
    np.testing.assert_allclose(cases.nll.cpu(), expected.nll_sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cases.gap.cpu(), expected.gap_sums, rtol=1e-6, atol=1e-6)


# Against the oracle -----------------------------------------------------------------------------


@st.composite
def problems(draw, max_rows, vocab_sizes):
    vocab_size = draw(vocab_sizes)
    mask_id = draw(st.sampled_from(sorted({0, vocab_size // 2, vocab_size - 1})) | st.integers(0, vocab_size - 1))
    dtype = draw(st.sampled_from(DTYPES))
    offset = draw(st.sampled_from([0.0, 0.0, -1e3, 3e4]))
    logits, y, x = random_problem(
        draw(st.integers(0, max_rows)), vocab_size, mask_id, dtype,
        seed=draw(st.integers(0, 2**32 - 1)), spread=draw(st.sampled_from([1e-3, 0.5, 3.0, 30.0])),
        offset=offset, tie_levels=draw(st.sampled_from([0, 0, 1, 4])),
    )  # fmt: skip
    return {
        "logits": logits, "y": y.to(draw(st.sampled_from([torch.int64, torch.int32]))), "x": x, "mask_id": mask_id,
        "padding": draw(st.sampled_from([0, 0, 1, 5, 8])), "phase": draw(st.sampled_from([0, 0, 1, 3, 8])),
        "pk": draw(st.sampled_from([0.0, 0.25, 1.0, 2.5])), "pm": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "pk_on_device": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])), "mode": draw(st.sampled_from(list(MODES))),
        "upstream": draw(st.sampled_from([1.0, 0.5, 0.5, -0.3, 0.0, 1024.0])),
    }  # fmt: skip


def check(problem, device):
    logits, buffer = strided_copy(problem["logits"].to(device), padding=problem["padding"], phase=problem["phase"])
    before = buffer.clone()
    y, x = problem["y"].to(device), problem["x"].to(device)
    mask_id, pk, pm, reduction = (problem[key] for key in ("mask_id", "pk", "pm", "reduction"))
    expected = oracle.diffusion_loss(problem["logits"].double(), problem["y"], problem["x"], mask_id, pk, pm)
    stated, overwrite = MODES[problem["mode"]]
    upstream = torch.full(y.shape if reduction == "none" else (), problem["upstream"], device=device)
    if reduction == "none":
        upstream[::2] = 0.5  # so that some rows meet the statement and some do not
    loss, gradient, cases = loss_and_gradient(
        logits, y, x, mask_id, torch.tensor(pk, device=device) if problem["pk_on_device"] else pk, pm,
        reduction=reduction, upstream=upstream, upstream_scale=stated, overwrite_logits=overwrite,
    )  # fmt: skip
    assert_near_oracle(
        loss, gradient, cases, expected, upstream, reduction, stated=stated if overwrite else None
    )
    if overwrite:
        between = torch.ones_like(buffer, dtype=torch.bool)
        between.as_strided(logits.shape, logits.stride(), problem["phase"]).fill_(False)
        assert buffer[between].isnan().all(), "nothing outside the rows is written"
        assert gradient.data_ptr() == logits.data_ptr()
    else:
        assert torch.equal(buffer.nan_to_num(7), before.nan_to_num(7)), "the logits are not modified"


@settings(max_examples=700, **PROPERTY)
@given(problem=problems(8, st.integers(1, 300) | st.sampled_from([1, 2, 63, 64, 65, 128, 129])))
def test_small_rows_match_the_oracle(problem, device):
    with rows_are("small"):
        check(problem, device)


@settings(max_examples=400, **PROPERTY)
@given(problem=problems(3, st.integers(1, 1600) | st.sampled_from([255, 256, 257, 511, 512, 513, 1023, 1024, 1025])))
def test_streamed_rows_match_the_oracle(problem, device):
    with rows_are("streamed"):
        check(problem, device)
