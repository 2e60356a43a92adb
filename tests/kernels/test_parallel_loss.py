"""The loss of a split vocabulary against the oracle and the loss of whole rows: kernels, then processes."""

import importlib.util
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

import oracle
from difftrain_kernels import fused_diffusion_loss, vocab_parallel_diffusion_loss
from processes import run_in_processes

pytestmark = [
    pytest.mark.xdist_group("processes"),
    # numpy warns where hardware computes inf and NaN in silence.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

INF, NAN = math.inf, math.nan
IMPLS = ["reference", "triton"] if importlib.util.find_spec("triton") else ["reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Unit roundoff of the gradient, beside 1.2e-6 of fp32 arithmetic.
ROUNDING = {torch.float64: 0, torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OFFSETS = (-1e6, 6e4, 1e6)
# Columns of each process. Odd starts, a lone column, a process without any, and an even split.
SPLITS = {2: [(30, 25), (1, 54), (55, 0)], 4: [(20, 0, 31, 4), (14, 14, 14, 13)]}


def ids_of(sizes):
    return "+".join(map(str, sizes))


# Problems ------------------------------------------------------------------------------------------


def mask_ids(sizes):
    """The first and the last column of every slice."""
    ends = np.cumsum(sizes)
    return sorted({int(c) for s, e in zip(sizes, ends, strict=True) if s for c in (e - s, e - 1)})


def tied_problem(vocab_size, mask_id, dtype, *, n=60, seed=0, offset=0.0, spread=2.0):
    """Logits of few levels, so that most maxima are tied, with every kind of position and ignored ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab_size, generator=generator, dtype=torch.float64).round() * spread
    logits[::2, mask_id] = logits[::2].amax(1)
    y = torch.randint(0, vocab_size, (n,), generator=generator)
    logits[::3].scatter_(1, y[::3, None], logits[::3].amax(1, keepdim=True))
    x = torch.where(torch.arange(n) % 5 < 2, mask_id, y)
    corrupted = torch.arange(n) % 5 == 4
    x = torch.where(corrupted, (y + 1) % vocab_size, x)
    y = torch.where(corrupted, mask_id, y)
    y[6::7] = -1
    return (logits + offset).to(dtype), y, x


def all_rows(vocab_size, levels, mask_id):
    """Every row of so many logits out of ``levels``, each as masked, intact and corrupted position."""
    rows = torch.tensor(list(product(levels, repeat=vocab_size)), dtype=torch.float32)
    n = len(rows)
    word = (torch.arange(n) % (vocab_size - 1) + mask_id + 1) % vocab_size  # any but [MASK]
    y = torch.cat([word, word, torch.full((n,), mask_id)])
    x = torch.cat([torch.full((n,), mask_id), word, word])
    return rows.repeat(3, 1), y, x


SPECIAL_ROWS = torch.tensor(
    [
        [-INF, 1.0, 0.0, -INF, 2.0, 0.5],  # -inf, also at targets
        [-INF, -INF, -INF, -INF, -INF, -INF],
        [-INF, -INF, -INF, 1.0, 0.0, 1.0],  # a slice of -inf alone
        [1.0, 0.0, 1.0, -INF, -INF, -INF],
        [0.0, NAN, 3.0, 1.0, 0.0, 0.0],
        [0.0, 1.0, 3.0, 1.0, NAN, 0.0],
        [NAN, NAN, NAN, NAN, NAN, NAN],
        [0.0, 1.0, INF, 1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 1.0, INF, 0.0],
        [0.0, INF, 0.0, 1.0, INF, NAN],
        [NAN, 0.0, 0.0, INF, 0.0, 0.0],
    ]
)


def special_problem(mask_id, labels=(*range(6), -1, -2, 6, 2**40)):
    """Each special row with each label, ignored ones and ones outside the vocabulary among them."""
    y = torch.tensor(labels).repeat_interleave(len(SPECIAL_ROWS))
    x = torch.where(torch.arange(len(y)) % 2 == 0, mask_id, y)
    return SPECIAL_ROWS.repeat(len(labels), 1), y, x


def assert_is_loss_of(rows, y, x, mask_id, found, *, upstream=1.0, offset_error=0.0):
    """Row losses, gradient and table are the oracle's; NaN and inf are where it has them."""
    loss, gradient, cases = found
    expected = oracle.diffusion_loss(rows.double(), y, x, mask_id, 0.25, 0.5)
    fp64 = rows.dtype == torch.float64
    rtol = 1e-14 if fp64 else 3e-6
    np.testing.assert_allclose(loss.double(), expected.row_loss, rtol=rtol, atol=rtol + offset_error)
    exact = expected.gradient * np.broadcast_to(np.asarray(upstream), (len(y),))[:, None]
    rounding = ROUNDING[rows.dtype] + (1e-14 if fp64 else 1.2e-6)
    atol = {torch.float64: 1e-16, torch.float16: 2**-25}.get(rows.dtype, 1e-9) + offset_error
    np.testing.assert_allclose(gradient.double(), exact, rtol=rounding, atol=atol)
    assert not gradient[y == -1].any()
    assert cases.counts.tolist() == expected.counts.tolist()
    assert cases.n_positions == len(y)
    np.testing.assert_allclose(cases.nll, expected.nll_sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cases.gap, expected.gap_sums, rtol=1e-6, atol=1e-6)


# The kernels, slice by slice in this process -------------------------------------------------------


def by_kernels(rows, y, x, mask_id, sizes, device, upstream=1.0):
    """Row losses, whole gradient and table from the two kernels, without any exchange."""
    from difftrain_kernels import CaseTable, triton_kernels

    rows, y, x = rows.to(device), y.to(device), x.to(device)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    slices = [
        (start, rows[:, start : start + size]) for start, size in zip(starts, sizes, strict=True) if size
    ]
    messages = torch.stack(
        [triton_kernels.launch_slice(part, y, mask_id, start=start) for start, part in slices]
    )
    statistics = triton_kernels.launch_combine(messages, y, x, mask_id, 0.25, 0.5, vocab_size=sum(sizes))
    upstream = torch.as_tensor(upstream, device=device)
    gradient = [
        triton_kernels.launch_gradient(part, y - start, statistics, upstream, divisor=1.0)
        for start, part in slices
    ]
    cases = CaseTable(*(t.cpu() for t in triton_kernels.launch_case_sums(statistics)), len(y))
    return statistics.row_loss.cpu(), torch.cat(gradient, 1).cpu(), cases


needs_triton = pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("sizes", [(1, 54), (20, 0, 31, 4)], ids=ids_of)
def test_kernels_on_slices_make_the_loss_of_whole_rows(sizes, dtype, family, device):
    for mask_id in mask_ids(sizes)[::4]:
        problem = tied_problem(55, mask_id, dtype, n=10)
        upstream = torch.rand(10)
        found = by_kernels(*problem, mask_id, sizes, device, upstream)
        assert_is_loss_of(*problem, mask_id, found, upstream=upstream)


@needs_triton
def test_long_slices_of_any_phase_make_the_loss_of_whole_rows(device):
    from loss_problems import rows_are

    with rows_are("streamed"):
        problem = tied_problem(4711, 2000, torch.bfloat16, n=4)
        found = by_kernels(*problem, 2000, (1999, 2, 2710), device)
    assert_is_loss_of(*problem, 2000, found)


@needs_triton
@pytest.mark.parametrize("mask_id", [0, 2, 4])
def test_kernels_find_the_first_of_all_ties_across_slices(mask_id, device):
    problem = all_rows(5, [0.0, 1.0], mask_id)
    assert_is_loss_of(*problem, mask_id, by_kernels(*problem, mask_id, (2, 1, 2), device))


@needs_triton
def test_kernels_treat_infinities_nan_and_bad_labels_as_whole_rows(family, device):
    problem = special_problem(4, (0, 4, -1, 6))
    assert_is_loss_of(*problem, 4, by_kernels(*problem, 4, (1, 2, 3), device))


@needs_triton
@pytest.mark.parametrize("offset", OFFSETS)
def test_kernels_keep_their_digits_at_any_offset(offset, device):
    problem = tied_problem(55, 40, torch.float32, n=30, offset=offset)
    assert_is_loss_of(*problem, 40, by_kernels(*problem, 40, (20, 31, 4), device))


# Processes -----------------------------------------------------------------------------------------


def share_of(rank, sizes, rows, device):
    """This process's columns, inside the whole rows: odd starts, strides that are not V_r."""
    start = sum(sizes[:rank])
    return rows.to(device)[:, start : start + sizes[rank]]


def loss_of_share(rank, sizes, rows, y, x, mask_id, upstream=None, **options):
    """(loss, gradient of the share, table) on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = share_of(rank, sizes, rows, device).detach().requires_grad_()
    loss, cases = vocab_parallel_diffusion_loss(
        share, y.to(device), x.to(device), mask_id, 0.25, 0.5,
        slice_sizes=sizes, return_cases=True, **options,
    )  # fmt: skip
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss))
    assert share.grad.dtype == rows.dtype
    assert loss.dtype == (torch.float64 if rows.dtype == torch.float64 else torch.float32)
    cases = type(cases)(cases.counts.cpu(), cases.nll.cpu(), cases.gap.cpu(), cases.n_positions)
    return loss.detach().cpu(), share.grad.cpu(), cases


def upstream_of(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(5))


def work(rank):
    """Everything a process computes, by name of the test that looks at it; one start for all tests."""
    found, n = {}, dist.get_world_size()
    problems = list(product(["reference"], SPLITS[n], DTYPES))
    if "triton" in IMPLS:  # once: the interpreter is slow, and the kernels' own tests need no processes
        problems.append(("triton", SPLITS[n][0], torch.bfloat16))
    for impl, sizes, dtype in problems:
        for mask_id in mask_ids(sizes)[:: 1 if impl == "reference" else 4]:
            found["ties", impl, sizes, dtype, mask_id] = loss_of_share(
                rank, sizes, *tied_problem(55, mask_id, dtype), mask_id, upstream_of(60),
                reduction="none", impl=impl,
            )  # fmt: skip
    for impl in IMPLS:
        for reduction in ("mean", "sum"):
            found["reductions", impl, reduction] = loss_of_share(
                rank, SPLITS[n][0], *tied_problem(55, 3, torch.float32), 3, torch.tensor(0.3),
                reduction=reduction, impl=impl,
            )  # fmt: skip
        found["empty", impl] = loss_of_share(
            rank, SPLITS[n][0], *(t[:0] for t in tied_problem(55, 3, torch.float32)), 3,
            reduction="mean", impl=impl,
        )  # fmt: skip
    for offset in OFFSETS:
        found["offsets", offset] = loss_of_share(
            rank, SPLITS[n][0], *tied_problem(55, 40, torch.float32, offset=offset), 40, reduction="none"
        )
    sizes = (2, 4) if n == 2 else (0, 1, 2, 3)
    for mask_id in range(6):
        found["special", mask_id] = loss_of_share(
            rank, sizes, *special_problem(mask_id), mask_id, reduction="none"
        )
    for mask_id in range(6):
        found["all ties", mask_id] = loss_of_share(
            rank, sizes, *all_rows(6, [0.0, 1.0], mask_id), mask_id, reduction="none"
        )
    found["collectives"] = count_collectives(rank, SPLITS[n][0])
    found["shapes"] = shapes(rank, SPLITS[n][0])
    found["group"] = by_subgroup(rank)
    found["refusals"] = refusals(rank, SPLITS[n][0])
    found["head"] = column_parallel_head(rank, n)
    found["dtensor"] = by_dtensor(rank, n)
    return found


def count_collectives(rank, sizes):
    """Collectives in forward and in backward, as the profiler sees them."""
    rows, y, x = tied_problem(55, 3, torch.float32)
    share = share_of(rank, sizes, rows, "cpu").requires_grad_()
    counts = []
    with torch.profiler.profile() as profile:
        loss = vocab_parallel_diffusion_loss(share, y, x, 3, 0.25, 0.5, slice_sizes=sizes, impl="reference")
    counts.append([e.name for e in profile.events() if e.name.startswith("gloo:")])
    with torch.profiler.profile() as profile:
        loss.backward()
    counts.append([e.name for e in profile.events() if e.name.startswith("gloo:")])
    return counts


def shapes(rank, sizes):
    """Losses of (3, 4, V_r) slices, int32 labels, penalties on the device, and under no_grad."""
    rows, y, x = tied_problem(55, 3, torch.float64, n=12)
    share = share_of(rank, sizes, rows, "cpu").unflatten(0, (3, 4))
    y, x = y.view(3, 4).int(), x.view(3, 4).int()
    pk, pm = torch.tensor(0.25), torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        return vocab_parallel_diffusion_loss(share, y, x, 3, pk, pm, slice_sizes=sizes, reduction="none")


def by_subgroup(rank):
    """The loss of a vocabulary that only the first and the last process share."""
    last = dist.get_world_size() - 1
    group = dist.new_group([0, last])
    if rank not in (0, last):
        with pytest.raises(ValueError, match="group must hold this process, got a group without it"):
            vocab_parallel_diffusion_loss(
                torch.zeros(1, 3), torch.zeros(1).long(), torch.zeros(1).long(), 0, 1.0, 1.0,
                slice_sizes=(3, 3), group=group,
            )  # fmt: skip
        return None
    rows, y, x = tied_problem(55, 3, torch.float64)
    share = share_of(int(rank == last), (25, 30), rows, "cpu")
    return vocab_parallel_diffusion_loss(share, y, x, 3, 0.25, 0.5, slice_sizes=(25, 30), group=group)


def refusals(rank, sizes):
    """Messages of a second derivative, and of a slice that was changed before backward."""
    rows, y, x = tied_problem(55, 3, torch.float32)
    messages = []
    share = share_of(rank, sizes, rows, "cpu").clone().requires_grad_()
    node = share * 1.0
    loss = vocab_parallel_diffusion_loss(node, y, x, 3, 0.25, 0.5, slice_sizes=sizes)
    (gradient,) = torch.autograd.grad(loss, share, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        messages.append(str(error))
    node = share * 1.0
    loss = vocab_parallel_diffusion_loss(node, y, x, 3, 0.25, 0.5, slice_sizes=sizes)
    node.detach().zero_()
    try:
        loss.backward()
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def head_problem():
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(55, 8, generator=generator, dtype=torch.float64)
    _, y, x = tied_problem(55, 50, torch.float64)
    return hidden, weight, y, x


def column_parallel_head(rank, n):
    """The recipe of docs/parallel.md: gradients of hidden, added up over processes, and of the weight's rows."""
    hidden, weight, y, x = head_problem()
    sizes = SPLITS[n][-1] if n == 4 else (40, 15)
    start = sum(sizes[:rank])
    hidden.requires_grad_()
    weight = weight[start : start + sizes[rank]].clone().requires_grad_()
    loss = vocab_parallel_diffusion_loss(hidden @ weight.t(), y, x, 50, 0.25, 0.5, slice_sizes=sizes)
    loss.backward()
    dist.all_reduce(hidden.grad)
    return loss.detach(), hidden.grad, weight.grad


def by_dtensor(rank, n):
    """The same from a head that torch.distributed.tensor splits, and what it says to other layouts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (n,))
    hidden, weight, y, x = head_problem()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    hidden = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    logits = hidden @ weight.t()
    loss = vocab_parallel_diffusion_loss(logits, y, x, 50, 0.25, 0.5)
    loss.backward()
    messages = []
    for wrong, options in (
        (logits.redistribute(placements=[Replicate()]), {}),
        (logits.redistribute(placements=[Shard(0)]), {}),
        (logits, {"slice_sizes": [55 // n] * n}),
    ):
        try:
            vocab_parallel_diffusion_loss(wrong, y, x, 50, 0.25, 0.5, **options)
        except ValueError as error:
            messages.append(str(error))
    return loss.detach(), hidden.grad.full_tensor(), weight.grad.full_tensor(), messages


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    """What 2 and what 4 processes computed; started once each, when first asked for."""
    results = {}

    def find(n):
        if n not in results:
            results[n] = run_in_processes(n, work, tmp_path_factory.mktemp(f"processes-{n}"))
        return results[n]

    return find


def joined(results, key):
    """(loss, whole gradient, table), where all processes agree on the loss and the table bit for bit."""
    parts = [result[key] for result in results]
    for loss, _, cases in parts[1:]:
        assert torch.equal(loss.nan_to_num(7.5), parts[0][0].nan_to_num(7.5))
        assert torch.equal(cases.counts, parts[0][2].counts)
        assert torch.equal(cases.nll.nan_to_num(7.5), parts[0][2].nll.nan_to_num(7.5))
    return parts[0][0], torch.cat([gradient for _, gradient, _ in parts], 1), parts[0][2]


PROCESSES = pytest.mark.parametrize("n", [2, 4])
BOTH = pytest.mark.parametrize("impl", IMPLS)


@PROCESSES
@BOTH
def test_rows_ties_and_every_slice_of_mask_match_the_oracle(n, impl, found_by):
    results = found_by(n)
    keys = [key for key in results[0] if key[:2] == ("ties", impl)]
    assert {key[2] for key in keys} == set(SPLITS[n][: 3 if impl == "reference" else 1])
    for key in keys:
        *_, dtype, mask_id = key
        problem = tied_problem(55, mask_id, dtype)
        assert_is_loss_of(*problem, mask_id, joined(results, key), upstream=upstream_of(60))


@PROCESSES
def test_of_all_ties_across_slices_the_first_is_the_prediction(n, found_by):
    for mask_id in range(6):
        problem = all_rows(6, [0.0, 1.0], mask_id)
        assert_is_loss_of(*problem, mask_id, joined(found_by(n), ("all ties", mask_id)))


@PROCESSES
@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_and_sum_are_those_of_the_whole_batch(n, impl, reduction, found_by):
    rows, y, x = tied_problem(55, 3, torch.float32)
    loss, gradient, cases = joined(found_by(n), ("reductions", impl, reduction))
    exact = rows.double().requires_grad_()
    expected, table = fused_diffusion_loss(
        exact, y, x, 3, 0.25, 0.5, reduction=reduction, return_cases=True
    )
    (0.3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1.2e-6, atol=1e-9)
    assert torch.equal(cases.counts, table.counts)


@PROCESSES
def test_offsets_cost_no_digits(n, found_by):
    for offset in OFFSETS:
        problem = tied_problem(55, 40, torch.float32, offset=offset)
        assert_is_loss_of(*problem, 40, joined(found_by(n), ("offsets", offset)))


@PROCESSES
def test_infinities_nan_ignored_rows_and_bad_labels_are_as_in_whole_rows(n, found_by):
    for mask_id in range(6):
        assert_is_loss_of(*special_problem(mask_id), mask_id, joined(found_by(n), ("special", mask_id)))


@PROCESSES
@BOTH
def test_an_empty_batch_has_a_nan_mean(n, impl, found_by):
    loss, gradient, cases = joined(found_by(n), ("empty", impl))
    assert loss.isnan()
    assert gradient.shape == (0, 55)
    assert cases.counts.sum() == cases.n_positions == 0


@PROCESSES
def test_one_collective_in_forward_and_none_in_backward(n, found_by):
    for result in found_by(n):
        forward, backward = result["collectives"]
        assert len(forward) == 1, forward
        assert "gather" in forward[0]
        assert backward == []


@PROCESSES
def test_leading_shape_and_kinds_of_labels_and_penalties_do_not_matter(n, found_by):
    rows, y, x = tied_problem(55, 3, torch.float64, n=12)
    expected = oracle.diffusion_loss(rows, y, x, 3, 0.25, 0.5).row_loss.reshape(3, 4)
    for result in found_by(n):
        np.testing.assert_allclose(result["shapes"], expected, rtol=1e-14)
        assert not result["shapes"].requires_grad


@PROCESSES
def test_the_processes_of_a_group_share_a_vocabulary_among_them(n, found_by):
    expected = oracle.diffusion_loss(*tied_problem(55, 3, torch.float64), 3, 0.25, 0.5).loss()
    losses = [result["group"] for result in found_by(n)]
    assert [loss is None for loss in losses] == [0 < rank < n - 1 for rank in range(n)]
    for loss in losses:
        assert loss is None or loss.item() == pytest.approx(expected, rel=1e-14)


@PROCESSES
def test_second_derivatives_and_changed_logits_raise(n, found_by):
    for result in found_by(n):
        second, changed = result["refusals"]
        assert "no second derivative" in second
        assert "modified by an inplace operation" in changed


def whole_head():
    hidden, weight, y, x = head_problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = fused_diffusion_loss(hidden @ weight.t(), y, x, 50, 0.25, 0.5)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@PROCESSES
def test_a_column_parallel_head_gets_the_gradients_of_the_whole_one(n, found_by):
    expected = whole_head()
    results = [result["head"] for result in found_by(n)]
    for loss, hidden, _ in results:
        torch.testing.assert_close((loss, hidden), expected[:2], rtol=1e-12, atol=1e-15)
    weight = torch.cat([weight for _, _, weight in results])
    torch.testing.assert_close(weight, expected[2], rtol=1e-12, atol=1e-15)


@PROCESSES
def test_a_dtensor_of_logits_is_taken_as_it_is_split(n, found_by):
    for result in found_by(n):
        *found, messages = result["dtensor"]
        torch.testing.assert_close(found, [*whole_head()], rtol=1e-12, atol=1e-15)
        assert "logits must have placements (Shard(dim=1),)" in messages[0]
        assert "Replicate" in messages[0]
        assert "got (Shard(dim=0),)" in messages[1]
        assert "slice_sizes and group must be None where logits are a DTensor" in messages[2]


# One process, and wrong arguments ------------------------------------------------------------------


def call(**changes):
    arguments = {
        "logits": torch.randn(4, 6, 9),
        "y": torch.zeros(4, 6, dtype=torch.int64),
        "x": torch.zeros(4, 6, dtype=torch.int64),
        "mask_id": 8,
        "pk": 0.25,
        "pm": 0.5,
        "slice_sizes": [9],
    } | changes
    return vocab_parallel_diffusion_loss(**arguments)


def test_without_a_process_group_it_says_so():
    with pytest.raises(ValueError, match="torch.distributed must be initialised, got no process group"):
        call()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, r"logits must be a torch.Tensor, got list"),
        ({"logits": torch.randn(())}, ValueError, r"logits must have shape \(..., V_r\), got \(\)"),
        ({"slice_sizes": None}, TypeError, r"slice_sizes must be a sequence of 1 ints, got None"),
        ({"slice_sizes": [9.0]}, TypeError, r"slice_sizes must be a sequence of 1 ints, got \[9.0\]"),
        ({"slice_sizes": [9, 9]}, ValueError, r"slice_sizes must be 1 sizes >= 0, .*, got \[9, 9\]"),
        ({"slice_sizes": [-9]}, ValueError, r"slice_sizes must be 1 sizes >= 0, .*, got \[-9\]"),
        ({"slice_sizes": [0]}, ValueError, r"slice_sizes must be 1 sizes >= 0, not all 0, got \[0\]"),
        ({"slice_sizes": [8]}, ValueError, r"logits must have slice_sizes\[0\] = 8 columns, got 9"),
        ({"mask_id": 9}, ValueError, r"mask_id must be in \[0, 9\), got 9"),
        ({"y": torch.zeros(4, 5).long()}, ValueError, r"y must have shape \(4, 6\), got \(4, 5\)"),
        ({"impl": "cuda"}, ValueError, r"impl must be one of auto, .*, got 'cuda'"),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of mean, sum, none, got 'avg'"),
        (
            {"y": torch.full((4, 6), 9), "check_labels": True},
            ValueError,
            r"y must be in \[0, 9\) or ignore_index -1, got 9 at position \(0, 0\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_argument_is_named_with_expected_and_got(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.usefixtures("alone")
@BOTH
def test_one_process_has_the_loss_of_whole_rows(impl, device):
    rows, y, x = (t.to(device) for t in tied_problem(55, 3, torch.float32))
    loss = vocab_parallel_diffusion_loss(rows, y, x, 3, 0.25, 0.5, slice_sizes=[55], impl=impl)
    torch.testing.assert_close(loss, fused_diffusion_loss(rows, y, x, 3, 0.25, 0.5, impl=impl))


@pytest.mark.usefixtures("alone")
def test_a_dtensor_where_a_plain_tensor_is_wanted_is_named(recwarn):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    from difftrain_kernels import fused_linear_diffusion_loss

    mesh = init_device_mesh("cpu", (1,))
    labels = torch.zeros(4, dtype=torch.int64)
    logits = distribute_tensor(torch.randn(4, 9), mesh, [Replicate()])
    with pytest.raises(ValueError, match="logits must be a plain tensor, got a DTensor: .*vocab_parallel"):
        fused_diffusion_loss(logits, labels, labels, 8, 0.25, 0.5)
    with pytest.raises(ValueError, match="weight must be a plain tensor, got a DTensor: .*fully_shard"):
        fused_linear_diffusion_loss(torch.randn(4, 9), logits, labels, labels, 3, 0.25, 0.5)
