"""Gaps of any length: which lengths are tried, what a length is judged by, and calls of the model that are those asked for."""

import dataclasses

import pytest
import torch

from difftrain.cli import main
from difftrain.data.vocabulary import Characters
from difftrain.errors import UserError
from difftrain.sampling.choosing import Choice
from difftrain.sampling.gaps import NEIGHBOURS, Filled, candidates_of, fill_candidates
from difftrain.sampling.loaded import Loaded
from difftrain.sampling.texts import SampleRequest
from difftrain.sampling.writing import How
from untrained import untrained

LETTERS = "abcdefgh"
WORDS = Characters(tuple(LETTERS + "_ "))
MASK_ID = 10


def loaded(**changes):
    model, config = untrained(MASK_ID + 1, **{"block_size": 24} | changes)
    return Loaded(model, WORDS, config, 1)


def candidates(text, lengths=(1, 3), block_size=24):
    return candidates_of(text, WORDS, lengths, block_size)


def shown(candidate):
    return WORDS.decode(candidate.ids, mask="?")


def test_every_length_of_every_gap_is_tried_and_known_ones_stay():
    assert [shown(c) for c in candidates("a____b")] == ["a????b"]
    assert [shown(c) for c in candidates("__a_____")] == ["__a?????"]
    assert [shown(c) for c in candidates("a[[gap]]b")] == ["a?b", "a??b", "a???b"]
    assert [shown(c) for c in candidates("[[gap]]", (2, 2))] == ["??"]
    both = [shown(c) for c in candidates("[[gap]]a____[[gap]]", (1, 2))]
    assert both == ["?a?????", "?a??????", "??a?????", "??a??????"]


def test_judged_are_the_given_words_near_a_gap_of_unknown_length_alone():
    text = "abcdefghab____[[gap]]cd"
    (candidate,) = candidates(text, (2, 2))
    # Eight places before the gap, of which the last four are masked themselves, and what is left after it.
    assert NEIGHBOURS == 8
    assert candidate.near == {6, 7, 8, 9, 16, 17}
    assert candidates("a____b")[0].near == set()


@pytest.mark.parametrize(
    ("text", "lengths", "told"),
    [
        ("abc", (1, 3), r"must have a gap: ____, at least four underscores .* or \[\[gap\]\]"),
        ("a___b", (1, 3), "at least four underscores"),
        ("x[[gap]]", (1, 3), "outside the vocabulary: 'x'"),
        (
            "[[gap]]" * 3,
            (1, 8),
            "3 gaps of 1 to 8 tokens each are more than the 256 texts that are tried",
        ),
        ("[[gap]]" * 5000, (1, 16), "5000 gaps of 1 to 16 tokens each"),
        ("abcdefgh[[gap]]", (1, 17), r"at most block_size 24 tokens where its gaps are longest, got 25"),
        ("a" * 25 + "[[gap]]", (1, 1), "got 26; give less text, or shorter gap_lengths"),
    ],
)
def test_texts_that_do_not_fit_are_named(text, lengths, told):
    with pytest.raises(UserError, match=told):
        candidates(text, lengths)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ((0, 3), "gap_lengths must be at least 1 .*, got 0"),
        ((4, 3), "must not begin above their end, got 4 and 3"),
        (4, "must be a pair of whole numbers, shortest and longest, got 4"),
        ((1, 2, 3), "must be a pair of whole numbers"),
        ((1.0, 2), "gap_lengths must be a whole number, got float"),
    ],
)
def test_lengths_that_are_none_are_named(value, told):
    with pytest.raises(UserError, match=told):
        SampleRequest(infill="[[gap]]", gap_lengths=value)


@pytest.mark.parametrize("infill", [None, "a____"])
def test_lengths_without_a_gap_that_has_none_are_refused(infill):
    with pytest.raises(UserError, match=r"gap_lengths goes with an infill text that has \[\[gap\]\]"):
        SampleRequest(infill=infill, gap_lengths=(1, 2))


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_each_length_is_filled_as_if_it_were_alone_and_known(position):
    """What makes the texts equally long is seen by none of them."""
    model = loaded(position=position)
    how = How(policy="confidence", steps=6, choice=Choice(temperature=0.0))
    tried = candidates("abc[[gap]]hgfed", (1, 7))
    filled = fill_candidates(model._writer, tried, 1, how)
    for k, candidate in enumerate(tried):
        x = torch.tensor([candidate.ids])
        alone = model._writer.settle(x, dataclasses.replace(how, steps=5))
        assert filled.text(0, k) == alone.x[0].tolist()
        log_p = torch.log(alone.p[x == MASK_ID]).sum()
        torch.testing.assert_close(filled.written[0, k], log_p)
        given = model.logits(alone.x).log_softmax(-1).gather(-1, alone.x[..., None])[0, :, 0]
        torch.testing.assert_close(filled.given[0, k], given[sorted(candidate.near)].sum())
    assert len(filled.written.unique()) == 7


