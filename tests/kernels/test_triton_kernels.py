"""Third link of the chain of trust: the Triton kernels against the oracle, on CUDA or interpreted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from difftrain_kernels import fused_diffusion_loss, triton_kernels
from loss_problems import (
    DTYPES,
    MODES,
    ROUNDING,
    SMALLEST,
    assert_near_oracle,
    loss_and_gradient,
    random_problem,
    rows_are,
    strided_copy,
)

# numpy warns where hardware computes inf and NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = math.inf, math.nan
PROPERTY = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


# Against the oracle.


@st.composite
def problems(draw, max_rows, vocab_sizes):
    vocab_size = draw(vocab_sizes)
    mask_id = draw(
        st.sampled_from(sorted({0, vocab_size // 2, vocab_size - 1})) | st.integers(0, vocab_size - 1)
    )
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
    logits, buffer = strided_copy(
        problem["logits"].to(device), padding=problem["padding"], phase=problem["phase"]
    )
    before = buffer.clone()
    y, x = problem["y"].to(device), problem["x"].to(device)
    mask_id, pk, pm, reduction = (problem[key] for key in ("mask_id", "pk", "pm", "reduction"))
    expected = oracle.diffusion_loss(
        problem["logits"].double(), problem["y"], problem["x"], mask_id, pk, pm
    )
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


SMALL = problems(8, st.integers(1, 300) | st.sampled_from([1, 2, 63, 64, 65, 128, 129]))
STREAMED = problems(
    3, st.integers(1, 1600) | st.sampled_from([255, 256, 257, 511, 512, 513, 1023, 1024, 1025])
)


# Of the 20 pairs of a mode and a phase each is missed by 120 draws with probability 0.95^120, 1 in 470. Small rows
# are cheap, and their vocabularies have more edges.
@settings(max_examples=240, **PROPERTY)
@given(problem=SMALL)
def test_small_rows_match_the_oracle(problem, device):
    with rows_are("small"):
        check(problem, device)


@settings(max_examples=120, **PROPERTY)
@given(problem=STREAMED)
def test_streamed_rows_match_the_oracle(problem, device):
    with rows_are("streamed"):
        check(problem, device)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rows"), [("small", SMALL), ("streamed", STREAMED)])
def test_a_thousand_problems_match_the_oracle(family, rows, device):
    @settings(max_examples=1000, **PROPERTY)
    @given(problem=rows)
    def each(problem):
        check(problem, device)

    with rows_are(family):
        each()


# V at the edges: a block's last element, a tile's last V, the sizes; each on its own tile.
@pytest.mark.parametrize(
    "vocab_size",
    [
        pytest.param(1, id="1: no softmax"),
        pytest.param(2, id="2"),
        pytest.param(66, id="66: characters"),
        pytest.param(4096, id="4096: the largest small row"),
        pytest.param(4097, id="4097: the first streamed row, odd"),
        pytest.param(16385, id="16385: 16 warps, odd"),
        pytest.param(50257, id="50257: odd"),
        pytest.param(50304, id="50304"),
        pytest.param(65537, id="65537: 32 warps, odd"),
        pytest.param(262144, id="262144: whole blocks only"),
        pytest.param(300001, id="300001"),
    ],
)
def test_every_tile_matches_the_oracle(vocab_size, device):
    dtype = torch.float32 if vocab_size in (1, 4096, 50257) else torch.bfloat16
    mask_id = vocab_size - 1
    logits, y, x = random_problem(2, vocab_size, mask_id, dtype, seed=vocab_size)
    y[:] = torch.tensor([vocab_size // 3, mask_id])
    loss, gradient, cases = loss_and_gradient(
        logits.to(device), y.to(device), x.to(device), mask_id, upstream_scale=1.0, reduction="sum"
    )
    expected = oracle_of(logits, y, x, mask_id)
    assert_near_oracle(loss, gradient, cases, expected, torch.ones(()), "sum")


@pytest.mark.parametrize("n", [1, 512, 513])
def test_case_table_over_whole_and_partial_blocks_of_rows(n, device):
    logits, y, x = random_problem(n, 2, 1, torch.float32)
    found, expected = (
        fused_diffusion_loss(
            logits.to(device), y.to(device), x.to(device), 1, 0.25, 0.5, impl=impl, return_cases=True
        )[1]
        for impl in ("triton", "reference")
    )
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.nll, expected.nll)
    torch.testing.assert_close(found.gap, expected.gap)


def oracle_of(logits, y, x, mask_id, pk=0.25, pm=0.5):
    """The oracle, its loop for the first maximum replaced by numpy's (which agrees; it is tested)."""
    loop, oracle.first_maximum = oracle.first_maximum, lambda row: int(np.argmax(row))
    try:
        return oracle.diffusion_loss(logits.double().cpu(), y.cpu(), x.cpu(), mask_id, pk, pm)
    finally:
        oracle.first_maximum = loop


