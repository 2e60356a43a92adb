"""The loss from hidden states, chunk by chunk, against the oracle and the loss from logits."""

import importlib.util
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from difftrain_kernels import chunks, fused_diffusion_loss, fused_linear_diffusion_loss, small_vocabulary
from head_problems import (
    MASK_ID,
    eager_loss,
    error,
    head_problem,
    linear_loss,
    oracle_values,
    see_products,
    value_and_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

KERNELS = Path(chunks.__file__).parent.parent
IMPLS = ["reference", "triton"] if importlib.util.find_spec("triton") else ["reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def by_steps(monkeypatch):
    """Heads of few words go the way of many; their own has a file of its own."""
    monkeypatch.setattr(small_vocabulary, "MOST_WORDS", 0)


# Values and gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("impl", "rows", "n", "vocab_size", "chunk"),
    [
        pytest.param("reference", "", 301, 700, 64, id="reference"),
        pytest.param("triton", "small", 60, 50, 16, id="triton, small rows"),
        pytest.param("triton", "streamed", 36, 301, 16, id="triton, streamed rows of odd length"),
    ],
)
def test_errors_are_at_most_twice_those_of_eager(
    impl, rows, n, vocab_size, chunk, dtype, reduction, device, monkeypatch
):
    if impl not in IMPLS:
        pytest.skip("needs triton")
    if rows == "streamed":
        if reduction != "mean":
            pytest.skip("rows are cut the same way for each reduction")
        from difftrain_kernels.triton_kernels import tiles

        tile = tiles.Tile(warps=1, repeat=2)
        monkeypatch.setattr(tiles, "choose_tile", lambda logits: tile)
    problem = head_problem(n, vocab_size, dtype, device)
    upstream = torch.rand(n, device=device) if reduction == "none" else torch.tensor(0.3, device=device)
    found = value_and_gradients(
        linear_loss, problem, upstream, reduction=reduction, impl=impl, chunk_tokens=chunk
    )
    eager = value_and_gradients(eager_loss, problem, upstream, reduction=reduction)
    expected = oracle_values(problem, reduction, upstream)
    assert found[0].dtype == torch.float32
    for ours, theirs, exact in zip(found, eager, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        floor = torch.finfo(ours.dtype).eps * exact.abs().max().item()
        assert error(ours, exact) <= 2 * error(theirs, exact) + floor


@BOTH
@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])  # the least, not a divisor, N itself, more than N
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_chunk_size_gives_the_same(impl, chunk, reduction, device):
    dtype = torch.float64 if impl == "reference" else torch.float32
    problem = head_problem(24, 23, dtype, device)
    options = {"reduction": reduction, "return_cases": True}
    loss, cases = linear_loss(*problem, impl=impl, chunk_tokens=chunk, **options)
    expected, expected_cases = eager_loss(*problem, **options)
    upstream = torch.rand_like(loss)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if impl == "reference" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, expected, **tolerance)
    for found, wanted in zip(
        torch.autograd.grad(loss, problem[:3], upstream),
        torch.autograd.grad(expected, problem[:3], upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, **tolerance)
    assert torch.equal(cases.counts, expected_cases.counts)
    assert cases.n_positions == 24
    torch.testing.assert_close(cases.nll, expected_cases.nll, **tolerance)
    torch.testing.assert_close(cases.gap, expected_cases.gap, **tolerance)


@BOTH
def test_no_positions_give_nan_mean_zero_sum_and_zero_gradients(impl, device):
    problem = head_problem(5, 9, torch.float32, device)
    empty = (problem[0][:0].detach().requires_grad_(), *problem[1:3], problem[3][:0], problem[4][:0])
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        loss, cases = linear_loss(*empty, impl=impl, reduction=reduction, return_cases=True)
        assert loss.item() == pytest.approx(value, nan_ok=True)
        gradients = torch.autograd.grad(loss, empty[:3])
        assert [g.shape for g in gradients] == [t.shape for t in empty[:3]]
        assert all(g.eq(0).all() for g in gradients)
        assert cases.counts.sum() == 0
    assert linear_loss(*empty, impl=impl, reduction="none").shape == (0,)


def test_fp32_accumulation_beats_bf16_accumulation(device):
    n, chunk = 1024, 8
    hidden, weight, bias, y, x = head_problem(n, 60, torch.bfloat16, device)
    hidden = hidden.detach().abs().requires_grad_()
    problem = (hidden, weight, bias, y, x)
    logits = torch.nn.functional.linear(hidden, weight, bias).detach()
    exact = oracle.diffusion_loss(logits.double().cpu(), y.cpu(), x.cpu(), MASK_ID, 0.25, 0.5).gradient
    exact = torch.from_numpy(exact).t() @ hidden.detach().double().cpu()
    ours = value_and_gradients(linear_loss, problem, reduction="sum", chunk_tokens=chunk)[2]
    logits.requires_grad_()
    rows = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="reference", reduction="sum")
    (gradient,) = torch.autograd.grad(rows, logits)
    narrow = torch.zeros_like(weight)
    for part, states in zip(gradient.split(chunk), hidden.detach().split(chunk), strict=True):
        narrow += (part.t().float() @ states.float()).bfloat16()
    assert error(ours, exact) < error(narrow, exact) / 4


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_weights_and_table_are_those_of_the_logits(impl, dtype, with_bias, device):
    # Small integers: every product and sum is exact in any order, and maxima are tied in most rows.
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randint(-1, 2, (n, 8), generator=generator).to(device, dtype) for n in (90, 12))
    bias = torch.randint(-1, 2, (12,), generator=generator).to(device, dtype) if with_bias else None
    y, x = head_problem(90, 12, device=device)[3:]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    assert (logits.eq(logits.amax(1, keepdim=True)).sum(1) > 1).sum() > 20
    options = {"impl": impl, "reduction": "none", "return_cases": True}
    expected, expected_cases = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, **options)
    found, cases = linear_loss(hidden, weight, bias, y, x, chunk_tokens=32, **options)
    # The reference of logits is recorded by autograd, that of chunks is stepwise: equal up to roundings.
    torch.testing.assert_close(found, expected, rtol=1e-6 if impl == "reference" else 0, atol=0)
    assert torch.equal(cases.counts, expected_cases.counts)
    assert (cases.counts[:, 0] > 0).all()
    torch.testing.assert_close(cases.nll, expected_cases.nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(cases.gap, expected_cases.gap, rtol=1e-6, atol=0)
    assert cases.loss_at(0.25, 0.5).item() == pytest.approx(expected.mean().item(), rel=1e-6)


@BOTH
def test_hidden_of_any_shape_and_stride(impl, device):
    problem = head_problem(24, 20, torch.float32, device)
    hidden, weight, bias, y, x = problem
    expected = value_and_gradients(linear_loss, problem, impl=impl)
    turned = hidden.detach().view(4, 6, -1).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    columns = weight.detach().t().contiguous().t().requires_grad_()
    shaped = (turned, columns, bias, y.view(4, 6).int(), x.view(4, 6))
    found = value_and_gradients(linear_loss, shaped, impl=impl, chunk_tokens=5)
    assert found[1].shape == (4, 6, 16)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-7)
    rows = linear_loss(*shaped, impl=impl, reduction="none")
    assert rows.shape == (4, 6)


