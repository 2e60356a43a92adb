"""The benchmark's models, checks and report on the CPU, at tiny shapes; the timings need a GPU."""

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_loss
import contenders
import loss_checks
from contenders import CONTENDERS, Contender, make_problem

import oracle

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

UPSTREAMS = bench_loss.UPSTREAMS
# Compiling takes minutes on a CPU; that contender calls the reference.
EAGER = [c for c in CONTENDERS if "compile" not in c.name]


def problem_of(kind, dtype=torch.bfloat16, n=70, vocab_size=40):
    return make_problem(n, vocab_size, dtype, "cpu", *([16] if kind == "linear" else []))


# Models -------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_traffic_model():
    assert bench_loss.bytes_moved(8192, 50304, 2, with_gradient=False) == 824_180_736
    assert bench_loss.bytes_moved(8192, 50304, 2, with_gradient=True) == 1_648_361_472
    # KERNELS section 4: 0.55 ms on an H100, whose copy moves 3.0 TB/s.
    assert round(1_648_361_472 / 3.0e12 * 1e3, 2) == 0.55


def test_rates_follow_from_time_and_model():
    entry = bench_loss.Entry([8, 10], "bf16", "sample", "", bench_loss.MEASURES[1][0], "timed", ms=2.0)
    bench_loss.add_rates(entry, problem_of("logits", n=8, vocab_size=10), bandwidth=640e3, products={})
    assert entry.gb_per_s == pytest.approx(8 * 10 * 2 * 2 / 2e-3 / 1e9)
    assert entry.percent_of_limit == pytest.approx(25.0)
    assert entry.times_the_products is None
    forward = replace(entry, measure="forward")
    bench_loss.add_rates(forward, problem_of("logits", n=8, vocab_size=10), bandwidth=640e3, products={})
    assert forward.percent_of_limit == pytest.approx(12.5)
    linear = replace(entry, gb_per_s=None, percent_of_limit=None)
    bench_loss.add_rates(linear, problem_of("linear"), bandwidth=1.0, products={True: 1.6, False: 0.5})
    assert linear.times_the_products == pytest.approx(1.25)
    assert linear.gb_per_s is None


def test_inputs_in_turn_are_larger_than_the_cache():
    assert bench_loss.copies_beyond_cache(nbytes=10, cache_bytes=50) == 10
    assert bench_loss.copies_beyond_cache(nbytes=10**9, cache_bytes=50 * 2**20) == 2


# Checking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("rows", [7, 256])
def test_exact_results_are_the_oracles(kind, rows):
    problem = problem_of(kind)
    inputs = [t.detach() for t in problem.inputs]
    logits = inputs[0] if kind == "logits" else F.linear(*inputs)
    y, x, mask_id, pk, pm = problem.labels
    expected = oracle.diffusion_loss(logits.double(), y, x, mask_id, pk, pm)
    assert (expected.counts[:2, 0] > 3).all(), "both penalties must occur"
    assert expected.counts.sum() < 70, "and ignored positions"
    found = loss_checks.exact_results(problem, rows)
    assert found.loss.item() == pytest.approx(expected.loss(), rel=1e-12)
    gradient = torch.from_numpy(expected.gradient) / 70
    products = (
        [gradient]
        if kind == "logits"
        else [gradient @ inputs[1].double(), gradient.t() @ inputs[0].double()]
    )
    for a, b in zip(found.gradients, products, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_every_installed_contender_is_right(kind, dtype, impl, monkeypatch):
    for name in ("fused_diffusion_loss", "fused_linear_diffusion_loss"):
        monkeypatch.setattr(contenders, name, partial(getattr(contenders, name), impl=impl))
    chosen = [c for c in EAGER if c.kind == kind]
    found = dict(
        zip(chosen, loss_checks.objections(problem_of(kind, dtype), chosen, UPSTREAMS), strict=True)
    )
    for contender, objection in found.items():
        if contender.name.startswith(("ours", "eager")):
            assert objection == "", contender.name
        else:
            assert objection == "" or objection.startswith("not installed: "), contender.name
    if kind == "linear" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert next(o for c, o in found.items() if c.name.startswith("torch linear")) == ""


def _composed(problem, **changes):
    """The whole loss from torch's cross-entropy, with something changed."""
    changed = replace(problem, **changes)
    return contenders.weighted(
        lambda logits, y: F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="none")
    )(changed, 1.0)


