"""Measures of written texts, on texts whose figures are counted by hand."""

import math

import pytest
import torch
from torch import nn

import measuring.checkout  # noqa: F401
from difftrain.config import Config
from difftrain.data.vocabulary import Characters
from difftrain.sampling.loaded import Loaded
from text_quality.written import distinct_grams, known_words, nll_under, quality, words_of


def test_words_have_three_letters_and_whole_ends():
    assert words_of("def add_one(if xyz)rest") == ["add", "one", "xyz"]
    assert words_of(" def ") == ["def"]
    assert words_of("abc") == []


def test_known_words_and_distinct_runs_are_counted_over_all_texts():
    texts = [" the cat sat ", " the dgo "]
    assert known_words(texts, {"the", "cat", "sat"}) == pytest.approx(4 / 5)
    assert math.isnan(known_words(["a b c"], {"the"}))
    assert distinct_grams(["ababab"], 2) == pytest.approx(2 / 5)
    assert distinct_grams(["ab", "ab", "cd"], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct_grams(["a"], 2))


class Successor(nn.Module):
    """Gives the next letter of the alphabet the odds e^3 to 1."""

    def __init__(self, n):
        super().__init__()
        self.n, self.head = n, nn.Linear(n, n, bias=False)

    def forward(self, x):
        return 3.0 * nn.functional.one_hot((x + 1) % (self.n - 1), self.n).float()


def test_the_judge_counts_each_character_but_the_first():
    words = Characters(tuple("abc de"))
    config = Config(mode="gpt2", data="none", block_size=8, device="cpu")
    judge = Loaded(Successor(7), words, config, 1)
    right, wrong = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 0, 0]])
    log_sum = math.log(math.exp(3) + 5)  # [MASK] takes no part
    assert nll_under(judge, right) == pytest.approx(log_sum - 3, rel=1e-5)
    assert nll_under(judge, wrong) == pytest.approx(log_sum, rel=1e-5)
    assert nll_under(judge, torch.cat((right, wrong))) == pytest.approx(log_sum - 1.5, rel=1e-5)
    figures = quality(torch.tensor([[3, 0, 1, 2, 3]]), words.decode, judge, {"abc"})
    assert figures["known_words"] == 1.0
    assert set(figures) == {"known_words", "distinct", "judge_nll"}