# Positions that do not count ----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_an_ignored_position_holds_reaches_no_gradient(impl, reduction, device):
    hidden, weight, bias, y, x = head_problem(40, 20, torch.float32, device)
    y[:8] = -1  # one whole chunk
    plain = value_and_gradients(
        linear_loss, (hidden, weight, bias, y, x), impl=impl, reduction=reduction, chunk_tokens=8
    )
    poisoned = hidden.detach().clone()
    poisoned[y == -1] = math.nan
    poisoned = (poisoned.requires_grad_(), weight, bias, y, x)
    found = value_and_gradients(linear_loss, poisoned, impl=impl, reduction=reduction, chunk_tokens=8)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert found[1][y == -1].eq(0).all()


@pytest.mark.parametrize("why", ["ignored", "weight 0"])
def test_positions_without_gradient_do_no_products_on_the_cpu(why, monkeypatch):
    hidden, weight, bias, y, x = head_problem(40, 20)
    if why == "ignored":
        pk, pm = 0.25, 0.5
        y[:] = torch.where(torch.arange(40) % 5 == 0, y.clamp(min=0), -1)
        is_live = y != -1
    else:
        pk, pm = 0.0, 0.0
        says_mask = torch.nn.functional.linear(hidden, weight, bias).argmax(1) == MASK_ID
        x = torch.where(torch.arange(40) % 2 == 0, MASK_ID, y)
        is_live = (y != -1) & ~(says_mask & (x == MASK_ID) & (y != MASK_ID))
        is_live &= ~(says_mask & (x == y) & (x != MASK_ID))
    sizes = []
    see_products(monkeypatch, lambda out, a: sizes.append(a.shape[0] if out.shape[0] != 20 else a.shape[1]))
    loss = fused_linear_diffusion_loss(hidden, weight, y, x, MASK_ID, pk, pm, bias=bias, chunk_tokens=10)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    live = [int(part.sum()) for part in is_live[y != -1].split(10)]  # ignored ones are in no chunk
    assert 0 < sum(live) < 30
    assert sizes == [size for count in live for size in (count, count)]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = fused_diffusion_loss(logits, y, x, MASK_ID, pk, pm)
    for a, b in zip(gradients, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


@BOTH
def test_a_label_outside_the_vocabulary_poisons_its_own_loss_or_raises_when_checked(impl, device):
    problem = head_problem(12, 20, torch.float32, device)
    problem[3][5] = 20
    rows = linear_loss(*problem, impl=impl, reduction="none", chunk_tokens=4)
    assert rows.isnan().nonzero().tolist() == [[5]]
    with pytest.raises(ValueError, match=r"y must be in \[0, 20\) .* got 20 at position \(5,\)"):
        linear_loss(*problem, impl=impl, check_labels=True)


# What is computed, and what is not ----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("wanted", list(product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs_cost_no_gradient(impl, wanted, reduction, monkeypatch, device):
    problem = head_problem(20, 18, torch.float32, device)
    expected = value_and_gradients(linear_loss, problem, impl=impl, reduction=reduction)[1:]
    inputs = [t.detach().requires_grad_(want) for t, want in zip(problem[:3], wanted, strict=True)]
    made, parts = [], []
    see_products(monkeypatch, lambda out, a: made.append(out.shape))
    parts_of = chunks._Gradients.parts
    monkeypatch.setattr(chunks._Gradients, "parts", lambda g: parts.extend(parts_of(g)) or parts_of(g))
    linear_loss(*inputs, *problem[3:], impl=impl, reduction=reduction).sum().backward()
    assert len(made) == wanted[0] + wanted[1]
    assert tuple(part is not None for part in parts) == wanted
    for tensor, want, gradient in zip(inputs, wanted, expected, strict=True):
        if want:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-6, atol=1e-9)
        else:
            assert tensor.grad is None


