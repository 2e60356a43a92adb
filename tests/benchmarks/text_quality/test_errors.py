"""Planted errors: so many, wrong every one, and the fluent ones are what the model itself would write."""

import pytest
import torch

import measuring.checkout  # noqa: F401
from ring_model import ring
from text_quality.errors import plant


def windows(n=40, length=16):
    starts = torch.arange(n)[:, None]
    return (starts + torch.arange(length)) % 5


@pytest.mark.parametrize("kind", ["random", "own"])
@pytest.mark.parametrize(("share", "n"), [(0.001, 1), (0.25, 4), (1.0, 16)])
def test_each_window_has_its_share_of_wrong_words_and_no_mask(kind, share, n):
    clean = windows()
    before = clean.clone()
    wrong = plant(kind, ring(), clean, share, seed=0)
    assert torch.equal(clean, before)
    assert torch.equal((wrong != clean).sum(1), torch.full((40,), n))
    assert wrong.max() < 5
    assert torch.equal(wrong, plant(kind, ring(), clean, share, seed=0))
    assert not torch.equal(wrong, plant(kind, ring(), clean, share, seed=1))


def test_own_errors_are_drawn_by_the_model_where_all_their_places_are_masked(monkeypatch):
    model = ring()

    def only_word_2(x):
        assert torch.equal((x == 5).sum(1), torch.full((len(x),), 4))
        return torch.nn.functional.one_hot(torch.full_like(x, 2), 6).float() * 50

    monkeypatch.setattr(type(model), "logits", lambda self, x: only_word_2(x))
    clean = windows()
    wrong = plant("own", model, clean, 0.25, seed=0)
    changed = (wrong != clean) & (clean != 2)
    assert changed.any()
    assert (wrong[changed] == 2).all()