def _last_maximum(problem, _):
    (logits,) = problem.inputs
    last = logits.shape[1] - 1 - logits.detach().flip(1).argmax(1)
    weight = contenders.weights_of(problem, last)
    return (weight * F.cross_entropy(logits.float(), problem.y, ignore_index=-1, reduction="none")).mean()


class _IgnoresUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, logits):
        (ctx.gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.gradient


def _ignores_upstream(problem, _):
    with torch.enable_grad():
        loss = _composed(problem)
    return _IgnoresUpstream.apply(loss, *problem.inputs)


WRONG = {
    "no pm": (lambda p, _: _composed(p, pm=1.0), "loss off by"),
    "no pk": (lambda p, _: _composed(p, pk=1.0), "loss off by"),
    "the last maximum": (_last_maximum, "loss off by"),
    "mean of those that count": (lambda p, _: _composed(p) * len(p.y) / (p.y != -1).sum(), "loss off by"),
    "upstream ignored": (_ignores_upstream, "gradient off by .* upstream 0.125$"),
    "gradient scaled": (lambda p, _: _composed(p) * 1.1 - 0.1 * _composed(p).detach(), "gradient off by"),
    "NaN": (lambda p, _: _composed(p) * math.nan, "loss off by nan"),
}


def test_the_composition_is_right_where_nothing_is_changed():
    right = Contender("composed", "logits", lambda: lambda p, _: _composed(p))
    assert loss_checks.objections(problem_of("logits"), [right], UPSTREAMS) == [""]


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contender_is_told_apart(fault):
    loss_of, message = WRONG[fault]
    wrong = Contender("sample", "logits", lambda: loss_of)
    (objection,) = loss_checks.objections(problem_of("logits"), [wrong], UPSTREAMS)
    assert re.match(f"wrong: {message}", objection)


def test_a_contender_that_lacks_the_weights_is_held_against_a_plain_cross_entropy():
    plain = Contender(
        "plain", "logits", lambda: lambda p, _: _composed(p, pk=1.0, pm=1.0), contenders.NO_WEIGHTS
    )
    whole = replace(plain, name="whole", lacks="")
    found = loss_checks.objections(problem_of("logits"), [plain, whole], UPSTREAMS)
    assert found[0] == ""
    assert found[1].startswith("wrong: ")


def test_a_contender_that_is_missing_or_fails_does_not_end_the_run():
    def absent():
        raise ImportError("No module named 'no_such_library'")

    def failing():
        raise ZeroDivisionError("first line\nsecond")

    missing, broken = (Contender(f.__name__, "logits", f) for f in (absent, failing))
    found = loss_checks.objections(problem_of("logits"), [missing, broken], UPSTREAMS)
    assert found == [
        "not installed: No module named 'no_such_library'",
        "failed: ZeroDivisionError: first line",
    ]


def test_checking_leaves_the_problem_as_it_was():
    problem = problem_of("logits")
    before = problem.inputs[0].detach().clone()
    overwriting = [c for c in EAGER if c.name == "ours, stated, over the logits"]
    loss_checks.objections(problem, overwriting, UPSTREAMS)
    assert torch.equal(problem.inputs[0].detach(), before)


# Measuring ----------------------------------------------------------------------------------------


def test_quantiles_of_known_samples():
    assert bench_loss.quantiles([float(i) for i in range(11)]) == (5.0, 2.0, 8.0)
    assert bench_loss.quantiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(("each_ms", "count"), [(1.0, 20), (100.0, 5), (1e-4, 200)])
def test_calls_are_timed_in_turn_within_the_budget(each_ms, count):
    made = []
    calls = [partial(made.append, name) for name in "abc"]
    timed = []

    def clock(call):
        timed.append(call)
        call()
        return each_ms

    assert bench_loss.time_calls(calls, 20.0, clock) == (each_ms, each_ms, each_ms)
    assert made[:3] == ["a", "b", "c"], "a call is never timed the first time"
    assert len(timed) == 3 + count
    assert made[6:12] == ["a", "b", "c", "a", "b", "c"][:count]


def test_forward_wants_no_gradient_and_backward_gets_the_upstream_gradient():
    problems = [problem_of("logits"), problem_of("logits")]
    seen = []

    def loss_of(problem, scale):
        seen.append((torch.is_grad_enabled(), scale))
        loss = problem.inputs[0].float().sum()
        if loss.requires_grad:
            loss.register_hook(lambda upstream: seen.append(upstream.item()))
        return loss

    for _, scale in bench_loss.MEASURES:
        calls = bench_loss.calls_of(loss_of, problems, scale)
        assert len(calls) == 2
        calls[1]()
    assert seen == [(False, 1.0), (True, 1.0), 1.0, (True, 0.125), 0.125]


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_run_with_a_fake_clock_fills_every_column(kind, monkeypatch, capsys):
    monkeypatch.setattr(
        bench_loss, "time_calls", lambda calls, _: [call() for call in calls] and (2.0, 1.0, 3.0)
    )
    monkeypatch.setattr(bench_loss, "peak_mib", lambda call: 7.0)
    blank = bench_loss.Entry([70, 40], "bf16", "sample", "", "", "")
    contender = next(c for c in CONTENDERS if c.kind == kind and c.name.startswith("ours"))
    problem = problem_of(kind)
    entries = bench_loss.measure(contender, blank, [problem], 1.0)
    products = bench_loss.product_ms(problem, 1.0) if kind == "linear" else {}
    for entry in entries:
        bench_loss.add_rates(entry, problem, 1e9, products)
    assert [e.measure for e in entries] == [name for name, _ in bench_loss.MEASURES]
    table = bench_loss.report([*entries, replace(blank, contender="other", outcome="wrong: loss off by 1")])
    lines = table.splitlines()
    assert lines[1] == "70 x 40, bf16"
    assert len(lines) == 6
    assert all("2.000 ms [1.000, 3.000]" in line and "7 MiB" in line for line in lines[2:5])
    assert ("GB/s" in lines[2]) == (kind == "logits")
    assert ("1.00 x products" in lines[2]) == (kind == "linear")
    assert ("0.50 x products" in lines[3]) == (kind == "linear")
    assert lines[5].split() == ["other", "wrong:", "loss", "off", "by", "1"]


# Command line -------------------------------------------------------------------------------------


def test_shapes_follow_the_arguments():
    def shapes(*arguments):
        return bench_loss.shapes_of(bench_loss.parse(list(arguments)))

    assert shapes() == bench_loss.LOGITS_SHAPES + bench_loss.LINEAR_SHAPES
    assert shapes("--quick") == [(8192, 50304), (8192, 768, 50304)]
    assert shapes("--vocab", "66", "1000", "--rows", "64") == [(64, 66), (64, 1000)]
    assert shapes("--linear", "8,16,32") == [(8, 16, 32)]
    assert shapes("--linear") == []
    assert shapes("--vocab", "9", "--linear", "8,16,32") == [(8192, 9), (8, 16, 32)]


@pytest.mark.parametrize(
    "arguments", [["--linear", "8,16"], ["--linear", "a,b,c"], ["--rows", "8"], ["--dtype", "fp8"]]
)
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        bench_loss.parse(arguments)
    assert stopped.value.code == 2


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_loss.main(["--quick"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "bench_loss.py measures on a CUDA GPU, and torch finds none.\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_small_run_on_the_gpu(tmp_path, capsys):
    file = tmp_path / "result.json"
    assert (
        bench_loss.main(
            ["--vocab", "1000", "--rows", "256", "--linear", "256,64,1000", "--json", str(file)]
        )
        == 0
    )
    first = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:5]]
    assert first == ["device", "driver", "torch", "triton", "commit"]
    entries = json.loads(file.read_text())["entries"]
    ours = [e for e in entries if e["contender"].startswith("ours")]
    assert ours
    assert all(e["outcome"] == "timed" for e in ours)
