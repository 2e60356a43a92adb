"""Kept keys and values: what they leave out, and when nothing is lost."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from difftrain.data.vocabulary import Characters
from difftrain.errors import UserError
from difftrain.sampling.choosing import Choice
from difftrain.sampling.scoring import KeptKeys, ModelScores
from difftrain.sampling.writing import How, Writer
from untrained import untrained

MASK_ID = 8
BLOCK = slice(4, 8)


def writer(**changes):
    model, config = untrained(MASK_ID + 1, **{"block_size": 16} | changes)
    return Writer(model, Characters(tuple("abcdefgh")), config)


def texts():
    x = torch.randint(0, MASK_ID, (3, 16))
    x[:, 4:7] = MASK_ID
    return x


def scored(made, x, where):
    return ModelScores(made.module, made.config, MASK_ID)(x, where)


@pytest.mark.parametrize("shape", [{}, {"position": "learned"}, {"bias": True, "softcap": 3.0}])
def test_the_first_pass_of_a_block_and_one_in_which_nothing_changed_are_whole_ones(shape):
    made, x = writer(**shape), texts()
    kept = KeptKeys(made.module, made.config, MASK_ID)
    kept.begin(BLOCK)
    for _ in range(3):
        torch.testing.assert_close(kept(x, x == MASK_ID), scored(made, x, x == MASK_ID))
    assert kept.passes == 3


@pytest.mark.parametrize("n_layer", [1, 2])
def test_what_is_written_in_the_block_is_seen_by_the_block_but_changes_nothing_kept_outside(n_layer):
    made, x = writer(n_layer=n_layer), texts()
    kept = KeptKeys(made.module, made.config, MASK_ID)
    kept.begin(BLOCK)
    kept(x, x == MASK_ID)
    x = x.clone()
    x[:, 5] = 2
    where = x == MASK_ID
    whole, ours = scored(made, x, where), kept(x, where)
    if n_layer == 1:  # keys and values are those of the words alone
        torch.testing.assert_close(ours, whole)
    else:
        assert 1e-3 < (ours - whole).abs().max() < (whole - whole.mean(0)).abs().max()
    kept.begin(BLOCK)
    torch.testing.assert_close(kept(x, where), whole)


def test_later_passes_send_the_blocks_own_columns_through_the_model_alone():
    made, seen = writer(), []
    for block in made.module.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    x = torch.full((2, 16), MASK_ID)
    x[:, :2] = 3
    how = How(policy="confidence", steps=14, approximate=True, choice=Choice(temperature=0.0))
    filled = made.fill(x, how)
    assert (filled != MASK_ID).all()
    assert torch.equal(filled[:, :2], x[:, :2])
    # Four blocks of four, of which 2 and 4, 4, 4 are to be written: a whole pass each, and then their own columns.
    assert seen == [n for left in (2, 4, 4, 4) for n in [16, 16] + [4, 4] * (left - 1)]
    exact = made.fill(x, dataclasses.replace(how, approximate=False, block_length=4))
    assert filled.shape == exact.shape


@pytest.mark.parametrize("approximate", [False, True])
def test_narrow_numbers_write_much_the_same_texts_and_the_same_ones_each_time(approximate):
    made, x = writer(), texts()
    x[:, 2:12] = MASK_ID
    how = How(policy="confidence", steps=10, approximate=approximate, choice=Choice(temperature=0.0))
    narrow = dataclasses.replace(made, dtype=torch.bfloat16)
    seen = []
    made.module.blocks[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    filled = narrow.fill(x, how)
    assert set(seen) == {torch.bfloat16}
    assert torch.equal(filled, narrow.fill(x, how))
    seen.clear()
    wide = made.fill(x, how)
    assert set(seen) == {torch.float32}
    assert (filled == wide)[x == MASK_ID].float().mean() > 0.5
    logits = [made_of.scores(x, x == MASK_ID) for made_of in (narrow, made)]
    assert logits[0].dtype == logits[1].dtype == torch.float32
    torch.testing.assert_close(*logits, atol=0.15, rtol=0.05)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("kind", ["scores", "approximate"])
def test_on_cuda_the_context_is_that_of_cuda(kind, monkeypatch):
    """What torch is asked for: there is no device to compute with."""
    entered = []
    monkeypatch.setattr(
        torch, "autocast", lambda device, dtype: entered.append((device, dtype)) or nullcontext()
    )
    monkeypatch.setattr(Writer, "device", torch.device("cuda", 1))
    on_cuda = dataclasses.replace(writer(), dtype=torch.bfloat16)
    scores = on_cuda.scores if kind == "scores" else on_cuda._scores_by(KeptKeys)
    with scores.autocast():
        assert entered == [("cuda", torch.bfloat16)]


def test_gpt2_mode_takes_no_such_approximation():
    made = writer(mode="gpt2")
    with pytest.raises(
        UserError, match="writes from left to right, a pass a token, and takes no approximate"
    ):
        made.continue_causal(texts(), 20, How(approximate=True))


def test_broken_weights_are_told_here_too():
    made = writer()
    made.module.head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinity"):
        made.fill(texts(), How(approximate=True, steps=8))