# Numerics.


@pytest.mark.parametrize("offset", [0.0, 1e3, 6e4, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_cost_no_accuracy(dtype, offset, family, device):
    if dtype == torch.float16 and offset > 6e4:
        pytest.skip("not an fp16 number")
    # Spread with the offset's spacing, so that the rounded logits still differ.
    spread = max(2.0, offset * torch.finfo(dtype).eps * 2)
    logits, y, x = random_problem(12, 700, 699, dtype, spread=spread)
    logits = (logits.double() + offset).clamp(max=65000.0 if dtype == torch.float16 else INF).to(dtype)
    expected = oracle_of(logits, y, x, 699)
    rows, gradient, cases = loss_and_gradient(
        logits.to(device), y.to(device), x.to(device), 699, reduction="none", upstream_scale=1.0
    )
    error = np.abs(rows.double().cpu().numpy() - expected.row_loss)
    assert (error <= 3e-6 * np.maximum(1, expected.nll)).all()
    np.testing.assert_allclose(cases.nll.cpu(), expected.nll_sums, rtol=1e-5, atol=1e-5)
    allowed = np.maximum(1e-6 * np.abs(expected.gradient), 1e-9) + ROUNDING[dtype] * np.abs(
        expected.gradient
    )
    assert (np.abs(gradient.double().cpu().numpy() - expected.gradient) <= allowed + SMALLEST[dtype]).all()


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.999, 0.99999, 0.9999999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_near_certain_target_is_rounded_once(probability, dtype, family, device):
    vocab_size = 600
    logits = torch.zeros(6, vocab_size, dtype=dtype)
    y = torch.tensor([0, 1, 255, 256, 512, vocab_size - 1])
    logits[torch.arange(6), y] = math.log(probability / (1 - probability) * (vocab_size - 1))
    _, gradient, _ = loss_and_gradient(
        logits.to(device), y.to(device), y.to(device), 3, reduction="sum", upstream_scale=1.0
    )
    exact = oracle_of(logits, y, y, 3).gradient[torch.arange(6), y]
    found = gradient.cpu()[torch.arange(6), y].double().numpy()
    assert (np.abs(found - exact) <= (ROUNDING[dtype] + 1e-6) * np.abs(exact) + SMALLEST[dtype]).all()


@pytest.mark.parametrize("mask_id", [0, 300, 599], ids=["first", "middle", "last"])
def test_weights_are_those_of_argmax_on_tied_bf16_rows(mask_id, family, device):
    logits, y, x = random_problem(20, 600, mask_id, torch.bfloat16, tie_levels=2, spread=1.0, seed=1)
    logits[1::3, mask_id] = logits[1::3].amax(1)  # [MASK] ties with the maximum
    labelled = torch.arange(20)[y >= 0][::4]
    logits[labelled, y[labelled]] = logits[labelled].amax(1)  # so does the target
    logits[::5, mask_id] += 8  # and [MASK] alone is the maximum
    y[5] = x[5] = mask_id  # wanted where it stands: weight 1
    predicted = logits.argmax(1)
    assert (predicted == mask_id).sum() >= 4
    _, _, cases = loss_and_gradient(logits.to(device), y.to(device), x.to(device), mask_id)
    expected = oracle.diffusion_loss(logits.double(), y, x, mask_id, 0.25, 0.5)
    assert torch.equal(predicted, torch.from_numpy(expected.predicted))
    assert cases.counts.tolist() == expected.counts.tolist()
    statistics = triton_kernels.launch_loss(
        logits.to(device), y.to(device), x.to(device), mask_id, 0.25, 0.5
    )
    weight = (statistics.columns[0] / statistics.columns[1]).cpu()
    counted = y >= 0
    np.testing.assert_allclose(weight[counted], expected.weight[counted.numpy()], rtol=1e-6)


def test_a_maximum_that_comes_first_in_each_block_is_found(family, device):
    # [MASK] and the target hold the maximum; an equal one stands before, in every place in turn.
    vocab_size, y_id, mask_id = 1100, 700, 900
    places = [0, 1, 7, 8, 255, 256, 511, 512, 699, 701, 899, 901, 1024, 1099]
    logits = torch.zeros(len(places), vocab_size)
    logits[:, [y_id, mask_id]] = 1.0
    logits[torch.arange(len(places)), places] = 1.0
    y = torch.full((len(places),), y_id)
    for phase, target in ((0, y_id), (1, mask_id)):
        rows, _ = strided_copy(logits.to(device), phase=phase, padding=phase)
        labels = torch.full_like(y, target)
        statistics = triton_kernels.launch_loss(rows, labels.to(device), y.to(device), mask_id, 1.0, 1.0)
        first = logits.argmax(1)
        answer = torch.where(first == mask_id, 0, torch.where(first == labels, 1, 2))
        assert (statistics.case.cpu() % 3).tolist() == answer.tolist()


# Labels, ignored rows, infinities.


@pytest.mark.parametrize("label", [600, -2, 2**31 - 1, 2**32 + 3, -(2**40), 2**63 - 1])
@pytest.mark.parametrize("stated", [None, 1.0], ids=["in backward", "with the loss"])
def test_label_outside_the_vocabulary_poisons_only_its_own_row(label, stated, family, device):
    logits, _, _ = random_problem(4, 600, 5, torch.bfloat16)
    logits, buffer = strided_copy(logits.to(device), padding=3)
    before = buffer.clone()
    y = torch.tensor([0, label, 1, 599], device=device)
    rows, gradient, _ = loss_and_gradient(
        logits, y, y.clamp(0, 599), 5, reduction="none", upstream_scale=stated
    )
    assert rows.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False, False]
    assert gradient[[0, 2, 3]].isfinite().all()
    assert torch.equal(buffer.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("label", [-1, 600])
def test_a_poisoned_row_is_tabulated_as_the_reference_does(label, family, device):
    logits, _, _ = random_problem(3, 600, 5, torch.float32)
    y = torch.tensor([0, label, 1])
    options = {"ignore_index": -100, "return_cases": True}
    arguments = logits.to(device), y.to(device), torch.full_like(y, 5).to(device), 5, 0.25, 0.5
    found = fused_diffusion_loss(*arguments, impl="triton", **options)[1]
    expected = fused_diffusion_loss(*arguments, impl="reference", **options)[1]
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.nll, expected.nll, equal_nan=True)
    torch.testing.assert_close(found.gap, expected.gap)


def test_checked_labels_name_the_position_in_the_kernel_too(device):
    y = torch.tensor([[0, 1], [9, -1]], device=device)
    logits = torch.zeros(2, 2, 9, device=device)
    with pytest.raises(ValueError, match=r"got 9 at position \(1, 0\)"):
        fused_diffusion_loss(logits, y, y, 8, 0.25, 0.5, impl="triton", check_labels=True)


@pytest.mark.parametrize("content", [NAN, INF, -INF], ids=["nan", "+inf", "-inf"])
@pytest.mark.parametrize("mode", MODES)
def test_ignored_rows_get_exact_zeros_whatever_they_hold(content, mode, family, device):
    logits, y, x = random_problem(9, 600, 4, torch.bfloat16)
    y[::3] = -1
    logits[y == -1] = content
    rows, _ = strided_copy(logits.to(device), padding=1, phase=1)
    stated, overwrite = MODES[mode]
    loss, gradient, cases = loss_and_gradient(
        rows,
        y.to(device),
        x.to(device),
        4,
        reduction="none",
        upstream_scale=stated,
        overwrite_logits=overwrite,
        upstream=torch.full((9,), stated or 1.0, device=device),
    )
    assert (loss.cpu()[y == -1] == 0).all()
    assert (gradient.cpu()[y == -1] == 0).all()
    assert loss.isfinite().all()
    assert (gradient.cpu()[y != -1] != 0).any(1).all()
    assert cases.counts.sum().item() == (y != -1).sum().item()


@pytest.mark.parametrize("place", [0, 300, 598], ids=["first", "middle", "last"])
@pytest.mark.parametrize("content", [NAN, INF, -INF], ids=["nan", "+inf", "-inf"])
@pytest.mark.parametrize("whole_row", [False, True], ids=["one logit", "whole row"])
def test_infinities_and_nan_do_as_the_reference_does(content, place, whole_row, family, device):
    # Rows differ in what stands at the place: the target, [MASK], neither.
    logits = torch.linspace(-1, 1, 599).repeat(3, 1)
    logits[:, slice(None) if whole_row else place] = content
    y, x = torch.tensor([place, 1, 2]), torch.tensor([7, 1, place])
    for mask_id in {place, 0}:
        leaf = logits.clone().requires_grad_()
        reference = fused_diffusion_loss(
            leaf, y, x, mask_id, 0.25, 0.5, reduction="none", impl="reference", return_cases=True
        )
        reference[0].sum().backward()
        rows, gradient, cases = loss_and_gradient(
            logits.clone().to(device),
            y.to(device),
            x.to(device),
            mask_id,
            reduction="none",
            upstream_scale=1.0,
        )
        np.testing.assert_allclose(rows.cpu(), reference[0].detach(), rtol=3e-6)
        assert cases.counts.tolist() == reference[1].counts.tolist()
        np.testing.assert_allclose(cases.gap.cpu(), reference[1].gap, rtol=1e-6)
        poisoned = leaf.grad.isnan().any(1)
        assert torch.equal(gradient.cpu().isnan().any(1), poisoned)
        np.testing.assert_allclose(gradient.cpu()[~poisoned], leaf.grad[~poisoned], rtol=3e-6, atol=1e-9)


def test_rows_of_numbers_at_the_range_s_end_are_exact_or_nan(family, device):
    # A common mask value: finfo.min, beside ordinary logits and alone.
    logits = torch.zeros(3, 300)
    logits[0, 5:], logits[1], logits[2, ::2] = -3.4028e38, -3.4028e38, -1e30
    y = torch.tensor([0, 1, 1])
    rows, gradient, _ = loss_and_gradient(
        logits.to(device), y.to(device), y.to(device), 9, reduction="none"
    )
    assert rows[0].item() == pytest.approx(math.log(5), rel=1e-6)
    assert rows[1].isnan()
    assert rows[2].item() == pytest.approx(math.log(150), rel=1e-6)
    assert gradient[[0, 2]].isfinite().all()


# Memory.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab_size", [66, 601])
def test_every_output_element_is_written(mode, vocab_size, family, device, monkeypatch):
    logits, y, x = random_problem(9, vocab_size, 4, torch.bfloat16)
    y[0] = -1
    stated, overwrite = MODES[mode]
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(NAN if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
    loss, gradient, cases = loss_and_gradient(
        logits.to(device),
        y.to(device),
        x.to(device),
        4,
        upstream_scale=stated,
        overwrite_logits=overwrite,
        # Met, or backward would write what forward did not.
        upstream=torch.tensor(stated or 1.0, device=device),
    )
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert cases.counts.sum().item() == (y != -1).sum().item()
    statistics = triton_kernels.launch_loss(logits.to(device), y.to(device), x.to(device), 4, 1.0, 1.0)
    assert statistics.columns.isfinite().all()
    assert ((statistics.case >= 0) & (statistics.case <= 9)).all()


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh buffer", "over the logits"])
def test_rows_beyond_2_31_elements(overwrite, family, device):
    # Three rows 2^30 elements apart in an allocation that is never touched elsewhere.
    stride, vocab_size = 2**30 + 8, 300
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    near, y, x = random_problem(3, vocab_size, 7, torch.bfloat16)
    y[:] = torch.tensor([1, 2, 3])
    far = torch.empty(2 * stride + vocab_size, dtype=torch.bfloat16, device=device)
    far = far.as_strided((3, vocab_size), (stride, 1))
    far.copy_(near)
    results = [
        loss_and_gradient(
            rows, y.to(device), x.to(device), 7, upstream_scale=0.5, overwrite_logits=overwrite
        )
        for rows in (far, near.to(device))
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_gives_nan_mean_and_zero_sum(shape, mode, family, device):
    labels = torch.zeros(shape, dtype=torch.int64, device=device)
    stated, overwrite = MODES[mode]
    options = {"upstream_scale": stated, "overwrite_logits": overwrite}
    logits = torch.zeros(*shape, 600, device=device)
    mean, gradient, cases = loss_and_gradient(logits, labels, labels, 4, **options)
    assert mean.isnan()
    assert gradient.shape == logits.shape
    assert cases.counts.sum() == 0
    assert loss_and_gradient(logits, labels, labels, 4, reduction="sum", **options)[0].item() == 0
    assert loss_and_gradient(logits, labels, labels, 4, reduction="none", **options)[0].shape == shape


def test_any_leading_shape_and_stride_gives_the_same_loss(family, device):
    logits, y, x = random_problem(6, 600, 4, torch.bfloat16)
    y, x = y.to(device), x.to(device)
    flat, flat_gradient, _ = loss_and_gradient(logits.to(device), y, x, 4, reduction="none")
    padded = torch.full((2, 3, 607), NAN, dtype=logits.dtype)
    padded[..., :600] = logits.view(2, 3, 600)
    uneven = torch.full((2, 4, 600), NAN, dtype=logits.dtype)  # as logits[:, :-1]: rows in batches
    uneven[:, :3] = logits.view(2, 3, 600)
    sideways = logits.view(2, 3, 600).transpose(0, 2).contiguous().transpose(0, 2)
    x_sideways = x.view(2, 3).T.contiguous().T
    for shaped in (padded[..., :600], uneven[:, :3], sideways):
        rows, gradient, _ = loss_and_gradient(
            shaped.to(device), y.view(2, 3).int(), x_sideways, 4, reduction="none"
        )
        assert rows.shape == (2, 3)
        torch.testing.assert_close(rows.flatten(), flat, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.reshape(6, 600), flat_gradient, rtol=2**-7, atol=1e-9)
        with pytest.raises(
            ValueError,
            match="must be separate rows, evenly spaced or in batches, to be overwritten, got shape",
        ):
            fused_diffusion_loss(
                sideways.to(device),
                y.view(2, 3),
                x.view(2, 3),
                4,
                1.0,
                1.0,
                impl="triton",
                overwrite_logits=True,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [600, 601, 604])
def test_rows_count_as_aligned_only_if_each_starts_on_16_bytes(vocab_size, dtype, device):
    # The interpreter does not mind a wide access off its boundary; a GPU stops.
    tile = triton_kernels.Tile(warps=1)
    for padding, phase in [(0, 0), (1, 0), (0, 1), (0, 4), (4, 0), (8, 8), (7, 1)]:
        logits, _ = strided_copy(
            torch.zeros(4, vocab_size, dtype=dtype, device=device), padding=padding, phase=phase
        )
        aligned = all(row.data_ptr() % 16 == 0 for row in logits)
        assert triton_kernels.tiles.tile_arguments(logits, tile)["ALIGNED"] == aligned


def test_gradient_rows_start_at_the_phase_of_the_logits_rows(device):
    for padding, phase in [(0, 0), (1, 0), (0, 3), (5, 7), (8, 8)]:
        logits, _ = strided_copy(
            torch.zeros(5, 603, dtype=torch.bfloat16, device=device), padding=padding, phase=phase
        )
        gradient = triton_kernels.empty_gradient_like(logits)
        for row in range(5):
            assert (gradient[row].data_ptr() - logits[row].data_ptr()) % 16 == 0
    assert triton_kernels.empty_gradient_like(torch.zeros(5, 603)).is_contiguous()
    logits, labels = torch.zeros(2, 600, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    shifted = torch.zeros(1201, device=device)[1:].view(2, 600)
    options = {"upstream": 1.0, "divisor": 1}
    with pytest.raises(ValueError, match="16-byte phase"):
        triton_kernels.launch_loss_and_gradient(
            logits, labels, labels, 0, 1.0, 1.0, gradient_out=shifted, **options
        )
    with pytest.raises(ValueError, match=r"gradient_out must have shape \(2, 600\), .* got \(2, 300\)"):
        triton_kernels.launch_loss_and_gradient(
            logits, labels, labels, 0, 1.0, 1.0, gradient_out=logits[:, :300], **options
        )
