"""The public loss on the Triton kernels: modes of the gradient, autograd, choice of implementation."""

import math
import sys

import pytest
import torch

from difftrain_kernels import fused_diffusion_loss, implementation, triton_kernels
from loss_problems import MODES, loss_and_gradient, random_problem, rows_are

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MASK_ID = 4


@pytest.fixture
def problem(device):
    logits, y, x = random_problem(9, 66, MASK_ID, torch.bfloat16)
    return logits.to(device), y.to(device), x.to(device)


def kernel_loss(logits, y, x, **options):
    return fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="triton", **options)


def gradient_of(problem, upstream, **options):
    logits, y, x = problem
    return loss_and_gradient(logits.clone(), y, x, MASK_ID, upstream=upstream, **options)[1]


# Modes of the gradient.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("stated", [1.0, 0.25, 1 / 3, -2.0])
@pytest.mark.parametrize("met", [True, False], ids=["met", "not met"])
def test_a_stated_upstream_gives_the_bits_of_the_default(problem, reduction, stated, met, device):
    value = stated if met else stated * 1.7
    upstream = torch.full(problem[1].shape if reduction == "none" else (), value, device=device)
    default = gradient_of(problem, upstream, reduction=reduction)
    assert torch.equal(gradient_of(problem, upstream, reduction=reduction, upstream_scale=stated), default)
    over = gradient_of(problem, upstream, reduction=reduction, upstream_scale=stated, overwrite_logits=True)
    if met:
        assert torch.equal(over, default)
    else:  # rounded twice
        torch.testing.assert_close(over, default, rtol=2**-6.9, atol=1e-30)


@pytest.mark.parametrize("family_name", ["small", "streamed"])
def test_a_row_whose_upstream_was_stated_is_not_touched_in_backward(problem, family_name, device):
    logits, y, x = problem
    upstream = torch.full((9,), 0.5, device=device)
    upstream[3], upstream[7] = 1.0, math.nan
    with rows_are(family_name):
        statistics = triton_kernels.launch_loss(logits, y, x, MASK_ID, 0.25, 0.5)
        buffer = torch.full_like(logits, 77.0)
        triton_kernels.launch_gradient(
            logits, y, statistics, upstream, divisor=1, stated=0.5, gradient_out=buffer
        )
        whole = triton_kernels.launch_gradient(logits, y, statistics, upstream, divisor=1)
    written = (buffer != 77.0).any(1)
    assert written.tolist() == (upstream != 0.5).tolist()
    assert torch.equal(buffer[written].nan_to_num(7), whole[written].nan_to_num(7))


def test_loss_divided_by_k_meets_the_statement_1_over_k(problem):
    logits, y, x = problem
    for k in (3, 7, 10, 48):
        leaf = logits.clone().requires_grad_()
        received = []
        loss = kernel_loss(leaf, y, x, upstream_scale=1 / k)
        loss.register_hook(received.append)
        (loss / k).backward()
        assert received[0].item() == torch.tensor(1 / k).item()


@pytest.mark.parametrize("mode", ["in backward", "stated"])
def test_logits_keep_their_bits_and_version_unless_asked(problem, mode):
    logits, y, x = problem
    before, version = logits.clone(), logits._version
    stated, overwrite = MODES[mode]
    kernel_loss(logits.requires_grad_(), y, x, upstream_scale=stated, overwrite_logits=overwrite).backward()
    assert torch.equal(logits.detach(), before)
    assert logits._version == version


@pytest.mark.parametrize("stated", [None, 1.0], ids=["in backward", "with the loss"])
def test_overwritten_logits_fail_loudly_in_any_other_use(problem, stated):
    logits, y, x = problem
    node = logits.clone().requires_grad_() * 1
    other = (node**2).sum()  # saves the logits
    loss = kernel_loss(node, y, x, upstream_scale=stated, overwrite_logits=True)
    if stated is None:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_written_where_no_gradient_is_wanted(problem, mode):
    logits, y, x = problem
    before = logits.clone()
    stated, overwrite = MODES[mode]
    with torch.no_grad():
        quiet = kernel_loss(
            logits.requires_grad_(), y, x, upstream_scale=stated, overwrite_logits=overwrite
        )
    detached = kernel_loss(logits.detach(), y, x, upstream_scale=stated, overwrite_logits=overwrite)
    assert not quiet.requires_grad
    assert not detached.requires_grad
    assert torch.equal(quiet, detached)
    assert torch.equal(logits.detach(), before)
    assert logits._version == 0


# Autograd.


