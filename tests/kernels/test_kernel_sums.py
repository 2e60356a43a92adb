"""What is made of rows after the pass: the whole rows of slices of a vocabulary, and the sums of the case table."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difftrain_kernels import triton_kernels
from difftrain_kernels.terms import PLAIN, Terms
from difftrain_kernels.triton_kernels import case_sums
from difftrain_kernels.triton_kernels.device import is_interpreted
from difftrain_kernels.triton_kernels.row_statistics import n_statistics
from kernel_terms import (
    CELLS,
    PROPERTY,
    assert_near_oracle,
    every_term,
    expected_of,
    in_slices,
    launch,
    on_device,
    problems,
)
from loss_problems import random_problem, rows_are

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = math.inf, math.nan


# Slices.


def check_slices(problem, cuts, device):
    logits, y, x = (problem[key].to(device) for key in ("logits", "y", "x"))
    mask_id, vocab_size = problem["mask_id"], problem["logits"].shape[1]
    terms = on_device(problem["terms"], device)
    pk, pm = (problem["pk"], problem["pm"]) if terms.case_weights is None else (1.0, 1.0)
    edges = sorted({0, vocab_size, *(cut % vocab_size for cut in cuts)})
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    expected = expected_of(problem["logits"], y, x, mask_id, pk, pm, terms)
    found = in_slices(
        logits, y, x, mask_id, pk, pm, terms, sizes, upstream=problem["upstream"], divisor=8.0
    )
    scale = problem["upstream"] / 8.0
    assert_near_oracle(found, expected, problem["logits"], y, mask_id, terms, scale=scale)


# The cuts are at [MASK], beside it, and anywhere; thousands behind the slow marker.
@settings(max_examples=40, **PROPERTY)
@given(problem=problems(3, st.integers(2, 40)), cuts=st.lists(st.integers(0, 39), max_size=3))
def test_slices_of_small_rows_with_any_two_terms_match_the_oracle(problem, cuts, device):
    with rows_are("small"):
        check_slices(problem, [*cuts, problem["mask_id"], problem["mask_id"] + 1], device)


@settings(max_examples=12, **PROPERTY)
@given(problem=problems(2, st.sampled_from([300, 601])), cuts=st.lists(st.integers(0, 600), max_size=1))
def test_slices_of_streamed_rows_with_any_two_terms_match_the_oracle(problem, cuts, device):
    with rows_are("streamed"):
        check_slices(problem, [*cuts, problem["mask_id"]], device)


@pytest.mark.slow
@settings(max_examples=600, **PROPERTY)
@given(problem=problems(3, st.integers(2, 400)), cuts=st.lists(st.integers(0, 399), max_size=4))
def test_many_slices_with_any_two_terms_match_the_oracle(problem, cuts, device):
    for family in ("small", "streamed"):
        with rows_are(family):
            check_slices(problem, [*cuts, problem["mask_id"], problem["mask_id"] + 1], device)


def test_slices_with_all_terms_match_the_oracle(family, device):
    logits, y, x = random_problem(6, 64, 9, torch.float32, seed=8)
    terms = every_term(6, device)
    expected = expected_of(logits, y, x, 9, 1.0, 1.0, terms)
    found = in_slices(logits.to(device), y.to(device), x.to(device), 9, 1.0, 1.0, terms, [9, 1, 30, 24])
    assert_near_oracle(found, expected, logits, y, 9, terms)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(label_smoothing=0.1, z_loss=0.1, rows=True, entropy=True),
        Terms(gate="probability", forbid_mask=True, rows=True, entropy=True, label_smoothing=0.1),
        Terms(softcap=9.0, rows=True, entropy=True, label_smoothing=0.1),
    ],
    ids=["sums", "scores", "capped"],
)
def test_slices_treat_infinities_and_bad_labels_as_whole_rows(terms, family, device):
    logits = torch.linspace(-1, 1, 36).repeat(8, 1)
    logits[0, 3], logits[1, 20], logits[2, 30] = NAN, INF, -INF
    logits[3, 12:24], logits[4, :12], logits[5] = -INF, -INF, -INF
    y = torch.tensor([1, 1, 1, 1, 13, 1, 36, -7], device=device)
    x = torch.full_like(y, 20)
    arguments = (logits.to(device), y, x, 20, 0.25, 0.5, terms)
    whole, found = launch(*arguments), in_slices(*arguments, [12, 12, 12])
    assert torch.equal(found.statistics.case, whole.statistics.case)
    for name in ("ROW_LOSS", "NLL", "LSE", "P_MASK", "CONFIDENCE", "ENTROPY"):
        got, expected = (part.statistics.column(name, terms) for part in (found, whole))
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=1e-6, equal_nan=True, msg=name)
    torch.testing.assert_close(found.gradient, whole.gradient, rtol=3e-6, atol=1e-8, equal_nan=True)


def test_a_slice_tells_no_more_than_its_terms_need():
    for terms, size in [
        (PLAIN, 5),
        (Terms(gate="probability", z_loss=0.1, softcap=3.0, rows=True), 5),
        (Terms(label_smoothing=0.1), 7),
        (Terms(rows=True, entropy=True), 6),
        (Terms(rows=True, entropy=True, label_smoothing=0.1), 8),
    ]:
        assert triton_kernels.message_size(terms) == size


# The case table.


@pytest.mark.parametrize("n", [1, 512, 513])
@pytest.mark.parametrize("gate", ["argmax", "probability"])
def test_weighted_sums_over_whole_and_partial_blocks_of_rows(gate, n, device):
    logits, y, x = random_problem(n, 3, 1, torch.float32, seed=n)
    weights = (torch.arange(n) % 5 - 1).double()
    terms = Terms(
        token_weights=weights.to(device), gate=gate, label_smoothing=0.25, z_loss=0.125, case_weights=CELLS
    )
    statistics = triton_kernels.launch_loss(logits.to(device), y.to(device), x.to(device), 1, terms=terms)
    counts, nll, gap, weighted, smoothing, z = triton_kernels.launch_case_sums(statistics, terms)
    expected = expected_of(logits, y, x, 1, 1.0, 1.0, terms)
    close = {"rtol": 1e-5, "atol": 1e-5 * math.sqrt(n)}
    assert counts.tolist() == expected.counts.tolist()
    np.testing.assert_allclose(nll.cpu(), expected.nll_sums, **close)
    np.testing.assert_allclose(gap.cpu(), expected.gap_sums, **close)
    np.testing.assert_allclose(weighted.cpu(), expected.weighted_sums, **close)
    np.testing.assert_allclose(smoothing.cpu(), expected.smoothing_sums, **close)
    np.testing.assert_allclose(z.cpu(), expected.z_sum, **close)
    # The table's own sum is the loss: at its nine weights nothing else is needed.
    loss = (weighted.double().cpu() * torch.tensor(CELLS).view(3, 3).double()).sum() + z.cpu()
    np.testing.assert_allclose(loss, statistics.row_loss.double().sum().cpu(), **close)
    again = triton_kernels.launch_case_sums(statistics, terms)
    assert all(
        torch.equal(a, b) for a, b in zip((counts, nll, gap, weighted, smoothing, z), again, strict=True)
    )


def test_sums_come_only_where_terms_change_the_table(device):
    logits, y, x = random_problem(4, 40, 1, torch.float32)
    for terms, size in [
        (PLAIN, 3),
        (Terms(case_weights=CELLS, softcap=3.0, logit_scale=2.0, forbid_mask=True, rows=True), 3),
        (Terms(z_loss=0.1), 6),
        (Terms(gate="probability"), 6),
        (Terms(token_weights=torch.ones(4, device=device)), 6),
        (Terms(label_smoothing=0.1), 6),
    ]:
        statistics = triton_kernels.launch_loss(
            logits.to(device), y.to(device), x.to(device), 1, terms=terms
        )
        sums = triton_kernels.launch_case_sums(statistics, terms)
        assert len(sums) == size
        if size == 6 and terms.gate == "argmax" and not terms.label_smoothing:
            assert torch.equal(sums[3], sums[1]), "without weights the weighted sums are the nll's"


def test_an_infinite_nll_is_shared_without_nan(device):
    # Its own answer has probability 0, and 0 times infinity is NaN.
    logits = torch.zeros(1, 40, device=device)
    logits[0, 5] = -INF
    y, x = torch.tensor([5], device=device), torch.tensor([1], device=device)
    terms = Terms(gate="probability")
    statistics = triton_kernels.launch_loss(logits, y, x, 1, terms=terms)
    weighted = triton_kernels.launch_case_sums(statistics, terms)[3]
    assert weighted.tolist() == [[INF, 0, INF], [0, 0, 0], [0, 0, 0]]


def random_statistics(n, device, terms=PLAIN, seed=0):
    """Statistics of rows of every case, and of numbers whose sum hangs on the order of additions."""
    generator = torch.Generator().manual_seed(seed)
    case = torch.randint(0, 10, (n,), generator=generator, dtype=torch.int32)
    columns = torch.randn(n_statistics(terms), n, generator=generator, dtype=torch.float32).exp()
    return triton_kernels.RowStatistics(case.to(device), columns.to(device))


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SUMMED = {"plain": PLAIN, "terms": Terms(gate="probability", z_loss=0.1, label_smoothing=0.1)}


@pytest.mark.parametrize("terms", SUMMED)
def test_sums_are_the_same_bits_whatever_the_grid(terms, device):
    terms = SUMMED[terms]
    statistics = random_statistics(4 * case_sums.BLOCK + 77, device, terms)
    whole = triton_kernels.launch_case_sums(statistics, terms)
    assert all(part.isfinite().all() and part.count_nonzero() for part in whole)
    for programs in (1, 2, 3, 9):
        assert_same_bits(triton_kernels.launch_case_sums(statistics, terms, programs=programs), whole)


@pytest.mark.parametrize("terms", SUMMED)
def test_a_block_of_rows_is_added_for_itself_and_the_blocks_in_their_order(terms, device):
    terms, size = SUMMED[terms], case_sums.BLOCK
    statistics = random_statistics(2 * size, device, terms)
    halves = [
        triton_kernels.launch_case_sums(
            triton_kernels.RowStatistics(statistics.case[part], statistics.columns[:, part].contiguous()),
            terms,
        )
        for part in (slice(0, size), slice(size, None))
    ]
    added = [first + second for first, second in zip(*halves, strict=True)]
    assert_same_bits(triton_kernels.launch_case_sums(statistics, terms), added)


def test_the_sums_of_no_rows_are_0(device):
    sums = triton_kernels.launch_case_sums(random_statistics(0, device))
    assert not any(part.count_nonzero() for part in sums)


@pytest.mark.parametrize("terms", SUMMED)
@pytest.mark.parametrize(("n", "launches"), [(1, 1), (case_sums.BLOCK, 1), (case_sums.BLOCK + 1, 2)])
def test_the_table_takes_one_launch_for_a_block_of_rows_and_two_for_more(
    n, launches, terms, device, monkeypatch
):
    found = []
    kernels = {name: kernel for name, kernel in vars(case_sums).items() if name.endswith("_kernel")}

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            found.append(grid)
            return self.kernel[grid]

    for name, kernel in kernels.items():
        monkeypatch.setattr(case_sums, name, Recorded(kernel))
    triton_kernels.launch_case_sums(random_statistics(n, device, SUMMED[terms]), SUMMED[terms])
    assert len(found) == launches


@pytest.mark.skipif(not is_interpreted(), reason="counts what Triton's interpreter does")
def test_262144_rows_are_added_in_at_most_16_dependent_steps(monkeypatch):
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    start, load, launches = builder.set_grid_dim, builder.create_masked_load, []

    def started(self, *grid):
        launches.append(Counter())
        return start(self, *grid)

    def counted(self, *arguments):
        launches[-1][self.grid_idx] += 1
        return load(self, *arguments)

    monkeypatch.setattr(builder, "set_grid_dim", started)
    monkeypatch.setattr(builder, "create_masked_load", counted)

    def longest(n):
        """Of each launch, the loads of the program that makes the most."""
        launches.clear()
        triton_kernels.launch_case_sums(random_statistics(n, "cpu"))
        return [max(loads.values()) for loads in launches]

    one_step = longest(case_sums.BLOCK + 1)
    steps = [many / one for many, one in zip(longest(262144), one_step, strict=True)]
    assert steps == [1, 1]
    assert sum(steps) <= 16
