import itertools
import math

import pytest
import torch

from difftrain.errors import UserError
from difftrain.sampling.choosing import Choice, draw, probabilities, random_numbers
from difftrain.sampling.policies import make_policy
from difftrain.sampling.settling import Pass, State, settle
from specified_fill import scores_of, settled, specified_fill

WORDS, MASK_ID = 3, 3
GREEDY, PLAIN = Choice(temperature=0.0), Choice()
NAMES = ["fill", "confidence", "margin", "entropy", "ancestral", "remask", "remask_untrained", "edit"]


def noisy_model(x):
    """Logits that hang on every word of the text, and on nothing else."""
    place = torch.arange(x.shape[1])
    seen = (x * (place * 7 + 3)).sum(1, keepdim=True)[..., None]
    word = torch.arange(4)
    return torch.sin(seen * 0.7 + place[None, :, None] * 1.3 + word * 2.1) * 2


def run(policy, x, steps, *, choice=PLAIN, model=noisy_model, **options):
    return settled(model, x, MASK_ID, policy, steps, choice, **options)


def masked(n, length=12):
    x = torch.full((n, length), MASK_ID)
    x[:, 2], x[:, 7] = 1, 2
    return x


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 40])
def test_the_budget_is_kept_all_masks_go_and_given_words_stay(policy, steps):
    x = masked(6)
    state, scores = run(policy, x, steps, seed=3)
    assert scores.passes <= steps
    assert (state.x != MASK_ID).all()
    assert torch.equal(state.x[x != MASK_ID], x[x != MASK_ID])
    if policy in ("confidence", "margin", "entropy") and steps <= 10:
        assert scores.passes == steps


@pytest.mark.parametrize("policy", NAMES)
def test_a_sample_depends_on_the_seed_and_its_index_alone(policy):
    whole, _ = run(policy, masked(8), 5, seed=1)
    part, _ = run(policy, masked(3), 5, seed=1, samples=torch.tensor([5, 0, 7]))
    assert torch.equal(part.x, whole.x[[5, 0, 7]])
    other, _ = run(policy, masked(8), 5, seed=2)
    assert not torch.equal(other.x, whole.x)


@pytest.mark.parametrize("policy", NAMES)
def test_a_text_that_is_done_stays_so_while_another_of_its_batch_is_written(policy):
    """Suspected at every place, a text of two words ends long before one of twelve."""

    def paranoid(x):
        logits = noisy_model(x)
        logits[..., MASK_ID] += 6.0
        return logits

    for seed in range(4):
        x = masked(2)
        x[0, 3:] = 1
        both, _ = run(policy, x, 12, seed=seed, model=paranoid)
        alone, _ = run(policy, x[:1], 12, seed=seed, model=paranoid)
        assert torch.equal(both.x[:1], alone.x)
        assert torch.equal(both.returns[:1], alone.returns)


def test_fill_is_the_specifications_to_the_bit():
    def spec_model(x):
        logits = noisy_model(x)
        logits[..., MASK_ID] += 1.0  # so that [MASK] is answered now and then
        return logits

    for seed in range(5):
        for choice in (GREEDY, Choice(temperature=0.8), Choice(top_k=2)):
            x = masked(4)
            x[:, 3] = seed % 3
            state, _ = run("fill", x, 4, choice=choice, model=spec_model, seed=seed)
            options = {"max_steps": 3, "temperature": choice.temperature, "top_k": choice.top_k}
            assert torch.equal(state.x, specified_fill(spec_model, x, MASK_ID, seed=seed, **options))


def test_confidence_is_the_plain_loop_by_confidence_to_the_bit():
    for steps in (1, 2, 5, 9):
        for temperature in (0, 0.8):
            state, _ = run("confidence", masked(4), steps, choice=Choice(temperature=temperature))
            options = {"max_steps": steps, "temperature": temperature, "by_confidence": True}
            assert torch.equal(state.x, specified_fill(noisy_model, masked(4), MASK_ID, **options))