def test_lengths_are_judged_by_what_the_model_gives_however_words_are_chosen():
    """Of words drawn from one alone each would have been drawn with probability 1."""
    model = loaded()
    tried = candidates("abc[[gap]]hgfed", (1, 5))
    greedy, narrowed = (
        fill_candidates(model._writer, tried, 1, How(policy="confidence", steps=2, choice=choice))
        for choice in (Choice(temperature=0.0), Choice(temperature=1.0, top_k=1))
    )
    assert torch.equal(narrowed.ids, greedy.ids)
    torch.testing.assert_close(narrowed.written, greedy.written)


def test_believed_most_is_the_greatest_sum_over_written_and_given_words():
    ids = torch.arange(12).view(2, 2, 3)
    written, given = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.tensor([[-4.0, -2.0], [-2.5, -2.0]])
    filled = Filled(ids, [2, 3], written, given)
    assert filled.best() == [1, 0]
    assert [filled.text(0, 1), filled.text(1, 0)] == [[3, 4, 5], [6, 7]]


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_steps_are_the_calls_of_the_model_for_all_lengths_together_and_what_is_given_stays(steps):
    model, calls = loaded(), []
    model.module.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    options = {"infill": "abc [[gap]]e____ d", "gap_lengths": (2, 9), "steps": steps}
    for policy in ("confidence", "margin", "edit"):
        texts = model.sample(3, policy=policy, **options)
        assert calls == [3 * 8] * steps
        calls.clear()
        for text in texts:
            assert text.startswith("abc ")
            assert text.endswith(" d")
            assert 4 + 2 + 1 + 4 + 2 <= len(text) <= 4 + 9 + 1 + 4 + 2
            assert text[-7] == "e"
    for policy in ("fill", "ancestral", "remask", "remask_untrained"):
        model.sample(1, policy=policy, **options)
        assert 2 <= len(calls) <= steps
        calls.clear()


def test_a_text_with_gaps_is_the_same_alone_and_among_others_and_hangs_on_the_seed():
    model = loaded()
    options = {"infill": "ab[[gap]]cd", "steps": 6, "policy": "confidence"}
    five = model.sample(5, seed=3, **options)
    assert model.sample(1, seed=3, **options) == five[:1]
    assert len(set(five)) > 1
    assert model.sample(5, seed=4, **options) != five
    tried, how = candidates("ab[[gap]]cd", (2, 6)), How(policy="confidence", steps=4)
    one, three = (fill_candidates(model._writer, tried, n, how).ids for n in (1, 3))
    assert torch.equal(three[:1], one), "every length of a text has the text's own numbers"


def test_a_model_that_was_never_taught_to_judge_given_words_is_not_asked_to():
    model, calls = loaded(recipe="mdlm"), []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    tried = candidates("abc[[gap]]de", (1, 4))
    filled = fill_candidates(model._writer, tried, 1, How(policy="confidence", steps=1))
    assert calls == [1]
    assert (filled.given == 0).all()
    model.sample(infill="[[gap]]", steps=3)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 1}, "steps must be at least 2 here, since 1 judges the text, got 1"),
        ({"block_length": 4}, r"block_length does not go with \[\[gap\]\]"),
        ({"approximate": True}, r"approximate does not go with \[\[gap\]\]"),
        ({"prompt": "a"}, "prompt and infill exclude each other"),
        ({"length": 9}, "length and infill exclude each other"),
    ],
)
def test_options_that_do_not_go_with_it_are_named(options, told):
    with pytest.raises(UserError, match=told):
        loaded().sample(infill="a[[gap]]b", **options)


def test_gpt2_mode_cannot_fill_gaps():
    with pytest.raises(UserError, match="gpt2 mode, which cannot fill gaps"):
        loaded(mode="gpt2").sample(infill="a[[gap]]b")


def test_what_is_watched_is_the_first_text_as_it_was_chosen(monkeypatch):
    model, seen = loaded(), []
    monkeypatch.setattr(Filled, "best", lambda _: [4, 1])
    how = How(policy="confidence", steps=4)
    tried = candidates("abc[[gap]]de", (1, 6))
    filled = fill_candidates(model._writer, tried, 2, how, lambda x: seen.append(x.clone()))
    assert len(seen) == 1 + 3
    assert seen[0].tolist() == [tried[4].ids]
    assert seen[-1].tolist() == [filled.text(0, 4)]


def test_the_command_takes_the_marker_and_its_lengths(tiny, capsys):
    from difftrain.training.loop import train

    train(config := tiny(max_iters=2))
    capsys.readouterr()
    words = ["sample", config.out_dir, "--device", "cpu", "--infill", "red [[gap]]een", "--steps", "4"]
    assert main([*words, "--gap_lengths", "2-3"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith("red ")
    assert text.endswith("een")
    assert len(text) in (9, 10)
    assert main([*words, "--gap_lengths", "2"]) == 0
    assert len(capsys.readouterr().out) == 10
    for given in ("a-3", "", "2-3-4"):
        assert main([*words, "--gap_lengths", given]) == 2
        assert f"invalid range of lengths value: '{given}'" in capsys.readouterr().err
