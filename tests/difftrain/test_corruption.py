import hashlib

import pytest
import torch

from difftrain.config import Config
from difftrain.data import (
    corpus,
    corrupt,
    corrupt_by_recipe,
    corruption,
    count_masked,
    mask_alone,
    mask_share,
)
from difftrain.data.philox import random_words, uniform
from difftrain.errors import UserError

V, MASK_ID = 11, 10  # ten words and [MASK]
KEYS = {"seed": 1337, "split": "train", "vocab_size": V}


def tokens_of(n, length=64, seed=0):
    return torch.randint(0, V - 1, (n, length), generator=torch.Generator().manual_seed(seed))


def counts(tokens, x):
    """Masked and replaced tokens of each sequence."""
    return (x == MASK_ID).sum(1), ((x != tokens) & (x != MASK_ID)).sum(1)


def test_counts_are_the_truncated_rates_of_the_specification():
    length, most = 64, 0.99
    tokens, samples = tokens_of(500, length), torch.arange(500)
    x, _ = corrupt(tokens, samples, max_corruption=most, **KEYS)
    u = uniform(random_words(1337, 1, samples, 2))
    n_mask, n_replaced = counts(tokens, x)
    for i in range(500):
        mask_rate = u[i, 0].item() * most
        replace_rate = u[i, 1].item() * (most - mask_rate)
        assert n_mask[i] == int(length * mask_rate)
        assert n_replaced[i] == int(length * replace_rate)


def test_targets_are_as_specified():
    tokens = tokens_of(300)
    x, y = corrupt(tokens, torch.arange(300), max_corruption=0.99, **KEYS)
    is_masked, is_replaced = x == MASK_ID, (x != tokens) & (x != MASK_ID)
    assert torch.equal(y[is_masked], tokens[is_masked])
    assert (y[is_replaced] == MASK_ID).all()
    rest = ~is_masked & ~is_replaced
    assert torch.equal(x[rest], tokens[rest])
    assert torch.equal(y[rest], tokens[rest])
    assert min(is_masked.sum(), is_replaced.sum(), rest.sum()) > 1000


@pytest.mark.parametrize("vocab_size", [3, 4, 11, 50304])
def test_replaced_tokens_are_never_the_original_nor_mask(vocab_size):
    tokens = torch.randint(0, vocab_size - 1, (400, 50), generator=torch.Generator().manual_seed(1))
    keys = KEYS | {"vocab_size": vocab_size}
    x, y = corrupt(tokens, torch.arange(400), max_corruption=0.99, **keys)
    is_replaced = (y == vocab_size - 1) & (tokens != vocab_size - 1)
    assert is_replaced.sum() > 2000
    assert (x[is_replaced] != tokens[is_replaced]).all()
    assert (x[is_replaced] < vocab_size - 1).all()
    assert (x >= 0).all()


def test_every_other_word_is_equally_likely():
    tokens = torch.full((4000, 64), 3)
    x, y = corrupt(tokens, torch.arange(4000), max_corruption=0.99, **KEYS)
    seen = torch.bincount(x[y == MASK_ID], minlength=V).double()
    assert seen[3] == seen[MASK_ID] == 0
    expected = seen.sum() / 9
    others = torch.cat((seen[:3], seen[4:MASK_ID]))
    assert ((others - expected).abs() < 5 * expected.sqrt()).all()


def test_shares_over_many_samples():
    tokens = tokens_of(40000, 32)
    x, _ = corrupt(tokens, torch.arange(40000), max_corruption=0.99, **KEYS)
    n_mask, n_replaced = counts(tokens, x)
    n = tokens.numel()
    # Truncation takes half a token from each count on average.
    lost = 0.5 / 32
    assert n_mask.sum().item() / n + lost == pytest.approx(0.495, abs=0.006)
    assert n_replaced.sum().item() / n + lost == pytest.approx(0.2475, abs=0.006)
    assert 1 - (n_mask + n_replaced).sum().item() / n - 2 * lost == pytest.approx(0.2575, abs=0.006)


def test_every_position_is_masked_equally_often():
    tokens = tokens_of(8000, 16)
    x, _ = corrupt(tokens, torch.arange(8000), max_corruption=0.99, **KEYS)
    share = (x == MASK_ID).double().mean(0)
    assert share.max() - share.min() < 0.035


