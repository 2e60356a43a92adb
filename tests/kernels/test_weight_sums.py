"""The weight's gradient summed in rounds: its error, its memory and its work."""

import importlib.util

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from difftrain_kernels import chunks, weight_sums
from difftrain_kernels.terms import PLAIN
from difftrain_kernels.weight_sums import plan_sums
from head_problems import eager_loss, error, head_problem, linear_loss, oracle_values, value_and_gradients

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
BF16, FP32, MIB = torch.bfloat16, torch.float32, 2**20
N, V, D = 30, 400, 16
# 16 KiB hold the sums of 256 words of 16 numbers beside those of 128 in the gradient's memory; 16 are left.
ROUNDS = {"impl": "triton", "workspace_mib": 1 / 64, "chunk_tokens": 20}


def chunked(n, workspace_mib=chunks.DEFAULT_WORKSPACE_MIB, dtype=BF16, **options):
    y = torch.zeros(n, dtype=torch.int64, device="meta")
    plan = {"chunk_tokens": None, "workspace_bytes": int(workspace_mib * MIB), "counted": None} | options
    return chunks.ChunkedLoss.plan(PLAIN, y, 0, -1, "mean", dtype, True, *plan.values())


# The plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "width", "vocab_size", "mib", "flops"),
    [
        pytest.param(65536, 768, 50304, 512, 1.0, id="a small model's head, whole sums"),
        pytest.param(8192, 4096, 128256, 1024, 1.06, id="a large model's head, two rounds"),
    ],
)
def test_peak_beside_the_gradients_at_named_shapes(n, width, vocab_size, mib, flops):
    call = chunked(n)
    assert call.peak_bytes(vocab_size, width, BF16) <= mib * MIB
    plan = call.plan_sums(vocab_size, width, BF16)
    again = sum(words.stop - words.start for words in plan.rounds[1:])
    assert 1 + again / (3 * vocab_size) <= flops
    # An fp32 weight, under autocast, is its own sum.
    assert call.plan_sums(vocab_size, width, FP32).beside == 0


@pytest.mark.parametrize("budget", [0, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("vocab_size", [1, 127, 700, 5000])
@pytest.mark.parametrize("is_there", [False, True])
def test_rounds_cover_the_vocabulary_once_within_the_budget(budget, vocab_size, is_there):
    plan = plan_sums(vocab_size, 64, BF16, FP32, budget, splits=True, is_there=is_there)
    words = [w for part in plan.rounds for w in range(part.start, part.stop)]
    assert words == list(range(vocab_size))
    assert plan.beside * 64 * 4 <= max(budget, 128 * 64 * 4)
    first, *others = plan.rounds
    assert first.stop - plan.own <= plan.beside
    assert all(part.stop - part.start <= plan.beside for part in others)
    assert plan.own * 64 * 4 <= vocab_size * 64 * 2, "the gradient's own memory"
    assert not (is_there and plan.own), "it holds a gradient"


def test_what_cannot_be_made_in_rounds_is_summed_whole():
    for dtype in (torch.float16, FP32):
        assert len(chunked(10, 1e-3, dtype).plan_sums(V, D, dtype).rounds) == 1
    assert plan_sums(V, D, BF16, FP32, 0, splits=False).rounds == (slice(0, V),)
    assert len(chunked(10, 1e-3).plan_sums(V, D, BF16).rounds) > 1


# Values -------------------------------------------------------------------------------------------


@NEEDS_TRITON
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [N, 0])
def test_errors_in_rounds_are_at_most_twice_those_of_eager(n, reduction, device):
    assert len(chunked(N, 1 / 64).plan_sums(V, D, BF16).rounds) == 2
    problem = head_problem(N, V, BF16, device)
    if n == 0:
        empty = (problem[0][:0].detach().requires_grad_(), *problem[1:3], problem[3][:0], problem[4][:0])
        found = value_and_gradients(linear_loss, empty, reduction=reduction, **ROUNDS)
        assert all(g.eq(0).all() for g in found[1:])
        return
    upstream = torch.rand(N, device=device) if reduction == "none" else torch.tensor(0.3, device=device)
    found = value_and_gradients(linear_loss, problem, upstream, reduction=reduction, **ROUNDS)
    eager = value_and_gradients(eager_loss, problem, upstream, reduction=reduction)
    expected = oracle_values(problem, reduction, upstream)
    for ours, theirs, exact in zip(found, eager, expected, strict=True):
        assert ours.dtype == theirs.dtype
        floor = torch.finfo(ours.dtype).eps * exact.abs().max().item()
        assert error(ours, exact) <= 2 * error(theirs, exact) + floor


@NEEDS_TRITON
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forbid_mask": True, "softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1, "logit_scale": 0.7},
        {"counted": 100},
    ],
    ids=["plain", "every term", "counted"],
)
def test_rounds_give_what_whole_sums_do(options, monkeypatch, device):
    monkeypatch.setattr(weight_sums, "ROUNDING_BYTES", 60 * D * 2)  # several pieces, and a rest
    n = 140 if "counted" in options else N
    problem = head_problem(n, V, BF16, device)
    if n > N:
        problem[3][::2] = -1
        options = options | {"chunk_tokens": 100}
    if options.get("forbid_mask"):
        problem[3][problem[3] == 4] = 5
    whole = value_and_gradients(linear_loss, problem, torch.tensor(0.3), impl="triton", **options)
    loss = linear_loss(*problem, **(ROUNDS | options))
    for _ in range(1 if options else 2):  # the second backward computes all again
        found = torch.autograd.grad(loss, problem[:3], torch.tensor(0.3), retain_graph=True)
        for a, b in zip((loss, *found), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(BF16).eps, atol=1e-6)