@BOTH
def test_without_gradients_only_the_loss_is_computed(impl, monkeypatch, device):
    problem = head_problem(20, 18, torch.float32, device)
    loss, cases = linear_loss(*problem, impl=impl, return_cases=True)

    def forbidden(*_):
        raise AssertionError("a gradient was begun")

    monkeypatch.setattr(chunks, "_Gradients", forbidden)
    with torch.no_grad():
        quiet, quiet_cases = linear_loss(*problem, impl=impl, return_cases=True)
    detached = linear_loss(*(t.detach() for t in problem), impl=impl)
    assert not quiet.requires_grad
    assert torch.equal(quiet, loss)
    assert torch.equal(detached, loss)
    assert torch.equal(quiet_cases.nll, cases.nll)


class _LargestTensor(TorchDispatchMode):
    """The size of the largest result that any operation had."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(impl, reduction, device):
    n, vocab_size, chunk = 96, 301, 8
    problem = head_problem(n, vocab_size, torch.float32, device, width=4)
    with _LargestTensor() as largest:
        value_and_gradients(linear_loss, problem, impl=impl, reduction=reduction, chunk_tokens=chunk)
    assert largest.nbytes <= chunk * 304 * 4  # rows padded to 16 bytes


MEASURE_PEAKS = """
import os, sys, torch
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss
torch.set_num_threads(1)

