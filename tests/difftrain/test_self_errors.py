"""Wrong words of the model's own: which, how they are drawn, and what a run makes of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.config import Config
from difftrain.data import corrupt
from difftrain.data.self_errors import choose_errors, draw_errors
from difftrain.errors import UserError
from difftrain.training import step as step_module
from difftrain.training.loop import train
from resume_runs import train_all, train_with_stop
from run_digests import digests_of

B, T, V = 64, 16, 7
MASK_ID = V - 1


def batch():
    generator = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randint(MASK_ID, (B, T), generator=generator, dtype=torch.int64, device="cpu")
    samples = torch.arange(B, dtype=torch.int64, device="cpu")
    x, _ = corrupt(tokens, samples, seed=1, split="train", vocab_size=V, max_corruption=0.99)
    return tokens, samples, x


def test_only_wrong_words_are_chosen_in_the_share_asked_for_whatever_the_batch():
    tokens, samples, x = batch()
    is_wrong = (x != tokens) & (x != MASK_ID)
    how = {"seed": 1, "mask_id": MASK_ID}
    assert torch.equal(choose_errors(tokens, x, samples, share=1.0, **how)[0], is_wrong)
    assert not choose_errors(tokens, x, samples, share=0.0, **how)[0].any()
    is_own, u = choose_errors(tokens, x, samples, share=0.5, **how)
    assert not (is_own & ~is_wrong).any()
    assert 0.35 < is_own.sum() / is_wrong.sum() < 0.65
    part = slice(10, 20)
    for found, whole in zip(
        choose_errors(tokens[part], x[part], samples[part], share=0.5, **how), (is_own, u), strict=True
    ):
        assert torch.equal(found, whole[part])
    assert not torch.equal(choose_errors(tokens, x, samples, share=0.5, **how | {"seed": 2})[1], u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_words_are_drawn_by_their_probabilities_among_the_wrong_ones(dtype):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0, 9.0], dtype=dtype, device="cpu").expand(
        1, 20000, V
    )
    before = logits.clone()
    tokens = torch.full((1, 20000), 5, dtype=torch.int64, device="cpu")
    u = (torch.arange(20000, dtype=torch.float32, device="cpu") / 20000)[None]
    words = draw_errors(logits, tokens, u, MASK_ID)
    assert torch.equal(logits, before)
    p = logits[0, 0].double()
    p[5] = p[6] = -torch.inf
    shares = words.flatten().bincount(minlength=V) / 20000
    torch.testing.assert_close(shares, p.softmax(0).float(), rtol=0, atol=1e-3)


def test_the_last_number_below_1_meets_a_word_that_can_be():
    logits = torch.randn(50, 200, V, dtype=torch.float32, device="cpu")
    logits[..., :2] = -200.0  # probability 0 in fp32
    tokens = torch.full((50, 200), 5, dtype=torch.int64, device="cpu")
    for value in (0.0, 1.0 - 2.0**-24):
        words = draw_errors(
            logits, tokens, torch.full((50, 200), value, dtype=torch.float32, device="cpu"), MASK_ID
        )
        assert ((words >= 2) & (words < 5)).all()


def test_no_sum_of_floats_is_cumulated_which_deterministic_cuda_refuses(monkeypatch):
    cumulated, real = [], torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda self, *a, **k: (cumulated.append(self.dtype), real(self, *a, **k))[1]
    )
    logits = torch.randn(2, 3, V, dtype=torch.float32, device="cpu")
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="cpu")
    words = draw_errors(logits, tokens, torch.rand(2, 3, dtype=torch.float32, device="cpu"), MASK_ID)
    assert ((words > 0) & (words < MASK_ID)).all()
    assert cumulated == [torch.int32]


RUN = {
    "max_iters": 9,
    "eval_interval": 4,
    "log_interval": 2,
    "dropout": 0.1,
    "batch_size": 2,
    "self_errors": 0.7,
}


@pytest.mark.usefixtures("one_thread")
def test_a_run_sees_its_own_words_and_learns_that_they_are_wrong(tiny, monkeypatch):
    seen, modes = [], []
    real = step_module.model_loss

    def loss(model, x, y, *arguments, **options):
        modes.append(model.training)
        seen.append((x, y))
        return real(model, x, y, *arguments, **options)

    monkeypatch.setattr(step_module, "model_loss", loss)
    real_bent, asked = step_module.bent_logits, []
    monkeypatch.setattr(
        step_module,
        "bent_logits",
        lambda model, *rest: (asked.append(model.training), real_bent(model, *rest))[1],
    )
    own = tiny(**RUN)
    record = train(own)
    with_own, n = list(seen), len(seen)
    plain = dataclasses.replace(own, self_errors=0.0, out_dir=f"{own.out_dir}-plain")
    assert train(plain)["validation_id"] == record["validation_id"]
    assert all(modes), "the extra pass leaves the model training"
    assert asked == [False] * own.max_iters, "without dropout, and only where it is on"
    changed = 0
    for (x, y), (x_plain, y_plain) in zip(with_own, seen[n:], strict=True):
        assert torch.equal(y, y_plain)
        is_other = x != x_plain
        assert (y[is_other] == 20).all(), "only wrong words, whose target is [MASK]"
        assert (x[is_other] != 20).all()
        changed += is_other.sum()
    assert changed > 5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.xdist_group("processes")
def test_a_run_with_its_own_errors_resumes_exactly_and_two_processes_agree_with_one(tiny, tmp_path):
    straight = tiny(**RUN)
    train(straight)
    for stop_at in (3, 4, 6):
        stopped = dataclasses.replace(straight, out_dir=f"{straight.out_dir}-{stop_at}")
        train_with_stop(stopped, stop_at)
        assert digests_of(stopped) == digests_of(straight), stop_at
    exact = {"dtype": "float64", "dropout": 0.0, "gradient_accumulation_steps": 2}
    alone = dataclasses.replace(straight, **exact, out_dir=str(tmp_path / "alone"))
    train(alone)
    two = dataclasses.replace(alone, out_dir=str(tmp_path / "two"))
    train_all([(two, None)], 2, tmp_path)
    a, b = (
        load_file(find_checkpoint(Path(c.out_dir), "latest").folder / "model.safetensors")
        for c in (alone, two)
    )
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12)


def test_the_share_can_be_scheduled_and_is_refused_where_nothing_is_replaced():
    Config(schedules={"self_errors": {"shape": "linear", "from": 0, "to": 0.5, "steps": 10}})
    with pytest.raises(UserError, match="self_errors must be at most 1.0, got 2.0"):
        Config(self_errors=2.0)
    with pytest.raises(
        UserError, match=r"self_errors must be 0.0 under recipe llada, which masks alone, got 0.5"
    ):
        Config(self_errors=0.5, recipe="llada")