def test_ancestral_sampling_has_the_distribution_of_its_reverse_process():
    """Against enumeration of every path of two passes over two positions."""
    table = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])

    def conditional(x):  # the second word likes to be the first one's successor, and the other way round
        p = table.expand(len(x), 2, 3).clone()
        for b, (first, second) in enumerate(x.tolist()):
            if first != MASK_ID:
                p[b, 1] = torch.roll(torch.tensor([0.1, 0.8, 0.1]), first)
            if second != MASK_ID:
                p[b, 0] = torch.roll(torch.tensor([0.1, 0.1, 0.8]), second)
        return p

    def logits_of(x):
        return torch.cat((conditional(x).log(), torch.full((len(x), 2, 1), -4.0)), dim=2)

    expected = torch.zeros(3, 3)
    at_start = conditional(torch.full((1, 2), MASK_ID))[0]
    for revealed in itertools.product(
        [True, False], repeat=2
    ):  # each with probability 1 / 2 in the first pass
        for first, second in itertools.product(range(3), repeat=2):
            x = torch.tensor([[first if revealed[0] else MASK_ID, second if revealed[1] else MASK_ID]])
            then = conditional(x)[0]
            p = (at_start if revealed[0] else then)[0, first] * (at_start if revealed[1] else then)[
                1, second
            ]
            expected[first, second] += p / 4
    n = 20000
    state, _ = run("ancestral", torch.full((n, 2), MASK_ID), 2, model=logits_of)
    found = torch.bincount(state.x[:, 0] * 3 + state.x[:, 1], minlength=9).view(3, 3) / n
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    assert ((found - expected).abs() < 5 * (expected / n).sqrt()).all()


def test_a_suspect_goes_back_to_mask_and_is_written_anew_in_sight_of_the_others():
    """Both words are first written as 0 at once; then a 0 beside a 0 is answered [MASK], and a [MASK] beside 0 with 1."""

    def accusing(x):
        logits = torch.zeros(*x.shape, 4)
        left = torch.nn.functional.pad(x[:, :-1], (1, 0), value=-1)
        logits[..., 0] = 5.0
        logits[..., 1] = torch.where((x == MASK_ID) & (left == 0), 9.0, 0.0)
        logits[..., MASK_ID] = torch.where((x == 0) & (left == 0), 12.0, -9.0)
        return logits

    x = torch.full((1, 3), MASK_ID)
    state = State.of(x, MASK_ID)
    state.x[0, :2] = 0  # as if written at once
    state.since[0, :2] = 0
    scores = scores_of(accusing)
    settle(
        scores,
        state,
        MASK_ID,
        make_policy("remask"),
        steps=8,
        choice=GREEDY,
        seed=0,
        samples=torch.arange(1),
    )
    assert state.returns.tolist() == [[0, 1, 0]]
    assert state.x[:, :2].tolist() == [[0, 1]]


@pytest.mark.parametrize("policy", ["remask", "remask_untrained"])
def test_remasking_ends_however_suspicious_the_model_is(policy):
    def paranoid(x):
        logits = noisy_model(x)
        logits[..., MASK_ID] = 50.0
        return logits

    options = {"remask": {"suspect": 0.5}, "remask_untrained": {"share": 1.0}}[policy]
    state = State.of(masked(20), MASK_ID)
    scores = scores_of(paranoid)
    samples = torch.arange(20)
    settle(
        scores,
        state,
        MASK_ID,
        make_policy(policy, **options),
        steps=30,
        choice=PLAIN,
        seed=0,
        samples=samples,
    )
    assert scores.passes <= 30
    assert (state.x != MASK_ID).all()
    assert state.returns.max() == 2
    assert state.returns[:, [2, 7]].sum() == 0


def test_untrained_remasking_sends_back_as_many_as_its_schedule_says_the_unlikely_more_often():
    """In the pass that follows half of them, with eta 0.3: 0.3 times min(1, (1 - 0.6) / 0.5), by exp(-p)."""
    n, length = 200, 100
    x = torch.zeros(n, length, dtype=torch.int64)
    x[:, 50:] = MASK_ID
    state = State.of(x, MASK_ID, torch.ones(n, length, dtype=torch.bool))
    state.since[:, :50] = 0
    state.p[:, :25] = 0.0
    seen = _a_pass(x, step=5, steps=10)
    _, goes_back = make_policy("remask_untrained", share=0.3).decide(state, seen, x == MASK_ID)
    assert not goes_back[:, 50:].any()
    unlikely, likely = (goes_back[:, part].double().mean().item() for part in (slice(25), slice(25, 50)))
    mean = (1 + math.exp(-1)) / 2
    assert unlikely == pytest.approx(0.3 * 0.8 / mean, abs=0.03)
    assert likely == pytest.approx(0.3 * 0.8 * math.exp(-1) / mean, abs=0.03)
    for step in (0, 8, 9):  # nothing is written yet, and the last two passes
        _, goes_back = make_policy("remask_untrained").decide(state, _a_pass(x, step, 10), x == MASK_ID)
        assert not goes_back.any()