def step(name, n, vocab_size=8192):
    hidden, weight = torch.randn(n, 32, requires_grad=True), torch.randn(vocab_size, 32, requires_grad=True)
    y = torch.randint(0, vocab_size, (n,))
    if name == "linear":
        loss = fused_linear_diffusion_loss(hidden, weight, y, y, 3, 0.5, 0.5, workspace_mib=8)
    else:
        loss = fused_diffusion_loss(hidden @ weight.t(), y, y, 3, 0.5, 0.5)
    loss.backward()

def peak_kib():  # not ru_maxrss, which begins at the parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

step("linear", 64)
for run in sys.argv[1:]:
    name, n = run.split()
    if os.fork():  # a child's peak begins at what its parent holds
        _, status = os.wait()
        assert status == 0
    else:
        step(name, 64)
        before = peak_kib()
        step(name, int(n))
        print((peak_kib() - before) / 1024, flush=True)
        os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_positions_times_vocabulary():
    # Each in a fork of its own, above what 64 positions need. Freed memory goes back to the system at once, so
    # that the peak is of what is in use.
    # Without CUDA, with which autograd has threads that no fork takes along.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "PYTHONPATH": str(KERNELS),
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAKS, "logits 512", "linear 512", "linear 2048"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # 8192 logits in fp32 are 32 KiB a position: 16 MiB for 512 of them, 64 MiB for 2048.
    whole, small, large = map(float, result.stdout.split())
    assert whole > 24, "logits and their gradient: the measurement sees what it should"
    assert small < 12
    assert large < small + 4


# Upstream gradients, autograd ---------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stated", [None, 1 / 3, -2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_upstream_gradient_stated_or_not(impl, dtype, stated, reduction, device):
    problem = head_problem(20, 18, dtype, device)
    ones = value_and_gradients(linear_loss, problem, impl=impl, reduction=reduction)[1:]
    for value in (1.0, 1 / 3, 0.0, -7.0):
        upstream = torch.full((20,) if reduction == "none" else (), value, device=device)
        found = value_and_gradients(
            linear_loss, problem, upstream, impl=impl, reduction=reduction, upstream_scale=stated
        )[1:]
        if reduction == "none":
            unstated = value_and_gradients(linear_loss, problem, upstream, impl=impl, reduction=reduction)
            assert all(torch.equal(a, b) for a, b in zip(found, unstated[1:], strict=True))
        tolerance = 4 * torch.finfo(dtype).eps
        for a, b in zip(found, ones, strict=True):
            atol = abs(value) * tolerance * b.abs().max().item()
            torch.testing.assert_close(a, b * value, rtol=tolerance, atol=atol)


@BOTH
def test_fp16_gradients_survive_division_before_the_loss_scale(impl, device):
    n = 1024
    problem = head_problem(n, 40, torch.float16, device)
    problem[0].data.mul_(256)  # the logits stay, the gradient of hidden gets as small as in training
    problem[1].data.mul_(1 / 256)
    upstream = torch.tensor(2.0**9, device=device)
    found = value_and_gradients(linear_loss, problem, upstream, impl=impl)
    expected = oracle_values(problem, "mean", upstream)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert error(a, b) <= 1.2e-3 * b.abs().max().item()


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_backward_gives_its_own_gradient(impl, reduction, device):
    hidden, weight, bias, y, x = head_problem(20, 18, torch.bfloat16, device)
    # Made in forward or made again: the same penalties count, whatever became of the tensors.
    pk, pm = torch.tensor(0.25, device=device), torch.tensor(0.5, device=device)
    loss = fused_linear_diffusion_loss(
        hidden, weight, y, x, MASK_ID, pk, pm, bias=bias, impl=impl, reduction=reduction, chunk_tokens=8
    )
    pk.fill_(0.9)
    pm.fill_(0.9)
    for value in (1.0, 1.0, 3.0):
        upstream = torch.full_like(loss, value)
        found = torch.autograd.grad(loss, (hidden, weight, bias), upstream, retain_graph=True)
        fresh = value_and_gradients(
            linear_loss, (hidden, weight, bias, y, x), upstream,
            impl=impl, reduction=reduction, chunk_tokens=8,
        )[1:]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))
    loss.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.sum().backward()


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(impl, reduction, device):
    problem = head_problem(20, 18, torch.float32, device)
    loss = linear_loss(*problem, impl=impl, reduction=reduction).sum()
    gradients = torch.autograd.grad(loss, problem[:3], create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="have no second derivative"):
            gradient.sum().backward(retain_graph=True)


