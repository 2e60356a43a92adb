"""The terms of the loss in the Triton kernels, against the oracle: each alone, in pairs, on hostile rows."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from difftrain_kernels import triton_kernels
from difftrain_kernels.terms import PLAIN, Terms
from difftrain_kernels.triton_kernels.scores import scaling_of, slopes_of, units_of
from difftrain_kernels.triton_kernels.term_arguments import gradient_arguments, scoring_arguments
from kernel_terms import (
    CAP_ROUNDINGS,
    CELLS,
    EPS,
    PROPERTY,
    WAYS,
    WEIGHT_DTYPES,
    assert_near_oracle,
    every_term,
    expected_of,
    launch,
    on_device,
    problems,
)
from loss_problems import random_problem, rows_are, strided_copy

# numpy warns where hardware computes inf and NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = math.inf, math.nan


def check(problem, device):
    logits, buffer = strided_copy(
        problem["logits"].to(device), padding=problem["padding"], phase=problem["phase"]
    )
    y, x, mask_id = problem["y"].to(device), problem["x"].to(device), problem["mask_id"]
    terms = on_device(problem["terms"], device)
    pk, pm = (problem["pk"], problem["pm"]) if terms.case_weights is None else (1.0, 1.0)
    expected = expected_of(problem["logits"], y, x, mask_id, pk, pm, terms)
    found = launch(
        logits, y, x, mask_id, pk, pm, terms, way=problem["way"], upstream=problem["upstream"], divisor=8.0
    )
    scale = problem["upstream"] / 8.0
    assert_near_oracle(found, expected, problem["logits"], y, mask_id, terms, scale=scale)
    between = torch.ones_like(buffer, dtype=torch.bool)
    between.as_strided(logits.shape, logits.stride(), problem["phase"]).fill_(False)
    assert buffer[between].isnan().all(), "nothing outside the rows is written"


# Ten terms make 55 singles and pairs: as many examples here, and thousands behind the slow marker.
@settings(max_examples=55, **PROPERTY)
@given(problem=problems(4, st.integers(1, 80)))
def test_small_rows_of_any_two_terms_match_the_oracle(problem, device):
    with rows_are("small"):
        check(problem, device)


# A block is 256 to 512 logits here: no, one or several full blocks, with head and tail.
@settings(max_examples=40, **PROPERTY)
@given(problem=problems(2, st.sampled_from([1, 37, 255, 256, 257, 513, 1100])))
def test_streamed_rows_of_any_two_terms_match_the_oracle(problem, device):
    with rows_are("streamed"):
        check(problem, device)


@pytest.mark.slow
@settings(max_examples=2000, **PROPERTY)
@given(problem=problems(8, st.integers(1, 300)))
def test_many_small_rows_of_any_two_terms_match_the_oracle(problem, device):
    with rows_are("small"):
        check(problem, device)


@pytest.mark.slow
@settings(max_examples=600, **PROPERTY)
@given(problem=problems(3, st.integers(1, 1600)))
def test_many_streamed_rows_of_any_two_terms_match_the_oracle(problem, device):
    with rows_are("streamed"):
        check(problem, device)


def test_all_terms_at_once_match_the_oracle_whichever_way_the_gradient_is_made(family, device):
    vocab_size = 66 if family == "small" else 601
    made = []
    for way in WAYS:
        logits, y, x = random_problem(5, vocab_size, 9, torch.bfloat16, seed=8)
        terms = every_term(5, device)
        expected = expected_of(logits, y, x, 9, 1.0, 1.0, terms)
        found = launch(
            logits.to(device),
            y.to(device),
            x.to(device),
            9,
            terms=terms,
            way=way,
            upstream=0.5,
            divisor=3.0,
        )
        read = random_problem(5, vocab_size, 9, torch.bfloat16, seed=8)[0]
        assert_near_oracle(found, expected, read, y, 9, terms, scale=0.5 / 3.0)
        made.append(found.gradient.cpu().nan_to_num(7))
    assert all(torch.equal(made[0], gradient) for gradient in made[1:]), "the same bits"


def test_terms_that_are_all_off_leave_the_plain_losss_bits(family, device):
    logits, y, x = random_problem(5, 600, 9, torch.float32, seed=2)
    arguments = (logits.to(device), y.to(device), x.to(device), 9, 0.25, 0.5)
    off = Terms(logit_scale=1.0, label_smoothing=0.0, z_loss=0.0)
    plain, same = launch(*arguments), launch(*arguments, off)
    assert torch.equal(plain.statistics.columns, same.statistics.columns)
    assert torch.equal(plain.gradient, same.gradient)
    assert len(same.sums) == len(plain.sums) == 3
    ones = torch.ones(5, device=device)
    weighted = launch(*arguments, Terms(token_weights=ones, case_weights=(0.25, 1, 1, 0.5, 1, 1, 1, 1, 1)))
    assert torch.equal(weighted.statistics.columns[:6], plain.statistics.columns)
    assert torch.equal(weighted.gradient, plain.gradient)


# The weights.


@pytest.mark.parametrize("dtype", [*dict.fromkeys(WEIGHT_DTYPES), torch.int32, torch.uint8])
def test_a_token_weight_of_any_dtype_is_that_number(dtype, device):
    logits, y, x = random_problem(4, 40, 5, torch.float32)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0] if dtype == torch.bool else [3.0, 0.0, 1.0, 2.0])
    found, expected = (
        triton_kernels.launch_loss(
            logits.to(device), y.to(device), x.to(device), 5, terms=Terms(token_weights=w.to(device))
        )
        for w in (weights.to(dtype), weights)
    )
    assert torch.equal(found.columns, expected.columns)
    assert torch.equal(found.case, expected.case)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_token_weight_0_get_exact_zeros_whatever_they_hold(way, family, device):
    logits, y, x = random_problem(6, 300, 4, torch.bfloat16)
    y[:] = torch.tensor([0, 1, 10**12, 2, 3, 5])  # the third is no label either
    logits[::2] = torch.tensor([[NAN], [INF], [-INF]])
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0, -0.0, 2.0], device=device)
    found = launch(
        logits.to(device), y.to(device), x.to(device), 4, terms=Terms(token_weights=weights), way=way
    )
    assert (found.statistics.columns[:, ::2] == 0).all()
    assert (found.statistics.case[::2] == 9).all()
    assert (found.gradient[::2] == 0).all()
    assert found.statistics.columns.isfinite().all()
    assert (found.gradient[1::2] != 0).any(1).all()
    assert found.sums[0].sum() == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter's loads")
@pytest.mark.parametrize("way", WAYS[::2])
def test_rows_of_token_weight_0_are_not_read(way, family, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    logits, y, x = random_problem(4, 300, 4, torch.float32)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    first, size = logits.data_ptr(), logits.stride(0) * 4
    read = set()
    for name in ("create_load", "create_masked_load"):
        load = getattr(type(interpreter_builder), name)

        def watched(self, pointers, *rest, _load=load, _name=name):
            addresses = pointers.data.reshape(-1).astype(np.int64)
            if _name == "create_masked_load":
                addresses = addresses[rest[0].data.reshape(-1).astype(bool)]
            rows = (addresses - first) // size
            read.update(rows[(rows >= 0) & (rows < 4)].tolist())
            return _load(self, pointers, *rest)

        monkeypatch.setattr(type(interpreter_builder), name, watched)
    launch(logits, y.clamp(0), x, 4, terms=Terms(token_weights=weights), way=way)
    if way == WAYS[0] and family == "small":
        assert read == {0, 1, 2, 3}, "the gradient of small rows reads whole programs"
    else:
        assert read == {0, 2}


@pytest.mark.parametrize("way", WAYS[::2])
def test_a_token_weight_that_is_no_number_shows_in_its_own_row_alone(way, family, device):
    logits, _, x = random_problem(5, 300, 4, torch.float32)
    y = torch.arange(5, device=device)
    weights = torch.tensor([1.0, NAN, INF, -INF, 1.0], device=device)
    found = launch(logits.to(device), y, x.to(device), 4, terms=Terms(token_weights=weights), way=way)
    is_finite = [True, False, False, False, True]
    assert found.statistics.row_loss.isfinite().tolist() == is_finite
    assert found.gradient.isfinite().all(1).tolist() == is_finite
    assert not found.gradient[1:4].isfinite().any()


def test_the_gate_by_probability_is_the_papers_line_to_the_bit(family, device):
    # weight = 1 + (pk - 1) * p_mask where masked, 1 + (pm - 1) * p_mask where intact.
    logits, y, x = random_problem(24, 64, 5, torch.float32, seed=4)
    terms = Terms(gate="probability", rows=True)
    statistics = triton_kernels.launch_loss(
        logits.to(device), y.to(device), x.to(device), 5, 0.25, 0.5, terms=terms
    )
    nll, p_mask = (statistics.column(name, terms) for name in ("NLL", "P_MASK"))
    kind = statistics.case // 3
    weight = torch.where(
        kind == 0, 1 + (0.25 - 1) * p_mask, torch.where(kind == 1, 1 + (0.5 - 1) * p_mask, 1.0)
    )
    assert set(kind.tolist()) == {0, 1, 2, 3}
    assert torch.equal(statistics.row_loss, weight * nll)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensor"])
def test_each_case_has_its_own_weight(as_tensor, family, device):
    # Every kind with every answer, but for a corrupted one whose target is not [MASK].
    mask_id, vocab_size = 2, 40
    x = torch.tensor([2, 2, 2, 5, 5, 5, 7, 7, 7])
    y = torch.tensor([5, 5, 5, 5, 5, 5, 5, 5, 5])
    logits = torch.zeros(9, vocab_size)
    logits[torch.arange(9), torch.tensor([2, 5, 8] * 3)] = 3.0
    cells = torch.tensor(CELLS).view(3, 3).to(device) if as_tensor else CELLS
    statistics = triton_kernels.launch_loss(
        logits.to(device), y.to(device), x.to(device), mask_id, terms=Terms(case_weights=cells)
    )
    assert statistics.case.tolist() == list(range(9))
    assert torch.equal(statistics.row_loss.cpu(), statistics.column("NLL").cpu() * torch.tensor(CELLS))


# The changes of the logits.


@triton.jit
def _tanh_kernel(in_ptr, unit_ptr, slope_ptr, terms, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(in_ptr + offsets)
    scaling = scaling_of(terms)
    tl.store(unit_ptr + offsets, units_of(values, scaling, terms))
    tl.store(slope_ptr + offsets, slopes_of(values, scaling))


def test_tanh_and_its_slope_are_exact_to_a_few_roundings(device):
    line, small = torch.linspace(-13, 13, 2**16), torch.logspace(-30, 1, 2**15)
    values = torch.cat([line, small, -small]).to(device)
    units, slopes = torch.empty_like(values), torch.empty_like(values)
    _tanh_kernel[(len(values) // 4096,)](
        values, units, slopes, gradient_arguments(Terms(softcap=1.0)), BLOCK=4096
    )
    a = values.double().cpu().numpy()
    roundings = np.abs(units.double().cpu().numpy() - np.tanh(a)) / np.abs(np.tanh(a)) / EPS
    assert roundings.max() <= CAP_ROUNDINGS - 3, "three products are still to come"
    exact = 1 / np.cosh(a) ** 2
    error = np.abs(slopes.double().cpu().numpy() - exact) / exact / EPS
    assert (error <= 6 + 4 * np.abs(a)).all()
    ends = torch.tensor([INF, -INF, 3e38, -3e38, 0.0, NAN, *[1.0] * 4090], device=device)
    units, slopes = torch.empty_like(ends), torch.empty_like(ends)
    _tanh_kernel[(1,)](ends, units, slopes, gradient_arguments(Terms(softcap=1.0)), BLOCK=4096)
    assert units[:5].tolist() == [1, -1, 1, -1, 0]
    assert slopes[:5].tolist() == [pytest.approx(0, abs=1e-25)] * 4 + [1]
    assert units[5].isnan()
    assert slopes[5].isnan()


def test_capped_lanes_beyond_the_row_add_nothing(family, device):
    # All logits at the floor of the cap: whatever else is summed would weigh as much as they do.
    for vocab_size in (1, 5, 33, 300):
        rows, _ = strided_copy(torch.full((2, vocab_size), -1e6, device=device), phase=1, padding=1)
        y = torch.tensor([0, vocab_size - 1], device=device)
        terms = Terms(softcap=30.0, rows=True, entropy=True, label_smoothing=0.2)
        found = launch(rows, y, y, 0, terms=terms)
        for name in ("NLL", "WEIGHTED", "ENTROPY"):
            got = found.statistics.column(name, terms).cpu()
            np.testing.assert_allclose(got, math.log(vocab_size), rtol=1e-6, atol=1e-7)


def test_a_cap_makes_numbers_of_infinities(family, device):
    # At the target, elsewhere, everywhere.
    logits = torch.linspace(-1, 1, 300).repeat(6, 1)
    for row, content in enumerate((INF, INF, INF, -INF, -INF, -INF)):
        logits[row, slice(None) if row % 3 == 2 else 7] = content
    y = torch.tensor([7, 1, 1] * 2)
    terms = Terms(softcap=5.0, rows=True)
    expected = expected_of(logits, y, y, 9, 1.0, 1.0, terms)
    found = launch(logits.to(device), y.to(device), y.to(device), 9, terms=terms)
    assert np.isfinite(expected.row_loss).all()
    assert_near_oracle(found, expected, logits, y, 9, terms)


@pytest.mark.parametrize("place", [0, 150, 299], ids=["first", "middle", "last"])
def test_a_forbidden_mask_takes_part_in_nothing_whatever_its_logit(place, family, device):
    logits, _, _ = random_problem(4, 300, place, torch.float32, seed=1)
    y, x = torch.tensor([1, 7, 149, 298]), torch.tensor([place, place, 2, 298])
    terms = Terms(forbid_mask=True, rows=True, entropy=True, label_smoothing=0.1)
    logits[:, place] = -INF
    rows, _ = strided_copy(logits.to(device), phase=3, padding=1)
    lowest = launch(rows, y.to(device), x.to(device), place, terms=terms)
    rows[:, place] = torch.tensor([NAN, INF, 99.0, rows[3].max()])
    found = launch(rows, y.to(device), x.to(device), place, terms=terms)
    assert torch.equal(found.statistics.columns, lowest.statistics.columns)
    assert torch.equal(found.statistics.case, lowest.statistics.case)
    assert torch.equal(found.gradient, lowest.gradient)
    assert (found.gradient[:, place] == 0).all()
    assert found.statistics.column("NLL").isfinite().all()


def test_a_forbidden_target_poisons_only_its_own_row(family, device):
    logits, _, _ = random_problem(3, 300, 6, torch.float32)
    y = torch.tensor([1, 6, 2], device=device)
    for way in WAYS:
        found = launch(logits.clone().to(device), y, y, 6, terms=Terms(forbid_mask=True), way=way)
        assert found.statistics.row_loss.isnan().tolist() == [False, True, False]
        others = torch.cat([found.gradient[:, :6], found.gradient[:, 7:]], 1)
        assert others.isnan().all(1).tolist() == [False, True, False]
        assert (found.gradient[:, 6] == 0).all()
    alone = launch(torch.zeros(2, 1, device=device), y[:2] * 0, y[:2], 0, terms=Terms(forbid_mask=True))
    assert alone.statistics.row_loss.isnan().all(), "no word is left"
    assert (alone.gradient == 0).all()


@pytest.mark.parametrize("offset", [0.0, 6e4, 1e6])
def test_offsets_cost_no_accuracy_with_terms(offset, family, device):
    spread = max(2.0, offset * 2**-22)  # as much as fp32 can still tell apart
    logits, y, x = random_problem(6, 700, 699, torch.float32, spread=spread)
    logits = (logits.double() + offset).float()
    terms = Terms(
        label_smoothing=0.1, rows=True, entropy=True, token_weights=torch.full((6,), 1.5, device=device)
    )
    expected = expected_of(logits, y, x, 699, 0.25, 0.5, terms)
    found = launch(logits.to(device), y.to(device), x.to(device), 699, 0.25, 0.5, terms)
    assert_near_oracle(found, expected, logits, y, 699, terms)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(label_smoothing=0.1, z_loss=0.1, rows=True, entropy=True),
        Terms(gate="probability", logit_scale=8.0, forbid_mask=True, rows=True, entropy=True),
    ],
    ids=["sums", "scores"],
)
def test_infinities_and_nan_do_as_the_oracle_does(terms, family, device):
    # One logit or a whole row of each; at [MASK] where it is the first or the last word.
    logits = torch.linspace(-1, 1, 300).repeat(9, 1)
    for row, content in enumerate((NAN, INF, -INF)):
        logits[row, 0] = logits[3 + row, 299] = content
        logits[6 + row] = content
    y, x = torch.full((9,), 1), torch.full((9,), 7)
    for mask_id in (0, 299):
        expected = expected_of(logits, y, x, mask_id, 0.25, 0.5, terms)
        found = launch(logits.to(device), y.to(device), x.to(device), mask_id, 0.25, 0.5, terms)
        for name in ("ROW_LOSS", "NLL", "LSE", "P_MASK", "CONFIDENCE", "ENTROPY"):
            got = found.statistics.column(name, terms).cpu()
            np.testing.assert_allclose(
                got, getattr(expected, name.lower()), rtol=1e-5, atol=1e-6, err_msg=name
            )
        np.testing.assert_allclose(found.gradient.cpu(), expected.gradient, rtol=1e-5, atol=1e-7)


def test_an_infinite_loss_has_a_finite_gradient_with_smoothing(family, device):
    logits = torch.zeros(2, 300, device=device)
    logits[:, 5] = -INF
    y = torch.tensor([5, 6], device=device)
    found = launch(logits, y, y, 9, terms=Terms(label_smoothing=0.1))
    assert found.statistics.row_loss.tolist() == [INF, INF], "as torch defines the smoothed loss"
    assert found.gradient.isfinite().all()
    assert found.gradient[1, 5].item() == pytest.approx(-0.1 / 300)


def test_a_label_outside_the_vocabulary_spoils_no_more_than_its_nll(family, device):
    logits, y, x = random_problem(3, 300, 4, torch.float32, seed=5)
    y[:] = torch.tensor([1, 300, 2])
    terms = Terms(rows=True, entropy=True, z_loss=0.1)
    statistics = triton_kernels.launch_loss(logits.to(device), y.to(device), x.to(device), 4, terms=terms)
    expected = expected_of(logits, y, x, 4, 1.0, 1.0, terms)
    assert statistics.row_loss.isnan().tolist() == [False, True, False]
    assert statistics.column("NLL").isnan().tolist() == [False, True, False]
    for name in ("LSE", "P_MASK", "CONFIDENCE", "ENTROPY"):
        np.testing.assert_allclose(
            statistics.column(name, terms).cpu(), getattr(expected, name.lower()), rtol=1e-5, atol=1e-7
        )


# Memory.


@pytest.mark.parametrize("way", WAYS)
def test_every_output_element_is_written_with_terms(way, family, device, monkeypatch):
    vocab_size = 66 if family == "small" else 601
    logits, y, x = random_problem(6, vocab_size, 4, torch.bfloat16)
    y = torch.where(y == 4, 5, y)
    y[0] = -1
    terms = on_device(every_term(6, "cpu"), device)
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(NAN if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = launch(logits.to(device), y.to(device), x.to(device), 4, terms=terms, way=way)
    columns = found.statistics.columns
    assert len(columns) == triton_kernels.n_statistics(terms) == 16
    assert columns[[i for i in range(16) if i != 2]].isfinite().all(), "all but the gap from -inf"
    assert found.gradient.isfinite().all()
    assert ((found.statistics.case >= 0) & (found.statistics.case <= 9)).all()
    assert all(part.isfinite().all() for part in found.sums[:2] + found.sums[3:])


def test_columns_keep_their_places_and_come_only_where_terms_need_them():
    plain = ("ROW_LOSS", "NLL", "GAP", "SHIFT", "PER_TOTAL", "REST")
    assert triton_kernels.columns(PLAIN) == plain
    weights = torch.ones(2)
    for terms, more in [
        (Terms(case_weights=CELLS, logit_scale=2.0, softcap=3.0, forbid_mask=True), ()),
        (Terms(token_weights=weights), ("WEIGHTED",)),
        (Terms(gate="probability"), ("P_MASK", "P_TARGET")),
        (Terms(z_loss=0.1), ("Z", "TARGET_TERM")),
        (Terms(label_smoothing=0.1), ("WEIGHTED", "SMOOTHING", "TARGET_TERM", "UNIFORM")),
        (Terms(rows=True), ("P_MASK", "LSE", "CONFIDENCE")),
        (Terms(rows=True, entropy=True), ("P_MASK", "LSE", "CONFIDENCE", "ENTROPY")),
    ]:
        assert triton_kernels.columns(terms) == plain + more
        assert triton_kernels.n_statistics(terms) == 6 + len(more)


def test_new_values_of_terms_compile_nothing_anew():
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    def key(terms):
        return str(native_specialize_impl(BaseBackend, scoring_arguments(terms, 6), False, True, True))

    def numbers(x):
        return Terms(case_weights=(x,) * 9, softcap=x, label_smoothing=x / 9, z_loss=x, logit_scale=x)

    def tensors(x):
        weights = torch.full((2, 1), x).expand(2, 3)
        return Terms(token_weights=weights, case_weights=torch.full((3, 3), x), logit_scale=torch.tensor(x))

    for terms in (numbers, tensors):
        assert len({key(terms(x)) for x in (0.5, 1.0, 2.0, 1 + 1e-9, 8.0)}) == (
            2 if terms is numbers else 1
        )
    assert key(numbers(1.0)) != key(numbers(2.0)), "a scale of 1 is none"
    assert scoring_arguments(Terms(), 6) == scoring_arguments(PLAIN, 6)
