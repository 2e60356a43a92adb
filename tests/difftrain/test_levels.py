import math

import pytest
import torch

from difftrain.data.levels import draw_levels, weight_of_level
from difftrain.data.philox import random_words, uniform

KEYS = {"seed": 5, "stream": 1}


def levels(rule, n=4000, n_strata=8, first=0):
    samples = torch.arange(first, first + n)
    words = random_words(5, 1, samples, 1)[:, 0]
    return draw_levels(words, samples, rule, n_strata=n_strata, **KEYS), uniform(words)


def test_uniform_levels_are_the_random_words_as_they_were_before_there_were_rules():
    found, u = levels("uniform")
    assert torch.equal(found, u)


@pytest.mark.parametrize("rule", ["uniform", "antithetic", "stratified"])
def test_levels_are_uniform_in_the_mean_and_the_square(rule):
    found, _ = levels(rule, 40000)
    assert found.mean().item() == pytest.approx(1 / 2, abs=0.005)
    assert found.square().mean().item() == pytest.approx(1 / 3, abs=0.006)
    assert found.min() >= 0
    assert found.max() < 1


def test_two_samples_that_follow_one_another_have_opposite_levels():
    found, u = levels("antithetic")
    assert torch.equal(found[::2], u[::2])
    assert torch.allclose(found[::2] + found[1::2], torch.ones(2000), atol=1e-6)
    odd, _ = levels("antithetic", n=5, first=3)  # a batch may begin in the middle of a pair
    assert torch.equal(odd, found[3:8])


def test_each_step_has_one_level_in_every_stratum():
    found, _ = levels("stratified", n=80, n_strata=8)
    assert torch.equal((found.view(10, 8) * 8).floor().sort(1).values, torch.arange(8.0).expand(10, 8))
    assert found.view(10, 8)[:, 3].unique().numel() == 10


def test_the_cosine_gives_more_masks_and_its_weights_undo_that():
    found, _ = levels("cosine", 200_000)
    assert found.mean().item() == pytest.approx(2 / math.pi, abs=0.003)
    weight = weight_of_level(found, "cosine")
    for power in (0, 1, 2):
        assert (weight * found**power).mean().item() == pytest.approx(1 / (power + 1), abs=0.006)
    assert weight_of_level(found, "uniform") == 1.0