def test_a_sample_is_corrupted_the_same_way_in_any_batch():
    tokens, samples = tokens_of(24), torch.arange(100, 124)
    whole = corrupt(tokens, samples, max_corruption=0.99, **KEYS)
    for sizes in ([24], [1] * 24, [5, 19], [12, 12]):
        parts = [
            corrupt(t, s, max_corruption=0.99, **KEYS)
            for t, s in zip(tokens.split(sizes), samples.split(sizes), strict=True)
        ]
        for i in (0, 1):
            assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
    order = torch.randperm(24)
    shuffled = corrupt(tokens[order], samples[order], max_corruption=0.99, **KEYS)
    assert torch.equal(shuffled[0], whole[0][order])


def test_seed_split_and_sample_change_the_corruption_and_the_global_rng_does_not():
    tokens, samples = tokens_of(8), torch.arange(8)
    base = corrupt(tokens, samples, max_corruption=0.99, **KEYS)[0]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(corrupt(tokens, samples, max_corruption=0.99, **KEYS)[0], base)
    assert torch.equal(torch.get_rng_state(), state)
    for change in ({"seed": 1}, {"split": "val"}):
        assert not torch.equal(corrupt(tokens, samples, max_corruption=0.99, **(KEYS | change))[0], base)
    assert not torch.equal(corrupt(tokens, samples + 8, max_corruption=0.99, **KEYS)[0], base)


def test_the_largest_corruption_may_differ_by_sample_and_zero_changes_nothing():
    tokens, samples = tokens_of(200), torch.arange(200)
    most = torch.linspace(0, 0.5, 200)
    x, _ = corrupt(tokens, samples, max_corruption=most, **KEYS)
    n_changed = sum(counts(tokens, x))
    assert (n_changed <= most * 64).all()
    assert torch.equal(x[0], tokens[0])
    assert n_changed[100:].sum() > n_changed[:100].sum()


@pytest.mark.parametrize(("share", "expected"), [(0.15, 9), (0.5, 32), (0.85, 54), (1.0, 64), (0.001, 1)])
def test_mask_share_masks_exactly_that_many_and_replaces_none(share, expected):
    tokens = tokens_of(50)
    x, y = mask_share(tokens, torch.arange(50), share=share, **KEYS)
    n_mask, n_replaced = counts(tokens, x)
    assert (n_mask == expected).all()
    assert (n_replaced == 0).all()
    assert torch.equal(y, tokens)


def test_corruption_is_what_it_was_in_every_version_and_on_every_machine():
    tokens = torch.arange(8 * 64).view(8, 64) % (V - 1)
    made = [
        *corrupt(tokens, torch.arange(8), max_corruption=0.99, **KEYS),
        mask_share(tokens, torch.arange(8), share=0.5, **KEYS)[0],
        mask_alone(tokens, torch.arange(8), **KEYS)[0],
    ]
    digests = [hashlib.sha256(t.numpy().tobytes()).hexdigest()[:12] for t in made]
    assert digests == ["d43f0ff03df0", "47ee0dc38d8d", "b29b580fa15c", "8a0cdcac1526"]


# Masking alone --------------------------------------------------------------------------------------


def test_masking_alone_draws_one_probability_a_sequence_and_each_token_by_itself():
    tokens, samples = tokens_of(300), torch.arange(300)
    x, y, p_mask = mask_alone(tokens, samples, **KEYS)
    assert torch.equal(y, tokens)
    assert (p_mask.shape, p_mask.dtype) == ((300, 1), torch.float32)
    words = random_words(1337, 5, samples, 65).tolist()
    for i in range(300):
        u, *of_tokens = ((word >> 8) / 2**24 for word in words[i])
        p = 0.001 + 0.999 * (1 - u)
        assert p_mask[i].item() == pytest.approx(p, rel=1e-6)
        expected = [MASK_ID if of_tokens[j] < p else token for j, token in enumerate(tokens[i].tolist())]
        assert x[i].tolist() == expected


