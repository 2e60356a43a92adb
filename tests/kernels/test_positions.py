"""Positions that do not count, in the loss from hidden states: left out of its matrix products where their number is known."""

import importlib.util
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from difftrain_kernels import chunks, fused_linear_diffusion_loss
from difftrain_kernels.positions import TILE_ROWS, choose_positions
from head_problems import MASK_ID, head_problem, linear_loss, value_and_gradients

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

IMPLS = ["reference", "triton"] if importlib.util.find_spec("triton") else ["reference"]
BOTH = pytest.mark.parametrize("impl", IMPLS)
NEEDS_TRITON = pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
N, V = 200, 20


def half_ignored(device, dtype=torch.float32, n=N):
    """A problem of which about half of the positions do not count, and hold NaN; and how many do."""
    hidden, weight, bias, y, x = head_problem(n, V, dtype, device)
    generator = torch.Generator().manual_seed(3)
    y[(torch.rand(n, generator=generator) < 0.45).to(device)] = -1
    hidden = hidden.detach().masked_fill((y == -1)[:, None], math.nan).requires_grad_()
    return (hidden, weight, bias, y, x), int((y != -1).sum())


def gemm_flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_of_the_positions_cost_about_half_of_the_products(impl, reduction, device):
    hidden, weight, bias, y, x = head_problem(512, 24, torch.float32, device)
    y = y.clamp(min=0)
    everything = gemm_flops(
        lambda: value_and_gradients(
            linear_loss, (hidden, weight, bias, y, x), impl=impl, reduction=reduction
        )
    )
    y[::2] = -1
    half = gemm_flops(
        lambda: value_and_gradients(
            linear_loss, (hidden, weight, bias, y, x), impl=impl, reduction=reduction, counted=256
        )
    )
    products = 3 if reduction == "mean" else 4
    assert everything == products * 2 * 512 * 16 * 24
    assert half <= 0.55 * everything


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spare", [0, 1000], ids=["exact", "more than there are"])
def test_a_stated_number_changes_no_value(impl, reduction, spare, device):
    problem, counted = half_ignored(device)
    assert 64 < counted < 128
    options = {"impl": impl, "reduction": reduction, "chunk_tokens": 64, "return_cases": True}
    expected, expected_cases = linear_loss(*problem, **options)
    loss, cases = linear_loss(*problem, counted=counted + spare, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(cases.counts, expected_cases.counts)
    assert cases.n_positions == N
    torch.testing.assert_close(cases.nll, expected_cases.nll, rtol=1e-5, atol=1e-6)
    upstream = torch.rand_like(loss)
    found = torch.autograd.grad(loss, problem[:3], upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, problem[:3], upstream)
    for again in (found, torch.autograd.grad(loss, problem[:3], upstream)):
        for a, b in zip(again, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert again[0][problem[3] == -1].eq(0).all()


@BOTH
def test_positions_of_weight_zero_are_left_out_too(impl, device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.float32, device)
    is_masked = torch.arange(N, device=device) % 2 == 0
    weights = torch.where(is_masked, 2.0, 0.0).view(2, 100)
    hidden = hidden.detach().masked_fill(~is_masked[:, None], math.nan).view(2, 100, -1).requires_grad_()
    problem = (hidden, weight, bias, y.view(2, 100), x.view(2, 100))
    options = {"impl": impl, "token_weights": weights, "normalizer": 7.0}
    expected = value_and_gradients(linear_loss, problem, **options)
    found = value_and_gradients(linear_loss, problem, counted=100, **options)
    assert found[0].isfinite()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BOTH
def test_states_and_weights_of_any_layout_are_gathered(impl, device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.float32, device)
    y[::2] = -1
    rows = torch.rand(100, device=device)
    wide = torch.zeros(2, 120, 16, device=device)
    wide[:, 20:] = hidden.detach().view(2, 100, 16)
    views = (wide[:, 20:].requires_grad_(), weight, bias, y.view(2, 100), x.view(2, 100))
    options = {"impl": impl, "token_weights": rows, "counted": 100, "chunk_tokens": 60}
    found = value_and_gradients(linear_loss, views, **options)
    expected = value_and_gradients(
        linear_loss, (hidden, weight, bias, y, x), impl=impl, token_weights=rows.repeat(2)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-4, atol=1e-6)


@NEEDS_TRITON
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_too_small_a_number_makes_everything_nan(reduction, device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.bfloat16, device)
    n_counted = int((y != -1).sum())
    assert n_counted > 128  # what is stated fills one tile
    options = {"impl": "triton", "reduction": reduction, "return_cases": True}
    # Whatever the weights are, one of 0 too.
    for pk in (0.25, 0.0):
        loss, cases = fused_linear_diffusion_loss(
            hidden, weight, y, x, MASK_ID, pk, 0.0, bias=bias, counted=100, **options
        )
        assert loss.isnan().any()
        assert loss.isnan().all() or reduction == "none"
        if reduction == "none":
            assert loss[y != -1][128:].isnan().all()
        assert cases.loss_at(1.0, 1.0).isnan()
        of_hidden, *others = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert of_hidden.isnan().any()
        assert all(g.isnan().all() for g in others)
    with pytest.raises(ValueError, match=f"counted must be at least {n_counted}, .* got 100"):
        linear_loss(hidden, weight, bias, y, x, counted=100, check_labels=True, **options)


def test_where_the_host_may_look_too_small_a_number_raises():
    problem = head_problem(N, V, torch.float32)
    with pytest.raises(ValueError, match="counted must be at least [0-9]+, as many positions count, got 3"):
        linear_loss(*problem, impl="reference", counted=3)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_nothing_counts_all_is_zero(impl, reduction, device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.float32, device)
    y[:] = -1
    found = value_and_gradients(
        linear_loss, (hidden, weight, bias, y, x), impl=impl, reduction=reduction, counted=0
    )
    assert all(value.eq(0).all() for value in found)


def test_positions_that_count_come_first_and_in_order(device):
    generator = torch.Generator().manual_seed(0)
    is_left_out = (torch.rand(500, generator=generator) < 0.5).to(device)
    n_counted = int((~is_left_out).sum())
    taken = choose_positions(is_left_out, n_counted, may_look=False)
    assert len(taken.index) == -(-n_counted // 128) * 128
    assert torch.equal(taken.index[:n_counted], (~is_left_out).nonzero().squeeze(1))
    assert torch.equal(taken.is_left_out, is_left_out[taken.index])
    assert len(taken.index.unique()) == len(taken.index)
    assert taken.poison() == 0


@NEEDS_TRITON
def test_numbers_that_fill_the_same_tiles_give_the_same_bits(device):
    problem, counted = half_ignored(device, torch.bfloat16)
    first = value_and_gradients(linear_loss, problem, impl="triton", counted=counted)
    for number in (counted + 1, 128):
        again = value_and_gradients(linear_loss, problem, impl="triton", counted=number)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@BOTH
def test_a_changing_number_is_compiled_twice_at_most(impl, device, monkeypatch):
    problem, counted = half_ignored(device)
    graphs, multiplied, product = [], [], chunks.product
    monkeypatch.setattr(
        chunks, "product", lambda states, *a: multiplied.append(len(states)) or product(states, *a)
    )

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    penalties = [torch.tensor(p, device=device) for p in (0.25, 0.5)]

    def loss_of(problem, counted, pk, pm):
        hidden, weight, bias, y, x = problem
        return fused_linear_diffusion_loss(
            hidden, weight, y, x, MASK_ID, pk, pm, bias=bias, impl=impl, counted=counted
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend=count)
    for spare in (0, 3, 1):
        multiplied.clear()
        loss = compiled(problem, counted + spare, *penalties)
        if impl == "triton":  # the reference looks for itself
            assert sum(multiplied) == TILE_ROWS < N
        expected = loss_of(problem, counted + spare, *penalties)
        assert torch.equal(loss, expected)
        found = torch.autograd.grad(loss, problem[:3])
        for a, b in zip(found, torch.autograd.grad(expected, problem[:3]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("counted", "error", "message"),
    [
        (-1, ValueError, "counted must be >= 0, got -1"),
        (2.0, TypeError, "counted must be an int, got float"),
        (True, TypeError, "counted must be an int, got bool"),
    ],
)
def test_what_is_no_number_of_positions_is_refused(counted, error, message):
    with pytest.raises(error, match=message):
        linear_loss(*head_problem(20, V, torch.float32), counted=counted)
