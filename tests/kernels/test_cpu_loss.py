"""The loss of CPU tensors, in blocks of rows: against the oracle, and the same bits however the rows are taken."""

import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from difftrain_kernels import (
    fused_diffusion_loss,
    fused_linear_diffusion_loss,
    row_blocks,
    small_vocabulary,
)
from term_problems import ALL, SINGLES, batch, check_rows, check_table, expected, options_of

MASK_ID = 6


def problem(n=41, vocab_size=11, mask_id=MASK_ID, dtype=torch.float32, seed=0, levels=0):
    """Logits (n, V), with ``levels`` so few different ones that maxima are tied, and labels of every kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab_size, generator=generator)
    if levels:
        logits = (logits * levels / 4).round()
    logits[::3, mask_id] += 2 if not levels else 1
    y, words = (torch.randint(0, vocab_size, (n,), generator=generator) for _ in range(2))
    x = torch.where(torch.rand(n, generator=generator) < 0.5, mask_id, y)
    x = torch.where(torch.rand(n, generator=generator) < 0.25, words, x)
    y[5::9] = -1
    return logits.to(dtype), y, x


def results(logits, y, x, mask_id=MASK_ID, **options):
    """Loss, gradient and table as one list of tensors."""
    leaf = logits.detach().clone().requires_grad_()
    loss, table = fused_diffusion_loss(leaf, y, x, mask_id, 0.25, 0.5, return_cases=True, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, upstream), table.counts, table.nll, table.gap]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 1)
    monkeypatch.setattr(small_vocabulary, "BLOCK", 1)


@pytest.fixture
def by_steps(monkeypatch):
    """Rows as where they are long, or where there is no NumPy."""
    monkeypatch.setattr(small_vocabulary, "MOST_WORDS", 0)


@pytest.fixture(params=[256, 0], ids=["small vocabulary", "by steps"])
def way(request, monkeypatch):
    """Both ways that rows may be taken, by their length."""
    monkeypatch.setattr(small_vocabulary, "MOST_WORDS", request.param)


@pytest.mark.parametrize("mask_id", [0, 5, 10], ids=["first", "middle", "last"])
@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "many ties"])
def test_value_gradient_and_cases_match_the_oracle(mask_id, levels, small_blocks, way):
    logits, y, x = problem(203, 11, mask_id, torch.float64, levels=levels)
    loss, gradient, counts, nll, gap = results(logits, y, x, mask_id, reduction="sum")
    exact = oracle.diffusion_loss(logits, y, x, mask_id, 0.25, 0.5)
    np.testing.assert_allclose(loss, exact.loss("sum"), rtol=1e-12)
    np.testing.assert_allclose(gradient, exact.gradient * 0.5, rtol=1e-11, atol=1e-14)
    assert counts.tolist() == exact.counts.tolist()
    np.testing.assert_allclose(nll, exact.nll_sums, rtol=1e-12)
    np.testing.assert_allclose(gap, exact.gap_sums, rtol=1e-12)


@pytest.mark.parametrize("names", [*SINGLES, *ALL], ids="+".join)
def test_every_term_is_what_the_oracle_says(names, small_blocks):
    logits, y, x = batch()
    options, y = options_of(names, y, MASK_ID)
    result, normalizer = expected(logits, y, x, MASK_ID, options)
    logits.requires_grad_()
    loss, cases, rows = fused_diffusion_loss(
        logits, y, x, MASK_ID, return_cases=True, return_rows=True, entropy=True, **options
    )
    loss.backward()
    assert loss.item() == pytest.approx(result.loss("mean", normalizer), rel=1e-12)
    divisor = normalizer or y.numel()
    exact = result.gradient / divisor
    np.testing.assert_allclose(logits.grad.reshape(y.numel(), -1), exact, rtol=1e-11, atol=1e-14)
    check_table(cases, result, y.numel())
    check_rows(rows, result, y.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab_size", [11, 1003])
def test_bits_depend_neither_on_the_block_nor_on_the_threads(dtype, vocab_size, way, monkeypatch):
    logits, y, x = problem(43, vocab_size, dtype=dtype)
    whole = results(logits, y, x, reduction="none")
    threads = torch.get_num_threads()
    try:
        for block, n_threads in ((1, 1), (3 * vocab_size, 1), (7 * vocab_size, 2), (2**17, 2)):
            monkeypatch.setattr(row_blocks, "BLOCK", block)
            monkeypatch.setattr(small_vocabulary, "BLOCK", block)
            torch.set_num_threads(n_threads)
            for ours, theirs in zip(results(logits, y, x, reduction="none"), whole, strict=True):
                assert torch.equal(ours, theirs), (block, n_threads)
    finally:
        torch.set_num_threads(threads)


def test_every_block_has_two_rows_at_least(small_blocks):
    for n in (2, 3, 7, 8):
        sizes = [len(block) for block, _ in row_blocks.blocks_of(torch.zeros(n, 5))]
        assert sum(sizes) == n
        assert min(sizes) >= 2


def test_any_leading_shape_and_stride_gives_the_same_bits(way):
    logits, y, x = problem(24, 9)
    flat = results(logits, y, x, reduction="none")
    padded = torch.full((4, 6, 12), math.nan)
    padded[..., :9] = logits.view(4, 6, 9)
    leaf = padded.requires_grad_()
    loss = fused_diffusion_loss(
        leaf[..., :9], y.view(4, 6).int(), x.view(4, 6).int(), MASK_ID, 0.25, 0.5, reduction="none"
    )
    assert torch.equal(loss.flatten(), flat[0])
    loss.backward(torch.linspace(0.5, 1.5, 24).view(4, 6))
    assert torch.equal(leaf.grad[..., :9].reshape(24, 9), flat[1])


@pytest.mark.parametrize("label", [0, 8, -2, 2**32 + 3])
def test_a_label_that_is_none_makes_its_row_nan_and_the_table_as_the_reference(label, way):
    logits, y, x = problem(24, 8)
    logits[3, 0] = 9.0  # the first word is the answer where the label is none
    y[3] = label
    found, plain = (results(logits, y, x, reduction="none", impl=impl) for impl in ("auto", "reference"))
    assert found[0].isnan().nonzero().flatten().tolist() == ([] if label == 0 else [3])
    assert torch.equal(found[2], plain[2])
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_label_may_be_the_ignored_one(way):
    logits, y, x = problem(24, 8)
    for labels in (y, y.clamp(min=0)):
        found, plain = (
            results(logits, labels, x, ignore_index=3, impl=impl) for impl in ("auto", "reference")
        )
        for ours, theirs in zip(found, plain, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_penalties_in_tensors_give_the_bits_of_numbers(way):
    logits, y, x = problem()
    for pk, pm in ((torch.tensor(0.25), torch.tensor(0.5, dtype=torch.float64)), (0.25, torch.tensor(0.5))):
        number, tensor = (
            fused_diffusion_loss(logits, y, x, MASK_ID, *p, reduction="none")
            for p in ((0.25, 0.5), (pk, pm))
        )
        assert torch.equal(number, tensor)


@pytest.mark.parametrize("fall", [80.0, 95.0, 200.0, 1e30, math.inf])
def test_probabilities_below_the_normal_numbers_are_zero(fall, by_steps):
    logits = torch.tensor([[0.0, 1.0, -fall]], requires_grad=True)
    y = torch.tensor([0])
    fused_diffusion_loss(logits, y, y, 2, 1.0, 1.0).backward()
    exact = math.exp(-fall - 1) / (1 + math.exp(-1))
    assert logits.grad[0, 2].item() == (0.0 if exact < 1.2e-38 else pytest.approx(exact, rel=1e-5))


def test_a_second_derivative_raises_and_the_reference_has_it(way):
    logits, y, x = problem()
    for impl in ("auto", "reference"):
        leaf = logits.clone().requires_grad_()
        loss = fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5, impl=impl)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if impl == "auto":
            with pytest.raises(RuntimeError, match="no second derivative; impl='reference' has"):
                gradient.sum().backward()
        else:
            gradient.square().sum().backward()


def test_transforms_go_to_the_reference():
    logits, y, x = problem()

    def loss(logits):
        return fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)

    found = torch.func.grad(loss)(logits)
    torch.testing.assert_close(found, results(logits, y, x)[1] / 0.5)
    assert torch.func.vmap(loss)(logits.expand(2, *logits.shape)).shape == (2,)


def test_a_scale_that_changes_before_backward_keeps_the_gradient():
    logits, y, x = problem()
    gradients = []
    for changes in (False, True):
        leaf, scale = logits.clone().requires_grad_(), torch.tensor(0.7)
        loss = fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5, logit_scale=scale)
        if changes:
            scale.fill_(3.0)
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_logits_changed_before_backward_raise(way):
    logits, y, x = problem()
    node = logits.requires_grad_() * 1
    loss = fused_diffusion_loss(node, y, x, MASK_ID, 0.25, 0.5)
    node.data.add_(0)  # not seen
    with torch.no_grad():
        node.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_loss_in_inference_mode_leaves_a_buffer_that_training_may_write_to(way):
    logits, y, x = problem(30, 13)
    with torch.inference_mode():
        quiet = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)
    assert torch.equal(quiet, results(logits, y, x)[0])


def test_sums_of_many_rows_do_not_lose_small_ones(way):
    n = 200_000
    logits = torch.zeros(n, 3)
    logits[:, 1] = torch.rand(n, generator=torch.Generator().manual_seed(0))
    y, x = torch.zeros(n, dtype=torch.int64), torch.full((n,), 2)
    _, table = fused_diffusion_loss(logits, y, x, 2, return_cases=True)
    rows = fused_diffusion_loss(logits, y, x, 2, reduction="none")
    assert table.nll.sum().item() == pytest.approx(rows.double().sum().item(), rel=2e-7)


@pytest.mark.parametrize("loss_of", ["logits", "linear"])
def test_no_second_derivative_is_ever_0_in_silence(loss_of):
    y, x = torch.tensor([1, 2, 4]), torch.tensor([1, 4, 4])
    head = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def loss(inputs):
        if loss_of == "logits":
            return fused_diffusion_loss(inputs, y, x, 4, 0.25, 0.5)
        return fused_linear_diffusion_loss(inputs, head, y, x, 4, 0.25, 0.5)

    point = torch.randn(3, 6 if loss_of == "logits" else 5, generator=torch.Generator().manual_seed(1))
    vector = torch.ones_like(point)
    for derivative in (
        lambda: torch.autograd.functional.hvp(loss, point, vector),
        lambda: torch.autograd.functional.hessian(loss, point),
        lambda: torch.autograd.functional.jvp(loss, point, vector),
    ):
        with pytest.raises(RuntimeError, match="have no second derivative"):
            derivative()
    inputs = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.autograd.grad(gradient.square().sum(), inputs, allow_unused=True)
    scale = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(inputs) * scale, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.autograd.grad(gradient.sum(), scale)


def test_what_changes_before_backward_raises_or_counts_as_it_was():
    y, x = torch.tensor([1, 2, 4]), torch.tensor([1, 4, 4])
    hidden, head = torch.randn(3, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 1.0])
    options = {"reduction": "none", "pk": 0.25, "pm": 0.5}
    loss = fused_linear_diffusion_loss(hidden, head, y, x, 4, token_weights=weights, **options)
    weights.copy_(1 - weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    gradients = []
    for later in (0.7, 3.0):
        scale = torch.tensor(0.7)
        loss = fused_linear_diffusion_loss(hidden, head, y, x, 4, logit_scale=scale, **options)
        scale.fill_(later)
        gradients.append(torch.autograd.grad(loss.sum(), hidden)[0])
    assert torch.equal(*gradients)


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_small_batch_takes_few_operations():
    logits, y, x = problem(768, 66)
    y = y.clamp(min=0)
    leaf = logits.requires_grad_()
    with _Operations() as forward:
        loss = fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5)
    with _Operations() as backward:
        loss.backward()
    with _Operations() as tabled:
        fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5, return_cases=True)
    assert (forward.count, backward.count, tabled.count) == (9, 3, 12)  # NumPy's are not counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_few_words_give_what_the_reference_gives(dtype, bad):
    logits, y, x = problem(60, 11, dtype=dtype, levels=3)
    logits[5], logits[3, 2], logits[7] = bad, bad, bad  # the sixth row does not count
    logits[9, :] = 1.0
    y[12] = 40
    for options in (
        {},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"ignore_index": 2},
        {"ignore_index": 0},
    ):
        ours, theirs = (results(logits, y, x, impl=impl, **options) for impl in ("auto", "reference"))
        if not options:
            assert not ours[1][5].any()
        for found, plain in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, plain, equal_nan=True)


def test_a_second_backward_gives_the_bits_of_the_first(way):
    logits, y, x = problem()
    for upstream in (1.0, 0.3):
        leaf = logits.clone().requires_grad_()
        loss = fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5) * upstream
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()


def test_no_rows_and_one_word(way):
    for n, vocab_size in ((0, 5), (3, 1)):
        leaf = torch.zeros(n, vocab_size, requires_grad=True)
        y = torch.zeros(n, dtype=torch.int64)
        loss, table = fused_diffusion_loss(leaf, y, y, 0, reduction="sum", return_cases=True)
        loss.backward()
        assert loss.item() == 0.0
        assert not leaf.grad.any()
        assert table.counts.sum() == n
    assert fused_diffusion_loss(torch.zeros(0, 5), y[:0], y[:0], 0).isnan()


def test_without_numpy_the_loss_is_the_same(monkeypatch):
    logits, y, x = problem()
    found = results(logits, y, x)
    monkeypatch.setattr(small_vocabulary, "np", None)
    for ours, theirs in zip(found, results(logits, y, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_that_does_not_count_has_gradient_0_whatever_reaches_it(reduction, bad, way):
    logits, y, x = problem()
    leaf = logits.requires_grad_()
    loss = fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5, reduction=reduction)
    loss.backward(torch.full_like(loss, bad))
    assert torch.equal(leaf.grad[y == -1], torch.zeros(int((y == -1).sum()), 11))
    assert not leaf.grad[y != -1].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_numpy_would_raise_stays_within(reduction):
    """Where a program has made NumPy's warnings errors: weights below the normal numbers, an infinite logit."""
    logits = torch.zeros(6, 11)
    logits[:, MASK_ID], logits[0, 2] = 1.0, math.inf
    leaf = logits.requires_grad_()
    y, x = torch.full((6,), 3), torch.full((6,), MASK_ID)
    with np.errstate(all="raise"):
        loss, _ = fused_diffusion_loss(
            leaf, y, x, MASK_ID, 1.2e-38, 1.2e-38, reduction=reduction, return_cases=True
        )
        loss.backward()
    assert leaf.grad[1:].isfinite().all()


def test_under_hooks_on_saved_tensors_no_gradient_is_kept_for_backward(monkeypatch):
    logits, y, x = problem()
    expected = results(logits, y, x)
    made = []
    plain = small_vocabulary.gradient
    monkeypatch.setattr(small_vocabulary, "gradient", lambda *a: made.append(0) or plain(*a))
    leaf = logits.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = fused_diffusion_loss(leaf, y, x, MASK_ID, 0.25, 0.5)
    assert made == []
    loss.backward(torch.tensor(0.5))
    assert made == [0]
    assert torch.equal(leaf.grad, expected[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["make_fx", "jit"])
def test_what_is_traced_computes_the_loss_of_other_logits(how, way):
    logits, y, x = problem()

    def loss_of(logits):
        return fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)

    try:
        traced = make_fx(loss_of)(logits) if how == "make_fx" else torch.jit.trace(loss_of, logits)
    except Exception:
        return  # which says so
    other = logits.flip(1)
    torch.testing.assert_close(traced(other), loss_of(other), rtol=1e-6, atol=0)
