import numpy as np
import pytest
import torch

from difftrain.data import philox
from difftrain.data.philox import below, philox4x32, random_words, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_known_answers_of_the_papers_authors(counter, key, words):
    parts = [torch.tensor([int(c, 16)]) for c in counter.split()]
    got = philox4x32(tuple(parts), tuple(int(k, 16) for k in key.split()))
    assert [f"{w.item():08x}" for w in got] == words.split()


def test_the_host_draws_the_same_words_as_a_device(monkeypatch):
    samples = torch.tensor([0, 7, 2**32 - 1, 2**33 + 5, 2**62])
    for seed in (0, 1337, 2**64 - 1):
        for n in (1, 4, 131):
            monkeypatch.setattr(philox, "lies_on_host", lambda tensor: True)
            on_host = random_words(seed, 5, samples, n)
            monkeypatch.setattr(philox, "lies_on_host", lambda tensor: False)
            assert torch.equal(on_host, random_words(seed, 5, samples, n))
            assert on_host.shape == (5, n)
    assert random_words(1, 5, samples[:0], 3).shape == (0, 3)


def test_a_row_depends_on_its_sample_alone():
    samples = torch.tensor([5, 2**33 + 7, 5, 0])
    words = random_words(1337, 1, samples, 10)
    assert torch.equal(words[0], words[2])
    alone = torch.cat([random_words(1337, 1, s[None], 10) for s in samples])
    assert torch.equal(words, alone)
    assert torch.equal(words[:, :3], random_words(1337, 1, samples, 3))


def test_seed_stream_and_every_bit_of_the_sample_matter():
    base = random_words(1337, 1, torch.tensor([0]), 4)
    others = [random_words(1337, 1, torch.tensor([1 << b]), 4) for b in range(62)]
    others += [random_words(1337, 2, torch.tensor([0]), 4)]
    others += [random_words(1337 ^ (1 << b), 1, torch.tensor([0]), 4) for b in range(64)]
    rows = torch.cat([base, *others])
    assert len(rows.unique(dim=0)) == len(rows)


def test_words_are_uniform_and_numbers_stay_in_range():
    words = random_words(3, 1, torch.arange(1000), 100).flatten()
    assert words.min() >= 0
    assert words.max() < 2**32
    share = np.bincount((words >> 28).numpy(), minlength=16) / len(words)
    assert np.abs(share - 1 / 16).max() < 5 * (1 / 16 / len(words)) ** 0.5
    assert 0 <= uniform(words).min() < uniform(words).max() < 1
    assert below(words, 7).unique().tolist() == list(range(7))
    ends = torch.tensor([0, 2**32 - 1])
    assert uniform(ends).tolist() == [0.0, 1 - 2.0**-24]
    assert below(ends, 2**31).tolist() == [0, 2**31 - 1]