@pytest.mark.parametrize("upstreams", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0)])
@pytest.mark.parametrize("mode", ["in backward", "stated", "stated, over the logits"])
def test_a_second_backward_gives_its_own_gradient(problem, upstreams, mode, device):
    logits, y, x = problem
    stated, overwrite = MODES[mode]
    stated = stated and 1.0
    leaf = logits.clone().requires_grad_()
    node = leaf * 1
    loss = kernel_loss(node, y, x, upstream_scale=stated, overwrite_logits=overwrite)
    found = [
        torch.autograd.grad(loss, leaf, torch.tensor(u, device=device), retain_graph=True)[0]
        for u in upstreams
    ]
    for gradient, upstream in zip(found, upstreams, strict=True):
        expected = gradient_of(problem, torch.tensor(upstream, device=device))
        torch.testing.assert_close(gradient, expected, rtol=2**-6.5 if overwrite else 0, atol=0)
    if upstreams[0] == upstreams[1]:
        assert torch.equal(*found)


def test_a_second_backward_over_the_logits_raises_where_nothing_was_stated(problem):
    logits, y, x = problem
    loss = kernel_loss(logits.clone().requires_grad_() * 1, y, x, overwrite_logits=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_double_backward_raises(problem, mode):
    logits, y, x = problem
    stated, overwrite = MODES[mode]
    leaf = logits.clone().requires_grad_()
    loss = kernel_loss(leaf * 1, y, x, upstream_scale=stated, overwrite_logits=overwrite)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    # On CUDA autograd looks at what was overwritten before it asks for a derivative.
    with pytest.raises(RuntimeError, match="have no second derivative|modified by an inplace operation"):
        (loss + gradient.float().sum()).backward()


def test_a_hundred_repeats_give_equal_bits(problem, family):
    logits, y, x = (part[:2] for part in problem)
    first = loss_and_gradient(logits.clone(), y, x, MASK_ID, upstream_scale=1.0)
    # Interpreted rows run one after the other anyway.
    for _ in range(99 if logits.is_cuda else 9):
        again = loss_and_gradient(logits.clone(), y, x, MASK_ID, upstream_scale=1.0)
        assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
        assert torch.equal(first[2].nll, again[2].nll)


@pytest.mark.parametrize("stated", [None, 0.5], ids=["in backward", "with the loss"])
def test_upstream_gradients_of_any_stride(problem, stated, device):
    logits, y, x = problem
    shaped = logits.view(3, 3, 66), y.view(3, 3), x.view(3, 3)
    plain = torch.linspace(0.1, 1, 9, device=device).view(3, 3)
    strided = torch.full((3, 6), math.nan, device=device)[:, ::2].copy_(plain)
    for upstream in (plain.T.contiguous().T, strided, torch.tensor(0.3, device=device).expand(3, 3)):
        found = gradient_of(shaped, upstream, reduction="none", upstream_scale=stated)
        expected = gradient_of(problem, upstream.reshape(-1).contiguous(), reduction="none")
        assert torch.equal(found.view(9, 66), expected)


def test_penalties_as_device_scalars_give_the_same_bits(problem, device):
    logits, y, x = problem
    as_numbers = kernel_loss(logits, y, x)
    pk, pm = torch.tensor(0.25, device=device), torch.tensor(0.5, device=device, dtype=torch.float64)
    for penalties in ((pk, pm), (pk, 0.5), (0.25, pm), (pk.clone().requires_grad_(), 0.5)):
        loss = fused_diffusion_loss(logits, y, x, MASK_ID, *penalties, impl="triton")
        assert torch.equal(loss, as_numbers)
        assert not loss.requires_grad


def test_gradient_checkpointing_recomputes_the_same_gradient(problem):
    logits, y, x = problem
    plain, checkpointed = (logits.clone().requires_grad_() for _ in range(2))
    kernel_loss(plain * 1, y, x).backward()
    torch.utils.checkpoint.checkpoint(
        lambda leaf: kernel_loss(leaf * 1, y, x), checkpointed, use_reentrant=False
    ).backward()
    assert torch.equal(plain.grad, checkpointed.grad)


@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_the_device(problem, mode, monkeypatch):
    logits, y, x = problem
    stated, overwrite = MODES[mode]
    loss_and_gradient(logits.clone(), y, x, MASK_ID)  # compiled and warm

    def waits(*_):
        raise AssertionError("a value was read back to the host")

    if logits.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, waits)
    try:
        loss_and_gradient(logits.clone(), y, x, MASK_ID, upstream_scale=stated, overwrite_logits=overwrite)
    finally:
        if logits.is_cuda:
            torch.cuda.set_sync_debug_mode("default")


# Choice of implementation.


def test_auto_takes_the_kernel_on_cuda_and_the_reference_on_the_cpu(problem, monkeypatch):
    logits, y, x = problem
    launched = []
    launch = triton_kernels.launch_loss
    monkeypatch.setattr(
        triton_kernels, "launch_loss", lambda *a, **k: launched.append(1) or launch(*a, **k)
    )
    fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)
    assert bool(launched) == logits.is_cuda
    fused_diffusion_loss(logits.double(), y, x, MASK_ID, 0.25, 0.5)
    assert len(launched) == int(logits.is_cuda)


