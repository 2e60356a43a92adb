"""The upstream gradient is predicted: what each call moves, what it settles at, and that no bit depends on it."""

import gc
import math
import runpy
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton.language import constexpr

from difftrain_kernels import fused_diffusion_loss, triton_kernels, upstream_prediction
from difftrain_kernels.triton_kernels import upstream as upstream_file
from loss_problems import random_problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

MASK_ID = 4


@pytest.fixture(autouse=True)
def _nothing_expected(monkeypatch):
    monkeypatch.setattr(upstream_prediction, "_expectations", {})


def problem_of(device, n=5, vocab_size=9, dtype=torch.bfloat16):
    logits, y, x = random_problem(n, vocab_size, MASK_ID, dtype)
    return logits.to(device), y.to(device), x.to(device)


def loss_of(logits, y, x, **options):
    return fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="triton", **options)


def gradient_of(problem, upstream, **options):
    logits, y, x = problem
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf, y, x, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    return leaf.grad


def moved_by(traffic, problems, upstreams, **options):
    """What each step moves; its gradient has the bits of a call that predicts nothing."""
    found, expected_of = [], {}
    for problem, upstream in zip(problems, upstreams, strict=True):
        if (id(problem), upstream) not in expected_of:
            expected_of[id(problem), upstream] = gradient_of(
                problem, upstream, upstream_prediction=False, **options
            )
            assert traffic.read() == (["loss", "gradient"], 6)
        expected = expected_of[id(problem), upstream]
        gradient = gradient_of(problem, upstream, **options)
        launches, moved = traffic.read()
        assert launches == ["loss and gradient", "gradient"]  # two, whatever is expected
        assert torch.equal(gradient.view(torch.int16), expected.view(torch.int16))
        found.append(moved)
    return found


