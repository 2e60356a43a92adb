"""Problems for the loss from hidden states, what it should give, and what it does on the way."""

import math

import torch

import oracle
from difftrain_kernels import chunks, fused_diffusion_loss, fused_linear_diffusion_loss, weight_sums

MASK_ID = 4


def head_problem(n, vocab_size, dtype=torch.float64, device="cpu", *, width=16, seed=0):
    """hidden (n, D), weight (V, D), bias (V,) that want gradients, and y, x with every kind of position.

    Where [MASK] and the best other word are close, so that rounding could decide which is the
    maximum, the position is ignored.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64) / 4
    hidden[:, -1] = 1.0
    hidden[::2, -1] = -1.0
    weight[MASK_ID, -1] = -4.0
    y = torch.randint(0, vocab_size, (n,), generator=generator)
    x = torch.where(torch.rand(n, generator=generator) < 0.4, MASK_ID, y)
    is_corrupted = torch.rand(n, generator=generator) < 0.25
    x = torch.where(is_corrupted, torch.randint(0, vocab_size, (n,), generator=generator), x)
    y = torch.where(is_corrupted, MASK_ID, y)
    y[3::7] = -1
    hidden, weight, bias = (t.to(dtype) for t in (hidden, weight, bias))
    logits = hidden.double() @ weight.double().t() + bias.double()
    others = logits.clone()
    others[:, MASK_ID] = -math.inf
    y[(logits[:, MASK_ID] - others.amax(1)).abs() < 0.1] = -1
    hidden, weight, bias = (t.to(device).requires_grad_() for t in (hidden, weight, bias))
    return hidden, weight, bias, y.to(device), x.to(device)


def linear_loss(hidden, weight, bias, y, x, **options):
    return fused_linear_diffusion_loss(hidden, weight, y, x, MASK_ID, 0.25, 0.5, bias=bias, **options)


def eager_loss(hidden, weight, bias, y, x, **options):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="reference", **options)


def value_and_gradients(loss_of, problem, upstream=None, **options):
    """The loss and the gradients of hidden, weight and bias."""
    loss = loss_of(*problem, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return loss.detach(), *torch.autograd.grad(loss, problem[:3], upstream)


def oracle_values(problem, reduction, upstream):
    """What :func:`value_and_gradients` should give, in fp64, from the values of the inputs."""
    hidden, weight, bias = (t.detach().double().cpu() for t in problem[:3])
    y, x = (t.cpu() for t in problem[3:])
    expected = oracle.diffusion_loss(hidden @ weight.t() + bias, y, x, MASK_ID, 0.25, 0.5)
    assert (expected.counts.sum(1) > 2).all(), "every kind of position must occur"
    scale = (upstream.double().cpu() / (len(y) if reduction == "mean" else 1)).broadcast_to(len(y))
    gradient = torch.from_numpy(expected.gradient) * scale[:, None]
    rows = torch.from_numpy(expected.row_loss)
    loss = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    return loss, gradient @ weight, gradient.t() @ hidden, gradient.sum(0)


def see_products(monkeypatch, see):
    """Have every matrix product of a gradient seen: ``see(out, a)``."""
    add_product = weight_sums.add_product

    def seen(out, a, *others):
        see(out, a)
        add_product(out, a, *others)

    for module in (chunks, weight_sums):
        monkeypatch.setattr(module, "add_product", seen)


def error(found, expected):
    return (found.double().cpu() - expected).abs().max().item()