def test_the_kernel_asked_for_by_name_never_falls_back(problem, monkeypatch):
    logits, y, x = problem
    with pytest.raises(ValueError, match=r'impl="triton" needs logits in fp32, .*, got torch.float64'):
        kernel_loss(logits.double(), y, x)
    monkeypatch.setattr(triton_kernels, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device \(or TRITON_INTERPRET=1 .*\), got cpu"):
        kernel_loss(logits.cpu(), y.cpu(), x.cpu())
    monkeypatch.setitem(sys.modules, "difftrain_kernels.triton_kernels", None)
    monkeypatch.delattr(sys.modules["difftrain_kernels"], "triton_kernels")
    implementation.load_kernels.cache_clear()
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        kernel_loss(logits, y, x)
    assert fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5).isfinite()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"upstream_scale": 0.0},
            ValueError,
            "upstream_scale must be finite, not 0 and within fp32, got 0.0",
        ),
        (
            {"upstream_scale": math.inf},
            ValueError,
            "upstream_scale must be finite, not 0 and within fp32, got inf",
        ),
        ({"upstream_scale": "1"}, TypeError, "upstream_scale must be a number or None, got str"),
    ],
)
def test_wrong_options_are_named(problem, options, error, message):
    logits, y, x = problem
    with pytest.raises(error, match=message):
        kernel_loss(logits, y, x, **options)


def test_rows_that_share_memory_are_not_overwritten(problem):
    logits, y, x = problem
    with pytest.raises(
        ValueError,
        match=r"separate rows, evenly spaced or in batches, to be overwritten, got shape \(9, 66\) with str",
    ):
        kernel_loss(logits[:1].expand(9, 66), y, x, overwrite_logits=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_new_penalties_neither_recompile_nor_leave_a_graph(problem):
    logits, y, x = problem
    pk, pm = (torch.tensor(v, device=logits.device) for v in (0.25, 0.5))
    for value in (0.1, 0.2, 0.3):
        loss_and_gradient(logits.clone(), y, x, MASK_ID, value, value)
    kernels = triton_kernels.loss._small_loss_kernel.device_caches[logits.device.index or 0][0]
    compiled = len(kernels)
    for value in (0.4, 0.0, 1.0):
        loss_and_gradient(logits.clone(), y, x, MASK_ID, value, value)
    assert len(kernels) == compiled
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fused_diffusion_loss(logits, y, x, MASK_ID, pk, pm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused_diffusion_loss(logits, y, x, MASK_ID, pk, pm)
    for value in (0.25, 0.75):
        pk.fill_(value)
        graph.replay()
        assert torch.equal(loss, fused_diffusion_loss(logits, y, x, MASK_ID, value, 0.5))


@pytest.mark.parametrize("vocab_size", [66, 4500])
def test_a_row_too_large_for_an_exact_loss_gives_nan_and_no_wrong_number(vocab_size, device):
    for size, is_finite in ((1e8, True), (1e9, False), (1e10, False), (1e20, False)):
        logits = torch.full((2, vocab_size), -size, device=device)
        logits[0, 3] += size * 1e-6
        logits[1] = 0.0
        logits.requires_grad_()
        y = torch.tensor([3, 3], device=device)
        rows = fused_diffusion_loss(logits, y, y, MASK_ID, 0.25, 0.5, reduction="none", impl="triton")
        rows.sum().backward()
        assert rows[0].isfinite() == is_finite, size
        assert logits.grad[0].isfinite().all() == is_finite, size
        assert rows[1].isfinite()


def test_saved_logits_may_come_back_at_another_address(device):
    big = torch.randn(4, 80, device=device)
    y = torch.tensor([1, 2, 3, -1], device=device)

    def gradient(**options):
        leaf = big.clone().requires_grad_()
        fused_diffusion_loss(
            (leaf * 1)[:, 3:69], y, y, MASK_ID, 0.25, 0.5, impl="triton", **options
        ).backward()
        return leaf.grad

    expected = gradient()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    )
    with hooks:
        assert torch.equal(gradient(upstream_scale=1.0), expected)


def test_one_column_of_any_stride_may_be_overwritten(device):
    logits = (torch.randn(1, 3, device=device, requires_grad=True) * 1).t()
    y = torch.zeros(3, dtype=torch.int64, device=device)
    loss = fused_diffusion_loss(
        logits, y, y, 0, 0.25, 0.5, impl="triton", upstream_scale=1.0, overwrite_logits=True
    )
    loss.backward()
    assert abs(loss.item()) < 1e-6