# What is moved.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_first_step_moves_6_a_steady_one_4_and_a_miss_8(traffic, family, reduction, device):
    problem = problem_of(device, n=3)
    upstreams = [0.25, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert moved_by(traffic, [problem] * 6, upstreams, reduction=reduction) == [6, 4, 4, 8, 6, 4]


@pytest.mark.parametrize(
    "view", [lambda z: z[:1], lambda z: z[:, :1], lambda z: z[1:, :-1], lambda z: z[1, 3:4]]
)
def test_logits_of_any_layout_meet_what_is_expected(traffic, view, device):
    logits, y, x = random_problem(15, 9, MASK_ID, torch.bfloat16)
    problem = tuple(view(t.view(3, 5, *t.shape[1:])).to(device) for t in (logits, y, x))
    moved = []
    for _ in range(2):
        leaf = logits.view(3, 5, 9).to(device).requires_grad_()
        loss_of(view(leaf), *problem[1:]).backward()
        moved.append(traffic.read()[1])
    assert moved == [6, 4]


def test_a_growing_gradient_scale_costs_one_miss(traffic, device):
    problem = problem_of(device)
    scales = [1024.0] * 9 + [2048.0] * 6
    assert moved_by(traffic, [problem] * 15, scales) == [6] + [4] * 8 + [8, 6, 4, 4, 4, 4]


def test_two_losses_in_turn_settle_at_6(traffic, device):
    problem = problem_of(device)
    assert moved_by(traffic, [problem] * 12, [1.0, 0.125] * 6) == [6, 8, *[6] * 10]


def test_models_of_one_shape_share_what_is_expected(traffic, device):
    """Of one thread and stream: where they disagree they are as two losses in turn."""
    a, b = problem_of(device), tuple(t.flip(0) for t in problem_of(device))
    assert moved_by(traffic, [a, b] * 3, [0.25] * 6) == [6, *[4] * 5]
    assert moved_by(traffic, [a, b] * 6, [0.25, 0.5] * 6)[-8:] == [6] * 8


def test_a_smaller_last_micro_batch_of_another_class_of_rows_is_expected_too(traffic, device):
    whole, last = problem_of(device, n=8), problem_of(device, n=3)
    moved = moved_by(traffic, [whole, whole, whole, last] * 3, [0.3, 0.3, 0.3, 0.1] * 3)
    assert moved == [6, 4, 4, 6, *[4] * 8]


@pytest.mark.parametrize("k", [4, 9])
def test_a_last_micro_batch_of_the_same_class_never_costs_more_than_6_on_average(traffic, k, device):
    problem = problem_of(device, n=1, vocab_size=5)
    moved = moved_by(traffic, [problem] * 4 * k, ([0.3] * (k - 1) + [0.2]) * 4)
    assert sum(moved) <= 6 * len(moved)
    if k == 9:  # hits pay for the misses
        assert sum(moved[-2 * k :]) <= 5.5 * 2 * k


# The policy's bound, on the state alone: a backward of one row is what teaches it.


# 16 in place of 256, for the tests' time; the bound's form is the same. Compiled kernels keep the 256 that they have.
MOST_NEEDED = 256 if torch.cuda.is_available() else 16


@pytest.fixture
def backward(device, monkeypatch):
    """(whether something was expected, whether it came) of a call that receives an upstream gradient."""
    monkeypatch.setattr(upstream_file, "MOST_NEEDED", constexpr(MOST_NEEDED))
    logits, y, x = problem_of(device, n=1, vocab_size=5)
    statistics = triton_kernels.launch_loss(logits, y, x, MASK_ID)
    state = torch.full((5,), math.nan, device=device)

    def receive(choose):
        made_for = state[:1].clone()
        expected = made_for.item()
        received = choose(expected)
        triton_kernels.launch_gradient(
            logits, y, statistics, torch.tensor(received, device=device), divisor=1.0,
            stated=made_for, state=state, gradient_out=torch.empty_like(logits),
        )  # fmt: skip
        return not math.isnan(expected), expected == received

    return receive


def cost(receive, choices):
    calls = [receive(choose) for choose in choices]
    hits, misses = (sum(made and hit is wanted for made, hit in calls) for wanted in (True, False))
    bound = 6 * len(calls) + 2 * len(calls) / MOST_NEEDED + 2 * math.log2(MOST_NEEDED) - 1.5 * hits
    assert 6 * len(calls) - 2 * hits + 2 * misses <= bound
    return hits, misses


def test_whoever_disappoints_every_expectation_gains_little(backward):
    values = iter(range(1, 1000))
    last = [0.5]

    def disappoint(expected):
        if not math.isnan(expected):
            last[0] = float(next(values))
        return last[0]

    hits, misses = cost(backward, [disappoint] * 65)
    # After 1, 2, 4, 8 and 16 calls, and each further 16; or after 32.
    assert (hits, misses) == (0, 7 if MOST_NEEDED == 16 else 6)


@pytest.mark.parametrize("period", [3, 7, 19])
def test_no_order_of_upstream_gradients_exceeds_the_bound(backward, period):
    generator = torch.Generator().manual_seed(period)
    lengths = torch.randint(1, period, (80,), generator=generator).tolist()
    upstreams = [float(1 + i % 3) for i, length in enumerate(lengths) for _ in range(length)][:80]
    cost(backward, [lambda expected, u=u: u for u in upstreams])


def test_hits_make_it_trust_again(backward):
    once = [lambda expected, u=u: u for u in (1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0)]  # needs 1, 2, 4
    assert cost(backward, once) == (0, 2)
    assert cost(backward, [lambda expected: 3.0] * 8) == (8, 0)  # needs 1 again
    assert [backward(lambda expected, u=u: u)[0] for u in (4.0, 5.0, 5.0, 5.0)] == [
        True,
        False,
        False,
        True,
    ]


def test_after_a_miss_the_count_begins_anew_whatever_others_received_meanwhile(device):
    logits, y, x = problem_of(device, n=1, vocab_size=5)
    statistics = triton_kernels.launch_loss(logits, y, x, MASK_ID)
    state = torch.tensor([2.0, 2.0, 100.0, 1.0, 0.0], device=device)  # 2, a hundred times
    triton_kernels.launch_gradient(
        logits, y, statistics, torch.tensor(2.0, device=device), divisor=1.0,
        stated=torch.tensor([1.0], device=device), state=state, gradient_out=torch.empty_like(logits),
    )  # fmt: skip
    assert state[0].isnan()
    assert state[1:].tolist() == [2.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("upstream", [0.0, -0.0, math.nan])
def test_what_has_no_bits_of_its_own_is_never_expected(backward, upstream):
    assert not any(backward(lambda expected: upstream)[0] for _ in range(5))


# Bits.


TERMS = {
    "plain": {},
    "weights and z-loss": {"token_weights": [0.5, 1.0, 2.0, 0.0, 3.0], "z_loss": 0.01},
    "smoothing without [MASK]": {"label_smoothing": 0.1, "forbid_mask": True, "gate": "probability"},
    "cap and scale": {"softcap": 5.0, "logit_scale": 0.75},
    "normalizer": {"normalizer": 3.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS)
def test_hit_or_miss_every_bit_is_that_of_no_prediction(terms, dtype, family, device):
    options = dict(TERMS[terms])
    if "token_weights" in options:
        options["token_weights"] = torch.tensor(options["token_weights"], device=device)
    problem = problem_of(device, vocab_size=37, dtype=dtype)
    for upstream in (1 / 3, 1 / 3, -0.7):  # nothing expected, a hit, a miss
        expected = gradient_of(problem, upstream, upstream_prediction=False, **options)
        found = gradient_of(problem, upstream, **options)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(found.view(bits), expected.view(bits))


def test_rows_whose_upstream_gradients_differ_are_compared_one_by_one(traffic, device):
    problem = problem_of(device)
    for _ in range(2):
        gradient_of(problem, 1.0, reduction="none")
    traffic.read()
    upstream = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0], device=device)
    found = gradient_of(problem, upstream, reduction="none")
    assert traffic.read()[1] == pytest.approx(4 + 4 * 2 / 5)
    assert torch.equal(found, gradient_of(problem, upstream, reduction="none", upstream_prediction=False))
    traffic.read()
    for _ in range(3):  # and vectors are not expected
        gradient_of(problem, upstream, reduction="none")
        assert traffic.read()[1] == 6


def test_what_becomes_of_the_state_after_forward_changes_no_bit(device):
    problem = problem_of(device)
    expected = gradient_of(problem, 1.0)
    gradient_of(problem, 1.0)
    (expectation,) = upstream_prediction._expectations.values()
    for value in (math.nan, 2.0, 1.0):
        logits, y, x = problem
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, y, x)
        expectation.state.fill_(value)  # by another stream
        loss.backward()
        assert torch.equal(leaf.grad, expected)