@BOTH
def test_changed_inputs_matter_only_where_they_are_read_again(impl, device):
    problem = head_problem(20, 18, torch.float32, device)
    expected = value_and_gradients(linear_loss, problem, impl=impl)[1:]
    loss = linear_loss(*problem, impl=impl)
    again = linear_loss(*problem, impl=impl, reduction="none").sum()
    with torch.no_grad():
        problem[1].mul_(2)
    found = torch.autograd.grad(loss, problem[:3], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for changed in (loss, again):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.backward(retain_graph=True)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_checkpointing_gives_the_same_bits(impl, reduction, device):
    problem = head_problem(20, 18, torch.float32, device)
    expected = value_and_gradients(linear_loss, problem, impl=impl, reduction=reduction, chunk_tokens=8)
    loss = torch.utils.checkpoint.checkpoint(
        lambda hidden: linear_loss(
            hidden * 1, *problem[1:], impl=impl, reduction=reduction, chunk_tokens=8
        ),
        problem[0],
        use_reentrant=False,
    )
    found = torch.autograd.grad(loss.sum(), problem[:3])
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


@BOTH
def test_tied_embedding_gets_both_gradients(impl, device):
    weight = head_problem(1, 30, torch.float32, device)[1]
    y, x = head_problem(24, 30, device=device)[3:]

    def gradient(loss_of):
        hidden = torch.tanh(torch.nn.functional.embedding(x, weight))
        return torch.autograd.grad(loss_of(hidden, weight, None, y, x), weight)[0]

    found = gradient(lambda *a: linear_loss(*a, impl=impl, chunk_tokens=7))
    torch.testing.assert_close(found, gradient(eager_loss), rtol=1e-5, atol=1e-7)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", ["autocast's", "fp32"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_in_its_dtype_and_returns_the_parameters(
    impl, dtype, hidden_dtype, reduction, device
):
    narrow = head_problem(60, 50, dtype, device)
    hidden = narrow[0].detach() if hidden_dtype == "autocast's" else narrow[0].detach().float()
    problem = (
        hidden.requires_grad_(),
        *(t.detach().float().requires_grad_() for t in narrow[1:3]),
        *narrow[3:],
    )
    expected = value_and_gradients(linear_loss, narrow, impl=impl, reduction=reduction)
    with torch.autocast(device.type, dtype=dtype):
        found = value_and_gradients(linear_loss, problem, impl=impl, reduction=reduction)
    assert torch.equal(found[0], expected[0])
    assert [g.dtype for g in found[1:]] == [t.dtype for t in problem[:3]]
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.to(dtype), b, rtol=torch.finfo(dtype).eps, atol=1e-7)
    exact = oracle_values(narrow, reduction, torch.tensor(1.0))
    # The weight's gradient keeps fp32: only the gradient of the logits was rounded.
    assert not any(torch.equal(g, g.to(dtype).float()) for g in found[2:])
    assert error(found[2], exact[2]) <= 4 * torch.finfo(dtype).eps * exact[2].abs().max().item()


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_step_waits_for_the_device(reduction, monkeypatch, device):
    problem = head_problem(20, 18, torch.bfloat16, device)
    options = {"impl": "triton", "reduction": reduction, "chunk_tokens": 8, "return_cases": True}

    def step():
        loss, _ = linear_loss(*problem, **options)
        for _ in range(2):
            torch.autograd.grad(loss, problem[:3], torch.full_like(loss, 0.3), retain_graph=True)

    def waits(*_):
        raise AssertionError("a value was read back to the host")

    step()  # compiled and warm
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in ("item", "tolist", "nonzero", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, waits)
    try:
        step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@BOTH
