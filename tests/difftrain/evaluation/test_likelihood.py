"""The estimators on models whose likelihood is known exactly: independent words, and a Markov chain by enumeration."""

import itertools
import math

import pytest
import torch

from difftrain.evaluation.likelihood import _masked, bound_masked, score_causal
from difftrain.evaluation.windows import Windows, cut
from difftrain.runtime import Runtime

HERE = Runtime(torch.device("cpu"), torch.float64, rank=0, world_size=1)
OPTIONS = {"seed": 3, "runtime": HERE, "batch_size": 64}

# A chain over words 0, 1, 2 in which no word is impossible.
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STEP = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
WORDS, MASK = 3, 3


def chain_probability(tokens):
    p = START[tokens[0]]
    for a, b in itertools.pairwise(tokens):
        p = p * STEP[a, b]
    return p.item()


def chain_model(length):
    """Ids (B, length) to logits (B, length, 4): the exact conditional of each word given those that are seen."""
    texts = torch.tensor(list(itertools.product(range(WORDS), repeat=length)), dtype=torch.int64)
    p = torch.tensor([chain_probability(t) for t in texts.tolist()], dtype=torch.float64)

    def logits_of(x):
        fits = ((x[:, None] == MASK) | (x[:, None] == texts)).all(2)  # (B, texts)
        weight = torch.where(fits, p, 0.0)
        is_word = torch.nn.functional.one_hot(texts, WORDS).double()  # (texts, length, words)
        share = torch.einsum("bt,tlw->blw", weight, is_word) / weight.sum(1)[:, None, None]
        # What the model answers with [MASK], and at words that it sees, must not matter.
        logits = torch.cat((share.log(), torch.full_like(share[..., :1], 5.0)), dim=2)
        return torch.where((x == MASK)[..., None], logits, -logits.abs().nan_to_num(posinf=9.0))

    return logits_of


def windows_of(*texts):
    numbers = torch.arange(len(texts), dtype=torch.int64, device="cpu")
    return Windows([torch.tensor(t, dtype=torch.int64) for t in texts], numbers, len(texts))


@pytest.mark.parametrize("estimator", ["mdlm", "llada"])
def test_the_bound_of_exact_conditionals_is_the_likelihood_itself(estimator):
    texts = [(0, 0, 1, 2, 2), (2, 1, 0, 0, 0), (1, 1, 1, 2, 0)]
    draws = bound_masked(
        chain_model(5), windows_of(*texts), MASK, estimator=estimator, draws=2000, **OPTIONS
    )
    exact = torch.tensor([-math.log(chain_probability(t)) for t in texts], dtype=torch.float64)
    error = draws.std(1) / math.sqrt(draws.shape[1])  # larger than the true one: the draws are stratified
    assert ((draws.mean(1) - exact).abs() < 4 * error).all()
    assert (error < 0.12 * exact).all()  # 1 / t has a long tail


def test_all_maskings_of_each_number_weighed_as_llada_are_the_likelihood_to_the_last_bits():
    text, length = (0, 2, 1, 1), 4
    logits_of, total = chain_model(length), 0.0
    tokens = torch.tensor([text], dtype=torch.int64)
    for n in range(1, length + 1):
        of_n = []
        for chosen in itertools.combinations(range(length), n):
            x = tokens.clone()
            x[0, list(chosen)] = MASK
            log_p = logits_of(x)[0, :, :WORDS].log_softmax(1)
            of_n.append(-sum(log_p[i, text[i]].item() for i in chosen) * length / n)
        total += sum(of_n) / len(of_n) / length
    assert total == pytest.approx(-math.log(chain_probability(text)), rel=1e-12)


@pytest.mark.parametrize("estimator", ["mdlm", "llada"])
def test_independent_words_cost_their_own_information_each(estimator):
    share = torch.tensor([0.6, 0.25, 0.15, 0.0], dtype=torch.float64)
    texts = [[0, 0, 1, 2, 0, 1, 0, 0], [2, 2, 1, 0, 0, 0, 1, 1]]
    draws = bound_masked(
        lambda x: share.log().expand(*x.shape, 4),
        windows_of(*texts),
        MASK,
        estimator=estimator,
        draws=4000,
        **OPTIONS,
    )
    exact = torch.tensor([-sum(math.log(share[w]) for w in t) for t in texts], dtype=torch.float64)
    assert ((draws.mean(1) - exact).abs() < 4 * draws.std(1) / math.sqrt(4000)).all()


def test_words_of_equal_cost_are_exact_in_every_draw_of_llada():
    draws = bound_masked(
        lambda x: torch.zeros(*x.shape, 4, dtype=torch.float64), windows_of([0, 1, 2, 0, 1]), MASK,
        estimator="llada", draws=3, **OPTIONS,
    )  # fmt: skip
    assert draws[0].tolist() == pytest.approx([5 * math.log(3)] * 3)


def test_levels_are_one_in_each_stratum_and_weigh_as_the_formula_says():
    length, draws = 40, 8
    tokens = torch.zeros(draws, length, dtype=torch.int64)
    d = torch.arange(draws, dtype=torch.int64)
    x, weight = _masked(tokens, d, d, MASK, "llada", draws, 0)
    n_masked = (x == MASK).sum(1)
    assert ((n_masked > d * length / draws) & (n_masked <= (d + 1) * length / draws)).all()
    assert torch.equal(weight, length / n_masked.double())
    x, weight = _masked(tokens, d, d, MASK, "mdlm", draws, 0)
    t = 1 / weight
    assert ((t > d / draws) & (t <= (d + 1) / draws)).all()
    many = 2000
    x, weight = _masked(
        torch.zeros(many, length, dtype=torch.int64), torch.arange(many), torch.zeros(many, dtype=torch.int64),
        MASK, "mdlm", 1, 0,
    )  # fmt: skip
    off = (x == MASK).double().mean(1) - 1 / weight
    assert off.abs().max() < 0.4
    assert off.mean().abs() < 0.01


def test_the_likelihood_of_a_causal_model_leaves_out_nothing_but_the_first_token():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.randint(0, WORDS, (23,), generator=torch.Generator().manual_seed(1))
    windows = cut(ids.numpy(), 6, at_most=0, overlap=1)
    found = score_causal(lambda x: logits[x], windows, MASK, runtime=HERE, batch_size=2)
    log_p = logits[:, :WORDS].log_softmax(1)
    assert found.sum().item() == pytest.approx(
        -sum(log_p[a, b].item() for a, b in itertools.pairwise(ids.tolist()))
    )