# Autograd.


def test_a_second_backward_makes_its_own_gradient_and_teaches_nothing(traffic, device):
    problem = problem_of(device)
    logits, y, x = problem
    gradient_of(problem, 1.0)
    (expectation,) = upstream_prediction._expectations.values()
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf * 1, y, x)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(1.0, device=device), retain_graph=True)
    kept, state = first.clone(), expectation.state.clone()
    traffic.read()
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=device))
    assert traffic.read() == (["gradient"], 4)
    assert torch.equal(expectation.state, state)
    assert torch.equal(first, kept)
    assert torch.equal(second, gradient_of(problem, 3.0, upstream_prediction=False))


def test_a_loss_used_twice_receives_the_sum(device):
    problem = problem_of(device)
    logits, y, x = problem
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, y, x)
        (loss + 2 * loss).backward()
        assert torch.equal(leaf.grad, gradient_of(problem, 3.0, upstream_prediction=False))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing_nothing_is_kept_for_backward(use_reentrant, traffic, device):
    logits, y, x = problem = problem_of(device)
    expected = gradient_of(problem, 1.0, upstream_prediction=False)
    traffic.read()
    moved = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        loss = checkpoint(lambda z: loss_of(z * 1, y, x), leaf, use_reentrant=use_reentrant)
        loss.backward()
        assert torch.equal(leaf.grad, expected)
        launches, bytes_moved = traffic.read()
        assert launches[0] == "loss"  # no buffer between forward and backward
        moved.append(bytes_moved)
    # Forward, forward again, gradient. Reentrant checkpointing computes the second one with its gradient.
    assert moved == ([8, 6, 6] if use_reentrant else [8, 8, 8])


def test_saved_tensors_that_are_offloaded_stay_the_only_ones(traffic, device):
    problem = problem_of(device)
    expected = gradient_of(problem, 1.0)
    traffic.read()
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(gradient_of(problem, 1.0), expected)
    assert traffic.read() == (["loss", "gradient"], 6)