def _a_pass(x, step, steps):
    where = x == MASK_ID
    rows = int(where.sum())
    chance = random_numbers(0, torch.arange(len(x)), step, x.shape[1])
    word = torch.zeros(rows, dtype=torch.int64)
    return Pass(step, steps, MASK_ID, where, torch.zeros(rows, 4), word, torch.ones(rows), word, chance)


def test_a_words_probability_is_that_of_its_draw():
    state, _ = run("confidence", masked(4), 5)
    assert torch.equal(state.p[:, [2, 7]], torch.ones(4, 2))
    written = [i for i in range(12) if i not in (2, 7)]
    assert (state.p[:, written] < 1).all()
    assert (state.p[:, written] > 0).all()


def test_only_positions_that_are_not_settled_are_asked_for():
    _, scores = run("confidence", masked(4), 5)
    counts = [int(where.sum()) for where in scores.asked]
    assert counts[0] == 40
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= 8


def test_an_edit_overwrites_what_another_word_beats_and_never_what_was_given():
    def stubborn(x):
        logits = torch.zeros(*x.shape, 4)
        logits[..., 1] = torch.where((x == MASK_ID).any(1, keepdim=True), 0.5, 9.0)
        logits[..., 2] = torch.where((x == MASK_ID).any(1, keepdim=True), 0.6, 0.0)
        return logits

    x = torch.full((1, 4), MASK_ID)
    x[0, 0] = 0
    state = State.of(x, MASK_ID)
    state.x[0, 1:3] = 2
    state.since[0, 1:3] = 0
    scores = scores_of(lambda ids: stubborn(ids).index_fill(2, torch.tensor([1]), 9.0))
    settle(
        scores, state, MASK_ID, make_policy("edit"), steps=4, choice=GREEDY, seed=0, samples=torch.arange(1)
    )
    assert state.x.tolist() == [[0, 1, 1, 1]]


def test_probabilities_are_cut_as_their_options_say():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    cases = {
        Choice(top_k=2): [2 / 3, 1 / 3, 0, 0],
        Choice(top_p=0.7): [2 / 3, 1 / 3, 0, 0],
        Choice(top_p=0.5): [1, 0, 0, 0],
        Choice(min_p=0.25): [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0],
        Choice(temperature=0.5): [t / 0.345 for t in (0.25, 0.0625, 0.0225, 0.01)],
    }
    for choice, expected in cases.items():
        torch.testing.assert_close(
            probabilities(logits, choice)[0], torch.tensor(expected, dtype=torch.float32)
        )
    recent = torch.tensor([[True, False, False, False]])
    torch.testing.assert_close(
        probabilities(logits, Choice(repetition=2.0), recent)[0],
        torch.tensor([0.25, 0.25, 0.15, 0.1]) / 0.75,
    )


def test_draws_follow_their_probabilities_and_never_take_a_word_without_any():
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    u = random_numbers(0, torch.arange(200), 3, 100).flatten()
    words = draw(p.expand(len(u), 5), u)
    seen = torch.bincount(words, minlength=5) / len(u)
    assert seen[[0, 2, 4]].sum() == 0
    assert seen[1].item() == pytest.approx(0.3, abs=0.02)
    assert draw(p[None], torch.tensor([0.0])).item() == 1
    assert draw(p[None], torch.tensor([1.0 - 2**-24])).item() == 3


def test_numbers_differ_between_samples_passes_and_positions():
    a = random_numbers(0, torch.arange(4), 0, 50)
    assert a.unique().numel() == 200
    assert not torch.equal(a, random_numbers(0, torch.arange(4), 1, 50))
    assert torch.equal(a[2:3], random_numbers(0, torch.tensor([2]), 0, 50))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (lambda: run("fill", masked(1), 0), "steps must be at least 1, got 0"),
        (lambda: make_policy("magic"), "policy must be one of fill, confidence"),
        (lambda: make_policy("confidence", schedule="round"), "schedule must be one of linear, cosine"),
        (lambda: make_policy("fill", suspect=0.3), "policy fill does not take suspect"),
        (lambda: Choice(temperature=math.nan), "temperature must be finite"),
        (lambda: Choice(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (lambda: Choice(min_p=1.5), r"min_p must be in \[0, 1\], got 1.5"),
        (lambda: Choice(repetition=0.5), "repetition must be finite and at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(what, told):
    with pytest.raises(UserError, match=told):
        what()