def test_probabilities_of_masking_are_uniform_above_a_thousandth_and_met():
    tokens = tokens_of(20000, 32)
    x, _, p_mask = mask_alone(tokens, torch.arange(20000), **KEYS)
    assert 0.001 < p_mask.min() < 0.0012
    assert 0.9998 < p_mask.max() <= 1
    tenths = torch.histc(p_mask, 10, 0, 1) / 20000
    torch.testing.assert_close(tenths, torch.full((10,), 0.1), rtol=0, atol=0.01)
    is_masked = (x == MASK_ID).double()
    for low in (0.0, 0.3, 0.9):
        rows = ((p_mask >= low) & (p_mask < low + 0.1)).squeeze(1)
        assert is_masked[rows].mean().item() == pytest.approx(p_mask[rows].mean().item(), abs=0.005)
    # Alone: two neighbours of a sequence are masked together as often as its probability says, p^2.
    both = (is_masked[:, :-1] * is_masked[:, 1:]).mean().item()
    assert both == pytest.approx(p_mask.double().square().mean().item(), abs=0.005)


def test_a_given_probability_holds_for_all_and_a_larger_one_masks_more_of_the_same():
    tokens, samples = tokens_of(2000), torch.arange(2000)
    before = torch.zeros_like(tokens, dtype=torch.bool)
    for p in (0.0, 0.2, 0.6, 1.0):
        x, _, p_mask = mask_alone(tokens, samples, p_mask=p, **KEYS)
        assert (p_mask == torch.tensor(p)).all()
        is_masked = x == MASK_ID
        assert is_masked.double().mean().item() == pytest.approx(p, abs=0.005)
        assert (is_masked | ~before).all()
        before = is_masked


def test_how_many_tokens_are_masked_is_known_without_them():
    tokens, samples = tokens_of(24), torch.arange(100, 124)
    for options in ({}, {"mask_level": "stratified", "span_length": 3}, {"mask_level": "antithetic"}):
        config = Config(recipe="llada", block_size=tokens.shape[1], **options)
        x, _, _ = corrupt_by_recipe(tokens, samples, config, split="train", vocab_size=V)
        assert count_masked(samples, config, split="train") == (x != tokens).sum() > 0


def test_masking_alone_is_a_function_of_seed_split_and_sample():
    tokens, samples = tokens_of(24), torch.arange(100, 124)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    whole = mask_alone(tokens, samples, **KEYS)
    assert torch.equal(torch.get_rng_state(), state)
    for sizes in ([1] * 24, [5, 19]):
        parts = [
            mask_alone(t, s, **KEYS) for t, s in zip(tokens.split(sizes), samples.split(sizes), strict=True)
        ]
        for made, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(made), expected)
    for change in ({"seed": 1}, {"split": "val"}):
        assert not torch.equal(mask_alone(tokens, samples, **(KEYS | change))[2], whole[2])
    assert not torch.equal(mask_alone(tokens, samples + 24, **KEYS)[2], whole[2])


def test_each_use_of_random_words_has_its_own():
    streams = (corpus.STREAMS, corruption.STREAMS, corruption.MASKING_STREAMS)
    assert len({number for stream in streams for number in stream.values()}) == 6


@pytest.mark.parametrize("level", [None, 0.3])
@pytest.mark.parametrize("recipe", ["specification", "llada", "mdlm"])
def test_a_recipe_corrupts_as_it_says(recipe, level):
    tokens, samples = tokens_of(20), torch.arange(20)
    config = Config(recipe=recipe, guaranteed_correct_factor=0.25)
    x, y, p_mask = corrupt_by_recipe(tokens, samples, config, split="val", vocab_size=V, level=level)
    keys = KEYS | {"split": "val"}
    if recipe == "specification":
        expected = *corrupt(tokens, samples, max_corruption=level or 0.75, **keys), None
    else:
        expected = mask_alone(tokens, samples, p_mask=level, **keys)
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])
    assert p_mask is expected[2] is None or torch.equal(p_mask, expected[2])


def test_spans_are_corrupted_together_and_begin_anywhere():
    tokens = tokens_of(400)
    x, _ = corrupt(tokens, torch.arange(400), max_corruption=0.5, span_length=4, replace_factor=0.0, **KEYS)
    n_mask, n_replaced = counts(tokens, x)
    plain, _ = corrupt(tokens, torch.arange(400), max_corruption=0.5, replace_factor=0.0, **KEYS)
    assert torch.equal(n_mask, counts(tokens, plain)[0])
    assert n_replaced.sum() == 0
    is_masked = (x == MASK_ID).long()
    begins = (is_masked.diff(dim=1, prepend=torch.zeros(400, 1, dtype=torch.int64)) == 1).sum().item()
    assert begins < 0.35 * n_mask.sum().item()  # runs of four, now and then joined or cut
    where = {int(i) % 4 for row in is_masked for i in (row.diff() == 1).nonzero()[:, 0]}
    assert where == {0, 1, 2, 3}
    x, _, p_mask = mask_alone(tokens, torch.arange(400), span_length=4, **KEYS)
    is_masked = x == MASK_ID
    alike = (is_masked[:, 1:] == is_masked[:, :-1]).double().mean().item()
    assert alike > 0.85
    assert (is_masked.double().mean(1) - p_mask[:, 0]).mean().abs() < 0.02


