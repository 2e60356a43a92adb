"""The compiled loss predicts its upstream gradient too: what it moves, what it keeps, and that no bit depends on it."""

import gc
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from torch.utils.checkpoint import checkpoint

from difftrain_kernels import early_gradient, fused_diffusion_loss, operators, upstream_prediction
from loss_problems import random_problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

MASK_ID = 4
MADE_EARLY, MADE_LATE = ["loss and gradient", "gradient"], ["loss", "gradient"]


@pytest.fixture(autouse=True)
def _nothing_expected(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(upstream_prediction, "_expectations", {})


def problem_of(device, n=5, vocab_size=9):
    logits, y, x = random_problem(n, vocab_size, MASK_ID, torch.bfloat16)
    return logits.to(device), y.to(device), x.to(device)


def loss_of(logits, y, x, k=None, **options):
    loss = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="triton", **options)
    return loss if k is None else loss / k


def compiled(function=loss_of, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=False)


def leaf_of(problem):
    return problem[0].clone().requires_grad_(), *problem[1:]


def gradient_of(function, problem, upstream=1.0, **options):
    leaf, y, x = leaf_of(problem)
    loss = function(leaf, y, x, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    return leaf.grad


def assert_same_bits(found, expected):
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


# What is moved, and the bits.


@pytest.mark.parametrize("vocab_size", [9, 4200], ids=["small rows", "streamed rows"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_compiled_call_moves_6_at_first_4_when_steady_and_8_on_a_miss(
    traffic, vocab_size, reduction, device
):
    problem = problem_of(device, 3, vocab_size)
    fast = compiled()
    for upstream, bytes_a_logit in zip((0.25, 0.25, 0.25, 0.5, 0.5, 0.5), (6, 4, 4, 8, 6, 4), strict=True):
        expected = gradient_of(loss_of, problem, upstream, reduction=reduction, upstream_prediction=False)
        traffic.read()
        found = gradient_of(fast, problem, upstream, reduction=reduction)
        assert traffic.read() == (MADE_EARLY, bytes_a_logit)
        assert_same_bits(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
@pytest.mark.xdist_group("inductor")
@torch._inductor.config.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False})
def test_inductor_brings_the_gradient_to_backward(traffic, device):
    """With what is compiled around the loss: the logits are made in the graph, and the gradient goes on in it."""
    problem = problem_of(device)

    def step(leaf, y, x, **options):
        return loss_of(leaf * 2, y, x, k=4, **options)

    expected = gradient_of(step, problem, upstream_prediction=False)
    fast = compiled(step, "inductor")
    traffic.read()
    for bytes_a_logit in (6, 4, 4):
        found = gradient_of(fast, problem)
        assert traffic.read() == (MADE_EARLY, bytes_a_logit)
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_losses_by_row_receive_a_vector_in_a_graph_and_stay_at_6(traffic, device):
    """Autograd of graphs makes tensors whole before they enter: one number for all rows is none any more."""
    problem = problem_of(device)
    expected = gradient_of(loss_of, problem, 0.5, reduction="none", upstream_prediction=False)
    fast = compiled()
    for _ in range(3):
        traffic.read()
        assert_same_bits(gradient_of(fast, problem, 0.5, reduction="none"), expected)
        assert traffic.read() == (MADE_EARLY, 6)


def test_accumulation_over_four_micro_batches_moves_4_from_the_second_on(traffic, device):
    problem = problem_of(device)
    fast = compiled()
    leaf, y, x = leaf_of(problem)
    for step in range(2):
        for micro_batch in range(4):
            fast(leaf, y, x, k=4).backward()
            assert traffic.read()[1] == (6 if (step, micro_batch) == (0, 0) else 4)
    single = gradient_of(loss_of, problem, upstream_prediction=False, k=4)
    torch.testing.assert_close(leaf.grad, 8 * single, rtol=0.02, atol=0)


def test_eager_and_compiled_calls_of_a_kind_learn_together(traffic, device):
    problem = problem_of(device)
    gradient_of(loss_of, problem, 0.5)
    assert traffic.read()[1] == 6
    gradient_of(compiled(), problem, 0.5)
    assert traffic.read()[1] == 4


def test_two_losses_in_one_graph_each_get_their_gradient(traffic, device):
    """One gradient of a kind waits for its backward; the other loss makes its own there."""

    def both(leaf, y, x, **options):
        return loss_of(leaf, y, x, **options) + loss_of(leaf * 0.5, y, x, **options)

    problem = problem_of(device)
    expected = gradient_of(both, problem, upstream_prediction=False)
    fast = compiled(both)
    for moved in (12, 10, 10):
        traffic.read()
        assert_same_bits(gradient_of(fast, problem), expected)
        assert traffic.read()[1] == moved


# What is kept, and for how long.


def waiting_gradient():
    (expectation,) = upstream_prediction._expectations.values()
    return expectation._waiting and expectation._waiting()


def test_the_gradient_ends_with_the_loss_that_nobody_differentiates(device):
    leaf, y, x = leaf_of(problem_of(device))
    loss = compiled()(leaf, y, x)
    assert waiting_gradient().shape == leaf.shape
    del loss
    gc.collect()
    assert waiting_gradient() is None


def test_losses_without_a_backward_soon_make_no_gradient(traffic, device):
    leaf, y, x = leaf_of(problem_of(device))
    fast = compiled()
    fast(leaf, y, x).backward()
    traffic.read()
    for _ in range(upstream_prediction.MOST_UNUSED):
        fast(leaf, y, x)
        gc.collect()  # Triton's interpreter keeps the memory of its arguments in a cycle
    assert traffic.read()[0] == ["loss and gradient"] * upstream_prediction.MOST_UNUSED
    fast(leaf, y, x).backward()
    assert traffic.read() == (MADE_LATE, 6)
    fast(leaf, y, x).backward()
    assert traffic.read() == (MADE_EARLY, 4)


def test_a_second_backward_makes_its_own_gradient(traffic, device):
    problem = problem_of(device)
    expected = gradient_of(loss_of, problem, 0.5, upstream_prediction=False)
    leaf, y, x = leaf_of(problem)
    fast = compiled()
    upstream = torch.tensor(0.5, device=device)
    for moved in (2, 0):  # a hit leaves the buffer as it is
        loss = fast(leaf, y, x)
        traffic.read()
        (first,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        assert traffic.read() == (["gradient"], 2 * moved)
        (second,) = torch.autograd.grad(loss, leaf, upstream)
        assert traffic.read() == (["gradient"], 4)
        assert first.data_ptr() != second.data_ptr()
        assert_same_bits(first, expected)
        assert_same_bits(second, expected)


def test_the_gradient_is_the_buffer_that_forward_made(device):
    leaf, y, x = leaf_of(problem_of(device))
    loss = compiled()(leaf, y, x)
    address = waiting_gradient().data_ptr()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.data_ptr() == address
    assert waiting_gradient() is None


def test_checkpointing_in_a_graph_changes_no_bit_and_soon_costs_what_it_did(traffic, monkeypatch, device):
    problem = problem_of(device)

    def again(leaf, y, x, **options):
        return checkpoint(lambda z: loss_of(z * 1, y, x, **options), leaf, use_reentrant=False)

    expected = gradient_of(again, problem, upstream_prediction=False)
    fast = compiled(again)
    find = operators.find_expectation

    def find_anew(*arguments):
        gc.collect()  # what Triton's interpreter keeps of forward ends before it runs again
        return find(*arguments)

    monkeypatch.setattr(operators, "find_expectation", find_anew)
    moved = []
    for _ in range(24):
        traffic.read()
        assert_same_bits(gradient_of(fast, problem), expected)
        moved.append(traffic.read()[1])
    assert max(moved) <= 10
    assert moved[-8:].count(8) >= 7
    gc.collect()  # of Triton's interpreter, as above
    assert waiting_gradient() is None


def test_statistics_of_another_memory_bring_no_gradient():
    columns, early = torch.zeros(6, 2), early_gradient.EarlyGradient(torch.zeros(2, 3), 1.0)
    early_gradient.leave_with(columns, early)
    assert early_gradient.left_with(columns.view(2, 6)[:1].detach()) is early
    assert early_gradient.left_with(columns.clone()).gradient is None
    ended = weakref.ref(early.gradient)
    del columns, early
    gc.collect()
    assert ended() is None


# Where it does not predict.


@pytest.mark.parametrize("how", ["switched off", "no gradient wanted", "no_grad", "inference"])
def test_where_it_may_not_predict_it_learns_nothing(how, traffic, device):
    logits, y, x = problem_of(device)
    fast = compiled()
    if how == "switched off":
        assert_same_bits(
            gradient_of(fast, (logits, y, x), upstream_prediction=False),
            gradient_of(loss_of, (logits, y, x)),
        )
        assert traffic.read()[0] == MADE_LATE + MADE_EARLY
        return
    around = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(how, torch.enable_grad)
    with around():
        fast(logits if how == "no gradient wanted" else logits.clone().requires_grad_(), y, x)
    assert traffic.read()[0] == ["loss"]
    assert upstream_prediction._expectations == {}


def test_an_exported_program_makes_no_gradient_where_none_is_wanted(traffic, device):
    class Step(torch.nn.Module):
        def forward(self, logits, y, x):
            return loss_of(logits, y, x)

    logits, y, x = problem_of(device)
    program = torch.export.export(Step(), (logits.clone().requires_grad_(), y, x)).module()
    with torch.no_grad():
        for _ in range(2):
            program(logits, y, x)
            assert traffic.read()[0] == ["loss"]


def test_an_operator_without_a_gradient_to_make_early_makes_it_in_backward(monkeypatch, traffic, device):
    monkeypatch.setattr("difftrain_kernels.operators.replays_graphs", lambda device: True)
    problem = problem_of(device)
    fast = compiled()
    for _ in range(2):
        gradient_of(fast, problem)
        assert traffic.read() == (MADE_LATE, 6)
    assert upstream_prediction._expectations == {}


def inductor_of(monkeypatch, manager=None, *, trees=True, knows_thread=True):
    """Modules of inductor's that say so; what their manager is asked."""
    asked = []

    def get_manager(index, create_if_none_exists):
        asked.append((index, create_if_none_exists))
        return manager

    local = SimpleNamespace(tree_manager_containers={}) if knows_thread else SimpleNamespace()
    config = SimpleNamespace(triton=SimpleNamespace(cudagraph_trees=trees))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", config)
    module = SimpleNamespace(get_manager=get_manager, local=local)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", module)
    return asked


@pytest.mark.parametrize("manager", [object(), None])
def test_graphs_that_inductor_captures_are_known_by_their_manager(manager, monkeypatch):
    asked = inductor_of(monkeypatch, manager)
    assert upstream_prediction.replays_graphs(torch.device("cuda", 1)) is (manager is not None)
    assert asked == [(1, False)]
    assert not upstream_prediction.replays_graphs(torch.device("cpu"))
    assert len(asked) == 1


def test_a_thread_that_inductor_does_not_know_stays_unknown(monkeypatch):
    asked = inductor_of(monkeypatch, object(), knows_thread=False)
    assert not upstream_prediction.replays_graphs(torch.device("cuda", 0))
    assert asked == []


def test_graphs_captured_without_a_manager_are_taken_for_there(monkeypatch):
    inductor_of(monkeypatch, trees=False)
    assert upstream_prediction.replays_graphs(torch.device("cuda", 0))


def test_graphs_of_another_torch_are_taken_for_captured(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.config", SimpleNamespace())
    assert upstream_prediction.replays_graphs(torch.device("cuda", 0))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", None)
    assert not upstream_prediction.replays_graphs(torch.device("cuda", 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_this_torch_has_the_manager_that_is_asked_for():
    from torch._inductor import cudagraph_trees

    assert cudagraph_trees.get_manager(0, create_if_none_exists=False) is None
    assert not upstream_prediction.replays_graphs(torch.device("cuda", 0))
