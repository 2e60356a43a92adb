"""Problems for the loss kernels, ways to run them, and how far a result may be from the oracle's."""

import math
from contextlib import contextmanager

import numpy as np
import torch

from difftrain_kernels import fused_diffusion_loss
from difftrain_kernels.triton_kernels import tiles

NAN = math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Unit roundoff, and half of the smallest number.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 1e-38, torch.bfloat16: 1e-38, torch.float16: 2**-25}
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
    choose = tiles.choose_tile
    if family == "streamed":
        tiles.choose_tile = lambda logits: tiles.Tile(warps=1, repeat=2)
    try:
        yield
    finally:
        tiles.choose_tile = choose


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
    loss, cases = fused_diffusion_loss(
        node, y, x, mask_id, pk, pm, return_cases=True, impl="triton", **options
    )
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
    scale = np.broadcast_to(upstream.double().cpu().numpy(), (n,)) / (
        max(n, 1) if reduction == "mean" else 1
    )
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