# Memory and work ----------------------------------------------------------------------------------


@NEEDS_TRITON
def test_rounds_cost_the_products_of_their_words(device):
    problem = head_problem(N, V, BF16, device)
    with FlopCounterMode(display=False) as counter:
        value_and_gradients(linear_loss, problem, **ROUNDS)
    assert counter.get_total_flops() == 2 * N * D * (3 * V + 16)


class LiveBytes(TorchDispatchMode):
    """How much memory was in use at most, of what has been made since; ``known`` tensors were there."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.most = {}, 0
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.seen[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.seen = {k: v for k, v in self.seen.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.seen.values()))
        return result


@NEEDS_TRITON
@pytest.mark.parametrize("way", ["whole", "rounds", "there"])
def test_memory_stays_within_what_the_plan_says(way, monkeypatch, device):
    n, vocab_size, width = 512, 4096, 64
    monkeypatch.setattr(chunks, "LIBRARY_BYTES", 0)
    for module in (chunks, weight_sums):
        monkeypatch.setattr(module, "ROUNDING_BYTES", 16 * 1024)
        # As on a GPU, where a product of narrow numbers needs no wide copies.
        monkeypatch.setattr(module, "add_product", lambda *_: None)
    from difftrain_kernels import triton_kernels

    def no_launch(logits, *_, gradient_out=None, terms=PLAIN, **__):
        statistics = triton_kernels.row_statistics.empty_statistics(len(logits), logits.device, terms)
        return statistics, gradient_out

    monkeypatch.setattr(triton_kernels, "launch_loss_and_gradient", no_launch)
    monkeypatch.setattr(triton_kernels, "launch_loss", lambda *a, **k: no_launch(*a)[0])
    monkeypatch.setattr(triton_kernels, "launch_gradient", lambda *a, gradient_out, **_: gradient_out)
    monkeypatch.setattr(triton_kernels, "launch_rescale", lambda *_, **__: None)
    hidden, weight, _, y, x = head_problem(n, vocab_size, BF16, device, width=width)
    workspace_mib = 1.0 if way == "whole" else 1 / 8
    if way == "there":
        weight.grad = torch.zeros_like(weight)
    call = chunked(n, workspace_mib)
    plan = call.plan_sums(vocab_size, width, BF16, is_there=way == "there")
    assert (len(plan.rounds) > 1) == (way != "whole")
    there = [hidden, weight, y, x] if weight.grad is None else [hidden, weight, y, x, weight.grad]
    with LiveBytes(there) as live:
        linear_loss(
            hidden,
            weight,
            None,
            y,
            x,
            impl="triton",
            workspace_mib=workspace_mib,
            accumulate_into_grad=True,
        ).backward()
    gradients = hidden.nbytes + (0 if way == "there" else weight.nbytes)
    peak = call.bytes_beside_sums(vocab_size, width) + plan.beside * width * 4
    assert live.most - gradients <= peak
    assert live.most - gradients >= 0.6 * peak, "the bound is near"
    if way != "there":
        assert call.peak_bytes(vocab_size, width, BF16) == peak
