"""Figures of a repair, on a model that knows its text by heart."""

import pytest
import torch

import measuring.checkout  # noqa: F401
from difftrain.errors import UserError
from difftrain.sampling.repairing import Repair
from ring_model import ring
from text_quality.repaired import found_at, repaired


def text(n=4, length=16):
    return (torch.arange(n * length) % 5).view(n, length)


def with_errors(clean):
    wrong = clean.clone()
    wrong[1, 8] = (clean[1, 8] + 2) % 5
    wrong[3, 5] = (clean[3, 5] + 1) % 5
    return wrong


def test_a_model_that_knows_the_text_finds_all_and_puts_all_right():
    clean = text()
    figures = repaired(ring(), clean, with_errors(clean), sure=0.0)
    assert figures == {
        "wrong_before": 2 / 64, "wrong_after": 0.0, "put_right": 1.0, "touched": 1.0, "harmed": 0.0,
    }  # fmt: skip
    assert found_at(ring(), clean, with_errors(clean)) == 1.0


def test_each_share_is_of_its_own_kind_of_words(monkeypatch):
    clean = text()
    wrong = with_errors(clean)  # of them one is put right, the other changed; three right words are harmed
    after = wrong.clone()
    after[1, 8] = clean[1, 8]
    after[3, 5] = (clean[3, 5] + 3) % 5
    after[0, :3] = (clean[0, :3] + 1) % 5
    model = ring()
    answer = Repair(model.tokenizer.decode_words(after.flatten().tolist()), ())
    monkeypatch.setattr(type(model), "repair", lambda self, text, **options: answer)
    assert repaired(model, clean, wrong) == {
        "wrong_before": 2 / 64, "wrong_after": 4 / 64, "put_right": 0.5, "touched": 1.0, "harmed": 3 / 62,
    }  # fmt: skip
    monkeypatch.setattr(type(model), "repair", lambda self, text, **options: Repair("abc", ()))
    with pytest.raises(UserError, match="cuts the repaired text into other words"):
        repaired(model, clean, wrong)


def test_found_counts_the_wrong_words_above_the_price(monkeypatch):
    clean = torch.zeros(1, 200, dtype=torch.int64)
    wrong = clean.clone()
    wrong[0, :4] = 1
    suspicion = torch.linspace(0.0, 0.9, 200)
    suspicion[:4] = torch.tensor([0.95, 0.8, 0.1, 0.99])  # of the 196 right words 1 % lie above 0.89

    def logits(self, x):
        p = torch.zeros(*x.shape, 6)
        p.scatter_(-1, x[..., None], 1 - suspicion[None, :, None])
        p[..., 5] = suspicion
        return p.log()

    model = ring()
    monkeypatch.setattr(type(model), "logits", logits)
    assert found_at(model, clean, wrong) == 0.5
    assert found_at(model, clean, wrong, harmed=0.2) == 0.75