def test_factors_of_zero_mask_nothing_or_replace_nothing():
    tokens, samples = tokens_of(300), torch.arange(300)
    n_mask, n_replaced = counts(
        tokens, corrupt(tokens, samples, max_corruption=0.9, mask_factor=0.0, **KEYS)[0]
    )
    assert n_mask.sum() == 0
    assert n_replaced.double().mean().item() / 64 == pytest.approx(0.45, abs=0.04)
    n_mask, n_replaced = counts(
        tokens, corrupt(tokens, samples, max_corruption=0.9, replace_factor=0.0, **KEYS)[0]
    )
    assert n_replaced.sum() == 0
    assert n_mask.sum() > 0


def test_a_wrong_words_target_may_be_the_right_word():
    tokens, samples = tokens_of(100), torch.arange(100)
    x, y = corrupt(tokens, samples, max_corruption=0.9, wrong_target="token", **KEYS)
    assert torch.equal(y, tokens)
    assert torch.equal(x, corrupt(tokens, samples, max_corruption=0.9, **KEYS)[0])


def test_wrong_words_may_follow_the_training_texts_frequencies():
    tokens, samples = tokens_of(500), torch.arange(500)
    frequencies = torch.tensor([100, 50, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.int64)
    x, y = corrupt(tokens, samples, max_corruption=0.9, counts=frequencies, **KEYS)
    seen = torch.bincount(x[(y == MASK_ID) & (tokens > 1)], minlength=V).double()
    assert seen[2:9].sum() == 0
    assert seen[0] / seen[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_factor": 0.5},
        {"replace_factor": 0.5}, {"span_length": 3}, {"replacement": "unigram"}, {"wrong_target": "token"},
    ],
)  # fmt: skip
def test_every_option_of_the_corruption_changes_the_validation_sets_id(tiny, changes):
    from difftrain.data import open_corpus
    from difftrain.evaluation import make_validation_set

    plain, changed = tiny(), tiny(**changes)
    corpus_of = open_corpus(plain.data)
    ids = {make_validation_set(corpus_of, config).id for config in (plain, changed)}
    assert len(ids) == 2


@pytest.mark.parametrize("rule", ["uniform", "cosine", "antithetic", "stratified"])
def test_weights_keep_the_recipes_loss_in_the_mean_whatever_levels_are_drawn(rule):
    """The mean over samples of sum(weight of masked positions) / T is 1 for every rule: each level weighs alike."""
    from difftrain.loss import token_weights

    config = Config(recipe="llada", mask_level=rule, batch_size=16)
    tokens, samples = tokens_of(30000, 16), torch.arange(30000)
    x, _, p_mask = corrupt_by_recipe(tokens, samples, config, split="train", vocab_size=V)
    weights = token_weights(x, p_mask, MASK_ID, config)
    assert weights.double().mean().item() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("rule", ["cosine", "antithetic", "stratified"])
@pytest.mark.parametrize("recipe", ["specification", "llada"])
def test_validation_draws_levels_evenly_whatever_training_does(tiny, rule, recipe):
    from difftrain.data import open_corpus
    from difftrain.evaluation import make_validation_set

    plain = tiny(recipe=recipe, gradient_accumulation_steps=4)
    corpus_of = open_corpus(plain.data)
    other = tiny(recipe=recipe, gradient_accumulation_steps=4, mask_level=rule)
    assert make_validation_set(corpus_of, other).id == make_validation_set(corpus_of, plain).id


def test_a_recipe_that_masks_alone_refuses_what_is_about_wrong_words():
    for name, value in {"mask_factor": 0.5, "replacement": "unigram", "wrong_target": "token"}.items():
        with pytest.raises(UserError, match=f"{name} must be"):
            Config(recipe="llada", **{name: value})
    with pytest.raises(UserError, match="must not both be 0"):
        Config(mask_factor=0.0, replace_factor=0.0)
