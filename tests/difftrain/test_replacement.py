import pytest
import torch

from difftrain.data import replacement
from difftrain.data.philox import random_words
from difftrain.data.replacement import other_words, scaled


def draws(n):
    return random_words(3, 9, torch.arange(n // 64), 64)


def test_words_by_frequency_leave_out_the_token_and_keep_the_others_shares():
    counts = torch.tensor([5, 0, 3, 2], dtype=torch.int64)
    for own in range(4):
        tokens = torch.full((1000, 64), own)
        seen = torch.bincount(other_words(tokens, draws(64000), 4, counts).flatten(), minlength=4).double()
        left = counts.double().clone()
        left[own] = 0
        expected = left / left.sum() * seen.sum()
        assert seen[own] == 0
        assert ((seen - expected).abs() <= 5 * expected.sqrt()).all()


def test_the_first_and_the_last_random_word_reach_words_that_occur():
    counts = torch.tensor([0, 4, 0, 4, 0], dtype=torch.int64)
    ends = torch.tensor([[0, 0xFFFFFFFF]] * 5)
    tokens = torch.arange(5)[:, None].expand(5, 2)
    found = other_words(tokens, ends, 5, counts)
    assert found.tolist() == [[1, 3], [3, 3], [1, 3], [1, 1], [1, 3]]


def test_counts_of_a_large_corpus_are_scaled_and_no_word_is_lost():
    counts = torch.tensor([10**13, 1, 0, 3 * 10**13], dtype=torch.int64)
    found = scaled(counts)
    assert found.sum() <= replacement.LARGEST_TOTAL + 1
    assert found[1] == 1
    assert found[2] == 0
    assert found[3] / found[0] == pytest.approx(3, rel=1e-6)
