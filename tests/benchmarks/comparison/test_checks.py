"""Who may be timed: contenders held against the reference in fp64, on tiny shapes through the interpreter."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import oracle
from bench_samples import UPSTREAMS, composed, logits_contender, objection, problem_of
from comparison import checks, contenders, entries
from comparison.checks import Judge

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("rows", [7, 256])
def test_exact_results_are_the_oracles(kind, rows):
    problem = problem_of(kind, device="cpu")
    inputs = [t.detach() for t in problem.inputs]
    logits = inputs[0] if kind == "logits" else F.linear(*inputs)
    y, x, mask_id, pk, pm = problem.labels
    expected = oracle.diffusion_loss(logits.double(), y, x, mask_id, pk, pm)
    assert (expected.counts[:2, 0] > 3).all(), "both penalties must occur"
    assert expected.counts.sum() < 70, "and ignored positions"
    found = checks.exact_results(problem, rows)
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
def test_eager_results_in_parts_are_those_of_the_whole_batch(kind):
    problem = problem_of(kind, torch.float32)
    whole, _ = checks.results_of(contenders._eager(), problem, 0.125)
    parts = checks.eager_results(problem, 0.125, rows=32)
    torch.testing.assert_close(parts.loss, whole.loss)
    for a, b in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(a, b)


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
        loss = composed(problem)
    return _IgnoresUpstream.apply(loss, *problem.inputs)


WRONG = {
    "no pm": (lambda p, _: composed(p, pm=1.0), "loss off by"),
    "no pk": (lambda p, _: composed(p, pk=1.0), "loss off by"),
    "the last maximum": (_last_maximum, "loss off by"),
    "mean of those that count": (lambda p, _: composed(p) * len(p.y) / (p.y != -1).sum(), "loss off by"),
    "upstream ignored": (_ignores_upstream, "gradient off by .* upstream 0.125$"),
    "gradient scaled": (lambda p, _: composed(p) * 1.1 - 0.1 * composed(p).detach(), "gradient off by"),
    "NaN": (lambda p, _: composed(p) * math.nan, "loss off by nan"),
}


def _wrong_without_gradient(problem, _):
    return composed(problem) + (0.0 if torch.is_grad_enabled() else 0.1)


def test_the_composition_is_right_where_nothing_is_changed():
    assert objection(logits_contender(lambda p, _: composed(p)), problem_of("logits")) == ""


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contender_is_told_apart(fault):
    loss_of, message = WRONG[fault]
    assert re.match(f"wrong: {message}", objection(logits_contender(loss_of), problem_of("logits")))


def test_a_contender_wrong_only_where_no_gradient_is_wanted_is_told_apart():
    found = objection(logits_contender(_wrong_without_gradient), problem_of("logits"))
    assert re.match("wrong: loss off by 0.1, allowed .* without gradient$", found)


def test_a_contender_that_lacks_the_weights_is_held_against_a_plain_cross_entropy():
    def plain(problem, _):
        return composed(problem, pk=1.0, pm=1.0)

    assert objection(logits_contender(plain, entries.NO_WEIGHTS), problem_of("logits")) == ""
    assert objection(logits_contender(plain), problem_of("logits")).startswith("wrong: ")


def test_a_contender_that_writes_over_its_input_is_noticed_and_the_problem_stays_as_it_was():
    problem = problem_of("logits")
    before = problem.inputs[0].detach().clone()

    def overwriting(with_gradient, problem, _):
        loss = composed(problem)  # keeps what its gradient needs in fp32
        if torch.is_grad_enabled() == with_gradient:
            problem.inputs[0].data.zero_()
        return loss

    judge = Judge(problem, UPSTREAMS)
    both = (partial(overwriting, with_gradient) for with_gradient in (True, False))
    for loss_of, overwrites in (*((o, True) for o in both), (lambda p, _: composed(p), False)):
        verdict = judge.verdict(loss_of)
        assert (verdict.objection, verdict.overwrites) == ("", overwrites)
    assert torch.equal(problem.inputs[0].detach(), before)
