"""Second link of the chain of trust: the reference, through the public function, against the oracle."""

import math

import numpy as np
import pytest
import torch

import oracle
from difftrain_kernels import CaseTable, fused_diffusion_loss

MASK_ID = 2
SAYS_MASK = [math.log(1), math.log(2), math.log(5)]
SAYS_WORD = [math.log(1), math.log(5), math.log(2)]
INF, NAN = math.inf, math.nan


def loss_of(logits, y, x, mask_id=MASK_ID, pk=0.25, pm=0.5, dtype=torch.float64, **options):
    logits = torch.tensor(logits, dtype=dtype)
    return fused_diffusion_loss(
        logits, torch.tensor(y), torch.tensor(x), mask_id, pk, pm, impl="reference", **options
    )


def random_problem(n, vocab_size, mask_id, *, seed=0, dtype=torch.float64, tie_levels=0):
    """Logits (n, V) and labels in which every kind of position and some ignored ones occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab_size, generator=generator, dtype=torch.float64) * 2
    logits[::2, mask_id] += 4  # about half the rows answer [MASK]
    if tie_levels:
        logits = (logits * tie_levels / 8).round() * 8 / tie_levels
    y = torch.randint(0, vocab_size, (n,), generator=generator)
    x = torch.where(torch.rand(n, generator=generator) < 0.4, mask_id, y)
    corrupted = torch.rand(n, generator=generator) < 0.25
    x = torch.where(corrupted, torch.randint(0, vocab_size, (n,), generator=generator), x)
    y = torch.where(corrupted, mask_id, y)
    y[3::7] = -1
    return logits.to(dtype), y, x


# Hand numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "y", "x", "expected"),
    [
        pytest.param(SAYS_MASK, 1, MASK_ID, 0.25 * math.log(4), id="kept the mask: pk"),
        pytest.param(SAYS_MASK, 1, 1, 0.5 * math.log(4), id="masked a correct word: pm"),
        pytest.param(SAYS_WORD, 1, MASK_ID, math.log(8 / 5), id="filled the mask: 1"),
        pytest.param(SAYS_WORD, 1, 1, math.log(8 / 5), id="left a correct word: 1"),
        pytest.param(SAYS_MASK, MASK_ID, 0, math.log(8 / 5), id="flagged a wrong word: 1"),
        pytest.param(SAYS_MASK, MASK_ID, MASK_ID, math.log(8 / 5), id="[MASK] wanted for [MASK]: 1"),
    ],
)
def test_weight_of_two_tokens_by_hand(logits, y, x, expected):
    # A second token with known loss ln(8/1): intact, answered by another word.
    loss = loss_of([logits, SAYS_WORD], [y, 0], [x, 0])
    assert loss.item() == pytest.approx((expected + math.log(8)) / 2, rel=1e-14)


@pytest.mark.parametrize(
    ("mask_id", "answers_mask"),
    [
        pytest.param(1, True, id="tie with a later id: first maximum is [MASK]"),
        pytest.param(3, False, id="tie with an earlier id: first maximum is the word"),
    ],
)
def test_tied_maximum_goes_to_the_first_index(mask_id, answers_mask):
    logits = [[0.0, 2.0, 1.0, 2.0]]
    loss, cases = loss_of(logits, [0], [mask_id], mask_id=mask_id, pk=0.25, return_cases=True)
    nll = math.log(1 + math.exp(1) + 2 * math.exp(2))
    assert loss.item() == pytest.approx((0.25 if answers_mask else 1.0) * nll, rel=1e-14)
    assert cases.counts[0].tolist() == ([1, 0, 0] if answers_mask else [0, 0, 1])
    assert cases.gap[0] == 0


# Against the oracle -----------------------------------------------------------------------------


@pytest.mark.parametrize("mask_id", [0, 5, 10], ids=["first", "middle", "last"])
@pytest.mark.parametrize("tie_levels", [0, 4], ids=["distinct", "many ties"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_gradient_and_cases_match_the_oracle(mask_id, tie_levels, reduction):
    logits, y, x = random_problem(203, 11, mask_id, seed=mask_id, tie_levels=tie_levels)
    logits.requires_grad_()
    loss, cases = fused_diffusion_loss(
        logits, y, x, mask_id, 0.25, 0.5, reduction=reduction, impl="reference", return_cases=True
    )
    expected = oracle.diffusion_loss(logits.detach(), y, x, mask_id, 0.25, 0.5)
    upstream = torch.randn_like(loss)
    loss.backward(upstream)

    value = expected.row_loss if reduction == "none" else expected.loss(reduction)
    np.testing.assert_allclose(loss.detach(), value, rtol=1e-12)
    row_scale = upstream.expand(len(y)).numpy() / (len(y) if reduction == "mean" else 1)
    np.testing.assert_allclose(logits.grad, expected.gradient * row_scale[:, None], rtol=1e-9, atol=1e-14)
    assert cases.counts.tolist() == expected.counts.tolist()
    assert (expected.counts.sum(1) > 10).all(), "every kind of position must occur"
    np.testing.assert_allclose(cases.nll, expected.nll_sums, rtol=1e-12)
    np.testing.assert_allclose(cases.gap, expected.gap_sums, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1e3, 6e4], ids=["offset 0", "offset 1e3", "offset 6e4"])
def test_result_is_fp32_and_exact_for_the_values_given(dtype, offset):
    logits, y, x = random_problem(64, 50, 49)
    logits = (logits + offset).clamp(max=65000).to(dtype)
    rows = fused_diffusion_loss(logits, y, x, 49, 0.25, 0.5, reduction="none", impl="reference")
    expected = oracle.diffusion_loss(logits.double(), y, x, 49, 0.25, 0.5)
    assert rows.dtype == torch.float32
    error = np.abs(rows.double().numpy() - expected.row_loss) / np.maximum(1, expected.nll)
    assert error.max() <= 3e-6


def test_gradcheck_with_constant_weights():
    # Rows far from a tie: the weight is piecewise constant, and gradcheck must not cross a step.
    logits, y, x = random_problem(12, 5, 4, seed=3)
    logits[torch.arange(12), logits.argmax(1)] += 1.0
    logits.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda logits, r=reduction: fused_diffusion_loss(logits, y, x, 4, 0.25, 0.5, reduction=r),
            (logits,),
        )


def test_loss_is_affine_in_the_penalties_and_the_table_gives_it():
    logits, y, x = random_problem(200, 9, 8)
    _, cases = fused_diffusion_loss(logits, y, x, 8, 1.0, 0.0, return_cases=True)
    for pk, pm in ((1.0, 0.0), (0.25, 0.5), (1.0, 1.0), (0.0, 0.0), (3.0, 0.7)):
        direct = fused_diffusion_loss(logits, y, x, 8, pk, pm)
        assert cases.loss_at(pk, pm).item() == pytest.approx(direct.item(), rel=1e-12)
    assert cases.n_positions == 200
    assert cases.counts.sum().item() == int((y != -1).sum())


def test_penalties_may_be_numbers_or_device_scalars():
    logits, y, x = random_problem(50, 9, 8)
    as_float = fused_diffusion_loss(logits, y, x, 8, 0.25, 0.5)
    as_tensor = fused_diffusion_loss(logits, y, x, 8, torch.tensor(0.25), torch.tensor(0.5))
    assert torch.equal(as_float, as_tensor)
    trainable = torch.tensor(0.25, requires_grad=True)
    assert not fused_diffusion_loss(logits, y, x, 8, trainable, 0.5).requires_grad


def test_one_graph_compiles_for_any_float_penalty():
    def loss(logits, y, x, pk, pm):
        return fused_diffusion_loss(logits, y, x, 8, pk, pm)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    logits, y, x = random_problem(20, 9, 8, dtype=torch.float32)
    for pk, pm in ((1.0, 0.0), (0.9, 0.1), (0.25, 0.5)):
        assert torch.equal(compiled(logits, y, x, pk, pm), loss(logits, y, x, pk, pm))


def test_any_leading_shape_and_stride_gives_the_same_loss():
    logits, y, x = random_problem(24, 9, 8)
    flat = fused_diffusion_loss(logits, y, x, 8, 0.25, 0.5, reduction="none")
    padded = torch.full((4, 6, 12), NAN, dtype=logits.dtype)
    padded[..., :9] = logits.view(4, 6, 9)
    shaped = fused_diffusion_loss(
        padded[..., :9], y.view(4, 6).int(), x.view(4, 6).int(), 8, 0.25, 0.5, reduction="none"
    )
    assert shaped.shape == (4, 6)
    assert torch.equal(shaped.flatten(), flat)


def test_the_argument_tensors_are_not_modified():
    logits, y, x = random_problem(24, 9, 8)
    logits.requires_grad_()
    before = [t.detach().clone() for t in (logits, y, x)]
    fused_diffusion_loss(logits, y, x, 8, 0.25, 0.5).backward()
    assert all(torch.equal(a, b) for a, b in zip((logits, y, x), before, strict=True))


# Ignored positions, bad labels, infinities, NaN, emptiness ---------------------------------------


@pytest.mark.parametrize("content", [NAN, INF, -INF], ids=["nan", "+inf", "-inf"])
def test_ignored_rows_get_zero_loss_and_zero_gradient_whatever_they_hold(content):
    logits, y, x = random_problem(21, 5, 4)
    logits[y == -1] = content
    logits.requires_grad_()
    rows = fused_diffusion_loss(logits, y, x, 4, 0.25, 0.5, reduction="none")
    rows.sum().backward()
    assert (rows[y == -1] == 0).all()
    assert (logits.grad[y == -1] == 0).all()
    assert rows.isfinite().all()
    assert (logits.grad[y != -1] != 0).any(1).all()


def test_ignored_rows_do_not_alarm_anomaly_detection():
    logits, y, x = random_problem(21, 5, 4)
    logits.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        fused_diffusion_loss(logits, y, x, 4, 0.25, 0.5).backward()
    assert logits.grad.isfinite().all()


def test_ignore_index_is_the_callers_choice():
    logits, y, x = random_problem(21, 5, 4)
    default = fused_diffusion_loss(logits, y, x, 4, 0.25, 0.5)
    renamed = fused_diffusion_loss(
        logits, torch.where(y == -1, -100, y), x, 4, 0.25, 0.5, ignore_index=-100
    )
    assert torch.equal(default, renamed)


@pytest.mark.parametrize("label", [3, -2, 2**32 + 3, -(2**40)])
def test_label_outside_the_vocabulary_poisons_only_its_own_row(label):
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, label, 1, 2])
    rows = fused_diffusion_loss(logits, y, torch.tensor([0, 1, 2, 0]), 2, 0.25, 0.5, reduction="none")
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, True, False, False]
    assert logits.grad.isnan().all(1).tolist() == [False, True, False, False]
    assert logits.grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("row", "target", "loss", "gradient"),
    [
        pytest.param([-INF, 0.0, 0.0], 0, INF, [-1.0, 0.5, 0.5], id="-inf at the target"),
        pytest.param([-INF, 0.0, 0.0], 1, math.log(2), [0.0, -0.5, 0.5], id="-inf elsewhere"),
        pytest.param([-INF, -INF, -INF], 0, NAN, None, id="all -inf"),
        pytest.param([0.0, INF, 0.0], 0, NAN, None, id="+inf"),
        pytest.param([0.0, NAN, 0.0], 0, NAN, None, id="nan"),
    ],
)
def test_infinities_and_nan_in_a_row_that_counts(row, target, loss, gradient):
    logits = torch.tensor([row, [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rows = fused_diffusion_loss(
        logits, torch.tensor([target, 0]), torch.tensor([1, 1]), 2, 0.25, 0.5, reduction="none"
    )
    rows.sum().backward()
    np.testing.assert_allclose(rows[0].item(), loss, rtol=1e-14)
    if gradient is None:
        assert logits.grad[0].isnan().any()
    else:
        np.testing.assert_allclose(logits.grad[0], gradient, rtol=1e-14)
    assert rows[1].item() == pytest.approx(math.log(3), rel=1e-14)
    np.testing.assert_allclose(logits.grad[1], [-2 / 3, 1 / 3, 1 / 3], rtol=1e-14)


@pytest.mark.parametrize(
    ("row", "mask_id", "says_mask"),
    [
        pytest.param([0.0, NAN, 5.0], 1, True, id="nan at [MASK] counts as maximum"),
        pytest.param([0.0, NAN, 5.0], 2, False, id="nan elsewhere beats [MASK]"),
        pytest.param([-INF, -INF, -INF], 0, True, id="all -inf gives index 0"),
        pytest.param([-INF, -INF, -INF], 2, False, id="all -inf is not the last index"),
    ],
)
def test_prediction_of_rows_without_a_plain_maximum(row, mask_id, says_mask):
    assert (torch.tensor(row).argmax().item() == mask_id) == says_mask
    _, cases = loss_of([row], [(mask_id + 1) % 3], [mask_id], mask_id=mask_id, return_cases=True)
    assert (cases.counts[0, 0] == 1) == says_mask


def test_torch_argmax_takes_the_first_maximum():
    tied = torch.zeros(64, 5000, dtype=torch.bfloat16)
    tied[:, 17] = tied[:, 4000] = 1.0
    assert (tied.argmax(-1) == 17).all()


def test_torch_itself_gives_nan_gradients_for_an_ignored_row_with_nan():
    # The fact that ours differs from on purpose.
    logits = torch.full((1, 3), NAN, requires_grad=True)
    torch.nn.functional.cross_entropy(
        logits, torch.tensor([-1]), ignore_index=-1, reduction="sum"
    ).backward()
    assert logits.grad.isnan().any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0}, {"logit_scale": 0.5, "softcap": 5.0, "z_loss": 0.1, "forbid_mask": True}],
)
@pytest.mark.parametrize("content", [NAN, INF, -INF])
def test_what_an_ignored_row_holds_reaches_nothing_also_through_the_bends(content, options, impl):
    logits = torch.tensor([[0.5, -1.0, 2.0], [content] * 3], dtype=torch.float64, requires_grad=True)
    loss = fused_diffusion_loss(
        logits, torch.tensor([1, -1]), torch.tensor([2, 2]), 2, 0.25, 0.5, impl=impl, **options
    )
    loss.backward()
    assert loss.isfinite()
    assert logits.grad[0].isfinite().all()
    assert logits.grad[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_batch_gives_nan_mean_and_zero_sum(shape):
    logits = torch.zeros(*shape, 5, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    assert fused_diffusion_loss(logits, labels, labels, 4, 0.25, 0.5).isnan()
    total, cases = fused_diffusion_loss(
        logits, labels, labels, 4, 0.25, 0.5, reduction="sum", return_cases=True
    )
    assert total.item() == 0
    assert cases.counts.sum() == 0
    assert cases.loss_at(1.0, 1.0).isnan()
    rows = fused_diffusion_loss(logits, labels, labels, 4, 0.25, 0.5, reduction="none")
    assert rows.shape == shape
    total.backward()
    assert logits.grad.shape == logits.shape


def test_ties_are_common_in_random_bf16_rows_so_the_tie_rule_matters():
    logits = torch.randn(400, 50304, generator=torch.Generator().manual_seed(0)).bfloat16()
    ties = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert ties.float().mean() > 0.02  # 4 to 8 % over many rows; 400 rows scatter around it


# The case table as a value ------------------------------------------------------------------------


def test_tables_add_up_and_travel_as_one_vector():
    logits, y, x = random_problem(60, 9, 8)
    whole = fused_diffusion_loss(logits, y, x, 8, 0.25, 0.5, return_cases=True)[1]
    parts = [
        fused_diffusion_loss(logits[s], y[s], x[s], 8, 0.25, 0.5, return_cases=True)[1]
        for s in (slice(0, 13), slice(13, 60))
    ]
    total = parts[0] + parts[1]
    travelled = CaseTable.from_vector(total.to_vector())
    for table in (total, travelled):
        assert torch.equal(table.counts, whole.counts)
        assert table.n_positions == 60
        torch.testing.assert_close(table.nll, whole.nll)
        torch.testing.assert_close(table.gap, whole.gap)
    rates = whole.rates()
    torch.testing.assert_close(rates.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(whole.mean_nll(), whole.nll.sum(1) / whole.counts.sum(1))