def test_repeats_give_equal_bits(impl, device):
    problem = head_problem(20, 18, torch.bfloat16, device)
    first = value_and_gradients(linear_loss, problem, impl=impl, chunk_tokens=8)
    for _ in range(5):
        again = value_and_gradients(linear_loss, problem, impl=impl, chunk_tokens=8)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# Chunk sizes and arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "uses_triton", "rows"),
    [
        pytest.param(50304, torch.bfloat16, True, 2560, id="257 MB at the head of a small model"),
        pytest.param(128256, torch.bfloat16, True, 1024, id="the largest V with at least 1024"),
        pytest.param(16000, torch.bfloat16, True, 4096, id="never more than 4096"),
        pytest.param(50304, torch.float32, False, 256, id="eager makes three more rows"),
        pytest.param(2**31, torch.bfloat16, True, 1, id="at least one"),
    ],
)
def test_chunks_fill_the_budget(vocab_size, dtype, uses_triton, rows):
    size = chunks.row_bytes(vocab_size, dtype, uses_triton)
    chosen = chunks.choose_chunk_tokens(10**9, size, chunks.DEFAULT_WORKSPACE_MIB)
    assert chosen == rows
    if chosen > 1:
        assert chosen * size <= chunks.DEFAULT_WORKSPACE_MIB * 2**20


def test_chunks_of_one_call_are_about_equal():
    # 8192 in chunks of at most 2560: four of 2048, not three and a rest of 512.
    size = chunks.row_bytes(50304, torch.bfloat16, True)
    assert chunks.choose_chunk_tokens(8192, size, 256) == 2048
    for n in (0, 1, 127, 129, 1000, 5000):
        chosen = chunks.choose_chunk_tokens(n, size, 256)
        assert 128 <= chosen <= 2560
        assert -(-n // chosen) == -(-n // 2560)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(4, 6, dtype=torch.int64)}, ValueError, "hidden must have dtype .*int64"),
        ({"hidden": torch.zeros(4, 0)}, ValueError, r"hidden must have shape \(..., D\) .* got \(4, 0\)"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight must have shape \(V, 6\) .* got \(9, 5\)"),
        ({"weight": torch.zeros(0, 6)}, ValueError, r"weight must have shape .* V >= 1, got \(0, 6\)"),
        ({"weight": torch.zeros(9, 6).double()}, ValueError, "hidden's dtype torch.float32, got torch.float64"),
        ({"weight": torch.zeros(9, 6, device="meta")}, ValueError, "weight must be on device cpu, got meta"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(9,\), got \(8,\)"),
        ({"bias": torch.zeros(9).half()}, ValueError, "bias must have hidden's dtype .* got torch.float16"),
        ({"y": torch.zeros(5).long()}, ValueError, r"y must have shape \(4,\), got \(5,\)"),
        ({"mask_id": 9}, ValueError, r"mask_id must be in \[0, 9\), got 9"),
        ({"pk": -1.0}, ValueError, "pk must be finite and >= 0, got -1.0"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, reference, got 'cuda'"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be finite and > 0, got 0"),
        ({"chunk_tokens": 2.0}, TypeError, "chunk_tokens must be an int, got float"),
        ({"workspace_mib": math.inf}, ValueError, "workspace_mib must be finite and > 0, got inf"),
        ({"workspace_mib": "1"}, TypeError, "workspace_mib must be a number, got str"),
        ({"upstream_scale": 0}, ValueError, "upstream_scale must be finite, not 0 and within fp32, got 0"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_with_expected_and_got(changes, error, message):
    arguments = {
        "hidden": torch.zeros(4, 6), "weight": torch.zeros(9, 6), "y": torch.zeros(4).long(),
        "x": torch.zeros(4).long(), "mask_id": 8, "pk": 0.25, "pm": 0.5,
    } | changes  # fmt: skip
    with pytest.raises(error, match=message) as caught:
        fused_linear_diffusion_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_dtypes_may_differ_under_autocast_alone():
    problem = head_problem(4, 9, torch.float32)
    mixed = (problem[0].bfloat16(), *problem[1:])
    with pytest.raises(
        ValueError, match=r"weight must have hidden's dtype torch.bfloat16, got torch.float32"
    ):
        linear_loss(*mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_loss(*mixed).isfinite()
        with pytest.raises(ValueError, match=r"weight must have hidden's dtype torch.float64"):
            linear_loss(problem[0].double(), *problem[1:])
