import pytest
import torch

from difftrain.errors import UserError
from difftrain.sampling.blocks import settle_in_blocks
from difftrain.sampling.choosing import Choice
from difftrain.sampling.policies import POLICIES, make_policy
from difftrain.sampling.settling import State

MASK_ID, BLOCK_SIZE = 9, 8


def written(x, steps, policy="confidence", **options):
    """The state after all blocks, what the model saw in each pass, and where it was asked."""
    seen = []

    def scores(ids, where):
        seen.append((ids[0].tolist(), where[0].nonzero().flatten().tolist()))
        logits = torch.zeros(*ids.shape, MASK_ID + 1)
        logits.scatter_(2, torch.full_like(ids, len(seen) % 9)[..., None], 5.0)  # the word tells the pass
        return logits[where]

    state = State.of(x, MASK_ID)
    taken = settle_in_blocks(
        scores, state, MASK_ID, make_policy(policy), steps=steps, block_size=BLOCK_SIZE,
        choice=Choice(temperature=0), seed=0, samples=torch.arange(len(x)), **options,
    )  # fmt: skip
    assert taken == len(seen)
    return state, seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("length", "n_blocks"), [(8, 1), (9, 3), (16, 4), (21, 6)])
def test_blocks_share_the_passes_and_none_goes_without(policy, length, n_blocks):
    x = torch.full((1, length), MASK_ID)
    for steps in (n_blocks, n_blocks + 1, n_blocks + 3):
        state, seen = written(x, steps, policy)
        assert (state.x != MASK_ID).all()
        assert len(seen) <= steps
        if policy in ("confidence", "margin", "entropy", "edit"):
            assert len(seen) == steps
    with pytest.raises(
        UserError, match=f"steps must be at least {n_blocks}, one for each block of the text"
    ):
        written(x, n_blocks - 1, policy)


def test_a_block_is_written_in_sight_of_what_was_written_before_and_given_after():
    x = torch.full((1, 16), MASK_ID)
    x[0, 9] = 0
    state, seen = written(x, 4)
    assert state.x.tolist() == [[1] * 4 + [2] * 4 + [3, 0, 3, 3] + [4] * 4]
    m = MASK_ID
    assert [ids for ids, _ in seen] == [
        [m] * 8,
        [1, 1, m, m, m, m, m, 0],  # the given word shows at its end
        [2, 2, 2, 2, m, 0, m, m],
        [3, 0, 3, 3, m, m, m, m],
    ]
    assert [where for _, where in seen] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 6, 7], [4, 5, 6, 7]]


def test_each_pass_is_told_of_with_the_whole_text():
    told = []
    x = torch.full((2, 20), MASK_ID)
    state, seen = written(x, 10, on_pass=lambda now: told.append(now.clone()))
    assert len(told) == len(seen) == 10
    assert [int((now == MASK_ID).sum()) for now in told] == [36, 32, 28, 24, 20, 16, 12, 8, 4, 0]
    assert torch.equal(told[-1], state.x)


def test_blocks_without_a_mask_take_no_pass_and_a_whole_text_none():
    x = torch.full((1, 16), 0)
    assert written(x, 1)[1] == []
    x[0, 13] = MASK_ID
    assert len(written(x, 1)[1]) == 1


def test_a_text_that_fits_goes_in_blocks_where_that_is_asked_for():
    _, seen = written(torch.full((1, 8), MASK_ID), 4, block_length=2)
    assert [where for _, where in seen] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert seen[1][0] == [1, 1] + [MASK_ID] * 6
