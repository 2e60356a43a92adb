import math

import numpy as np
import pytest
import torch

from difftrain.evaluation.windows import cut, ratio


def test_pieces_cover_a_text_and_the_last_may_be_shorter():
    windows = cut(np.arange(10), 4, at_most=0)
    assert [t.tolist() for t in windows.tokens] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows.numbers.tolist() == [0, 1, 2]
    assert windows.n_pieces == 3


def test_with_an_overlap_each_token_but_the_first_is_new_once():
    windows = cut(np.arange(10), 4, at_most=0, overlap=1)
    assert [t.tolist() for t in windows.tokens] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_fewer_windows_are_spaced_evenly_and_keep_their_numbers():
    windows = cut(np.arange(1000), 10, at_most=4)
    assert windows.numbers.tolist() == [0, 25, 50, 75]
    assert windows.n_pieces == 100
    assert windows.tokens[1].tolist() == list(range(250, 260))


def test_batches_hold_windows_of_one_length_and_every_pair_once():
    windows = cut(np.arange(10), 4, at_most=0)
    batches = windows.batches(3, draws=2)
    assert sorted(pair for batch in batches for pair in batch) == [
        (w, d) for w in range(3) for d in range(2)
    ]
    assert all(len({len(windows.tokens[w]) for w, _ in batch}) == 1 for batch in batches)


def test_the_standard_error_of_a_ratio_is_that_of_its_spread():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 15, (2000, 50), generator=generator).double()
    sums = sizes * 2.0 + torch.randn(2000, 50, generator=generator, dtype=torch.float64) * 3.0
    found = [ratio(s, z) for s, z in zip(sums, sizes, strict=True)]
    spread = torch.tensor([f.value for f in found]).std().item()
    told = sum(f.standard_error for f in found) / len(found)
    assert told == pytest.approx(spread, rel=0.06)
    assert sum(f.value for f in found) / len(found) == pytest.approx(2.0, abs=0.01)


def test_one_window_has_no_standard_error_and_an_empty_sum_no_value():
    one = torch.ones(1, dtype=torch.float64)
    assert ratio(3 * one, one).value == 3.0
    assert math.isnan(ratio(3 * one, one).standard_error)
    assert math.isnan(ratio(one, 0 * one).value)