def test_hooks_on_the_node_may_give_the_logits_back_at_another_address(device):
    big = torch.randn(4, 80, device=device)
    y = torch.tensor([1, 2, 3, -1], device=device)
    gradients = []
    for _ in range(3):
        leaf = big.clone().requires_grad_()
        loss = loss_of((leaf * 1)[:, 3:69], y, y)
        loss.grad_fn._raw_saved_tensors[0].register_hooks(
            lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
        )
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])


# Who shares what is expected, and how much waits.


def test_threads_learn_apart(traffic, device):
    problem = problem_of(device)
    moved = {}
    turn = threading.Barrier(2, timeout=60)

    def train(upstream):
        leaf = problem[0].clone().requires_grad_()
        for step in range(4):
            for mine in range(2):
                turn.wait()
                if mine == int(upstream > 1):
                    traffic.read()
                    torch.autograd.grad(
                        loss_of(leaf, *problem[1:]), leaf, torch.tensor(upstream, device=device)
                    )
                    moved[upstream, step] = traffic.read()[1]
                turn.wait()

    threads = [threading.Thread(target=train, args=(upstream,)) for upstream in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for upstream in (1.0, 2.0):
        assert [moved[upstream, step] for step in range(4)] == [6, 4, 4, 4]


def test_kinds_are_told_apart(device):
    logits, y, x = problem = problem_of(device)
    gradient_of(problem, 1.0)
    gradient_of(problem, 1.0, reduction="sum")
    gradient_of((logits.float(), y, x), 1.0)
    gradient_of((logits[:3], y[:3], x[:3]), 1.0)
    gradient_of((logits[:4], y[:4], x[:4]), 1.0)  # 4 and 5 rows are of one
    gradient_of((logits[:, :8], y.clamp(max=7), x.clamp(max=7)), 1.0)
    assert len(upstream_prediction._expectations) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are recorded in the interpreter")
def test_a_steps_launches_repeated_are_right_for_whatever_arrives(monkeypatch):
    """As a captured graph repeats them, with nothing of the host between."""
    from triton.runtime.interpreter import GridExecutor

    run, launches = GridExecutor.__call__, []

    def record(executor, *arguments, **options):
        launches.append((executor, arguments, options))
        return run(executor, *arguments, **options)

    logits, y, x = problem_of("cpu")
    leaf = logits.clone().requires_grad_()
    upstream = torch.full((), 0.5, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(GridExecutor, "__call__", record)
    for _ in range(2):  # the second makes its gradient in forward
        launches.clear()
        (gradient,) = torch.autograd.grad(loss_of(leaf, y, x), leaf, upstream)
    monkeypatch.setattr(GridExecutor, "__call__", run)
    assert len(launches) == 2
    for arrives in (0.5, 0.25, 0.25, 0.25, -1.0, 0.5, math.nan, 0.5, 0.5):
        upstream.fill_(arrives)
        with torch.no_grad():
            leaf.copy_(leaf.flip(0))
        for executor, arguments, options in launches:
            run(executor, *arguments, **options)
        expected = gradient_of((leaf.detach(), y, x), arrives, upstream_prediction=False)
        assert torch.equal(gradient.view(torch.int16), expected.view(torch.int16)), arrives


def test_only_one_gradient_waits_for_its_backward(traffic, device):
    problem = logits, y, x = problem_of(device)
    for _ in range(2):
        gradient_of(problem, 0.5)
    traffic.read()
    for _ in range(2):
        leaves = [logits.clone().requires_grad_() for _ in range(3)]
        losses = [loss_of(leaf, y, x) for leaf in leaves]
        assert traffic.read()[0] == ["loss and gradient", "loss", "loss"]
        (sum(losses) * 0.5).backward()
        assert traffic.read()[1] == 8
        for leaf in leaves:
            assert torch.equal(leaf.grad, gradient_of(problem, 0.5, upstream_prediction=False))
        traffic.read()


def test_losses_without_a_backward_soon_make_no_gradient(traffic, device):
    logits, y, x = problem = problem_of(device)
    for _ in range(2):
        gradient_of(problem, 0.5)
    traffic.read()
    moved = []
    for _ in range(6):
        loss_of(logits.clone().requires_grad_(), y, x)
        gc.collect()
        moved.append(traffic.read()[1])
    assert moved == [4, 4, 4, 4, 2, 2]
    gradient_of(problem, 0.5)
    assert traffic.read()[1] == 6
    gradient_of(problem, 0.5)
    assert traffic.read()[1] == 4


def test_losses_without_a_backward_beside_one_with_it_soon_make_no_gradient(traffic, device):
    problem = problem_of(device)
    leaf = problem[0].clone().requires_grad_()
    moved = []
    for _ in range(30):
        for _ in range(3):
            loss_of(leaf, *problem[1:])
            gc.collect()  # what Triton's interpreter keeps of it
        gradient_of(problem, 1.0)
        gc.collect()
        moved.append(traffic.read()[1])
    assert max(moved) <= 16  # all four with their gradients
    assert moved[-10:].count(12) >= 8  # three losses alone, and 6


def test_losses_that_are_kept_without_a_backward_beside_others_cost_less_and_less(traffic, device):
    logits, y, x = problem = problem_of(device)
    for _ in range(3):
        gradient_of(problem, 0.5)
    traffic.read()
    made = []
    kept = None
    for _ in range(40):
        kept = None  # so that nothing waits when the next is made
        gc.collect()
        kept = loss_of(logits.clone().requires_grad_(), y, x)
        made.append(traffic.read()[0] == ["loss and gradient"])
        gradient_of(problem, 0.5)
        traffic.read()
    del kept
    assert all(made[:4])
    assert sum(made[20:]) <= 2


def test_where_no_gradient_is_wanted_none_is_made_and_nothing_is_learnt(traffic, device):
    logits, y, x = problem_of(device)
    loss_of(logits, y, x)
    with torch.no_grad():
        loss_of(logits.clone().requires_grad_(), y, x)
    with torch.inference_mode():
        loss_of(logits, y, x)
    assert traffic.read() == (["loss"] * 3, 6)
    assert upstream_prediction._expectations == {}


@pytest.mark.parametrize(
    "options", [{"upstream_scale": 0.5}, {"overwrite_logits": True}, {"upstream_prediction": False}]
)
def test_calls_that_ask_for_another_way_do_not_predict(options, device):
    logits, y, x = problem_of(device)
    loss_of(logits.clone().requires_grad_() * 1, y, x, **options).backward()
    assert upstream_prediction._expectations == {}


def test_the_environment_turns_it_off(monkeypatch, device):
    file = Path(upstream_prediction.__file__)
    for value, expected in ((None, True), ("1", True), ("0", False)):
        monkeypatch.delenv("DIFFTRAIN_UPSTREAM_PREDICTION", raising=False)
        if value is not None:
            monkeypatch.setenv("DIFFTRAIN_UPSTREAM_PREDICTION", value)
        assert runpy.run_path(str(file))["IS_ENABLED"] is expected
    monkeypatch.setattr(upstream_prediction, "IS_ENABLED", False)
    gradient_of(problem_of(device), 1.0)
    assert upstream_prediction._expectations == {}


def test_the_switch_must_be_a_bool(device):
    with pytest.raises(TypeError, match="upstream_prediction must be True or False, got 0"):
        loss_of(*problem_of(device), upstream_prediction=0)


def test_there_are_only_so_many_kinds(monkeypatch, device):
    monkeypatch.setattr(upstream_prediction, "MOST_KINDS", 1)
    problem = problem_of(device)
    gradient_of(problem, 1.0)
    gradient_of(problem, 1.0, reduction="sum")
    assert len(upstream_prediction._expectations) == 1


def test_a_capture_begins_no_kind_but_takes_that_of_another_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kind = (torch.device("cuda", 0), torch.bfloat16, "mean", 9, 3)
    assert upstream_prediction._begin((7, 1, *kind)) is None
    assert upstream_prediction._expectations == {}
    warm = upstream_prediction.Expectation(torch.empty(5))
    upstream_prediction._expectations[(8, 1, *kind)] = warm
    assert upstream_prediction._begin((7, 1, *kind)) is warm
    assert upstream_prediction._begin((7, 2, *kind)) is None  # of another thread
