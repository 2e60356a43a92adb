import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.cli import main
from difftrain.errors import UserError
from difftrain.loss import bend_rows, bent_logits
from difftrain.model import Transformer
from difftrain.reporting.log import FILE
from difftrain.sampling import choosing
from difftrain.sampling.causal import continue_causal
from difftrain.sampling.choosing import Choice
from difftrain.sampling.policies import POLICIES
from difftrain.sampling.scoring import ModelScores
from difftrain.sampling.texts import (
    Sample,
    SampleRequest,
    keep_sample,
    sample_run,
    write_texts,
)
from difftrain.sampling.writing import Writer
from difftrain.training.loop import train
from specified_fill import scores_of, settled

MASK_ID = 4


def fixed(logits):
    """A model that gives these (T, V) logits for any input, and counts its passes."""

    def model(x):
        model.passes += 1
        return torch.tensor(logits).expand(x.shape[0], -1, -1).clone()

    model.passes = 0
    return model


def one_hot(*best, high=50.0):
    return [[high if v == b else 0.0 for v in range(5)] for b in best]


def fill(model, x, steps=65, policy="fill", **choice):
    return settled(model, x, MASK_ID, policy, steps, Choice(**choice))[0].x


def test_fill_replaces_masks_and_nothing_else():
    x = torch.tensor([[MASK_ID, 1, MASK_ID, 3]])
    filled = fill(fixed(one_hot(0, 0, 2, 0)), x, temperature=0)
    assert filled.tolist() == [[0, 1, 2, 3]]
    assert x.tolist() == [[MASK_ID, 1, MASK_ID, 3]]


def test_a_sampled_mask_stays_until_the_last_pass_which_forbids_it():
    model = fixed([[0.0, 1.0, 2.0, 0.0, 9.0], [5.0, 0.0, 0.0, 0.0, 1.0]])
    x = torch.full((1, 2), MASK_ID)
    filled = fill(model, x, steps=4, temperature=0)
    assert filled.tolist() == [[2, 0]]
    assert model.passes == 4


def test_fill_stops_when_nothing_is_masked():
    model = fixed(one_hot(0, 1))
    fill(model, torch.full((1, 2), MASK_ID), steps=50, temperature=0)
    assert model.passes == 1


def test_by_confidence_fills_a_fixed_share_a_pass_best_first():
    seen = []

    def model(x):
        seen.append(x.clone())
        strength = torch.tensor([1.0, 4.0, 3.0, 2.0])
        logits = torch.zeros(1, 4, 5)
        logits[0, :, 1] = strength
        logits[0, :, MASK_ID] = 99.0  # forbidden throughout
        return logits

    filled = fill(model, torch.full((1, 4), MASK_ID), steps=2, temperature=0, policy="confidence")
    assert filled.tolist() == [[1, 1, 1, 1]]
    assert [s[0].tolist() for s in seen] == [[4, 4, 4, 4], [4, 1, 1, 4]]


def test_temperature_and_top_k_shape_the_distribution():
    logits = [[0.0, 1.0, 2.0, 3.0, -9.0]]
    x = torch.full((4000, 1), MASK_ID)
    draws = {}
    for name, options in {"plain": {}, "cold": {"temperature": 0.5}, "top": {"top_k": 2}}.items():
        filled = fill(fixed(logits), x, **options)
        draws[name] = torch.bincount(filled.flatten(), minlength=5)[:4] / 4000
    scores = torch.arange(4.0)
    torch.testing.assert_close(draws["plain"], scores.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(draws["cold"], (2 * scores).softmax(0), atol=0.03, rtol=0)
    assert draws["top"][:2].sum() == 0
    torch.testing.assert_close(draws["top"][2:], torch.tensor([2.0, 3.0]).softmax(0), atol=0.03, rtol=0)


def go_on(model, start, length, block_size, seed=0, samples=(0,), **choice):
    return continue_causal(
        scores_of(model), torch.tensor(start), length, MASK_ID, block_size=block_size,
        choice=Choice(**({"temperature": 0} | choice)), seed=seed, samples=torch.tensor(samples),
    )  # fmt: skip


def test_causal_sampling_draws_by_the_seed_and_the_samples_index_alone():
    model = lambda x: torch.sin(x.sum(1)[:, None, None] + torch.arange(5.0)).expand(-1, x.shape[1], -1)  # noqa: E731
    three = go_on(model, [[1]] * 3, 30, 8, samples=(0, 1, 2), temperature=1.0)
    assert len(three.unique(dim=0)) == 3
    assert torch.equal(go_on(model, [[1]], 30, 8, samples=(2,), temperature=1.0), three[2:])
    assert not torch.equal(go_on(model, [[1]], 30, 8, samples=(2,), seed=1, temperature=1.0), three[2:])


def test_causal_sampling_draws_every_token_anew():
    even = lambda x: torch.tensor([0.0, 0.0, 0.0, 0.0, -50.0]).expand(1, x.shape[1], -1)  # noqa: E731
    words = go_on(even, [[1]], 201, 8, temperature=1.0)[0, 1:]
    assert words.bincount(minlength=4).min() > 25


def test_repetition_counts_words_before_a_place_and_not_its_own_or_later_ones(monkeypatch):
    monkeypatch.setattr(choosing, "REPETITION_WINDOW", 2)
    even = fixed([[1.0, 0.5, 0.0, -9.0, -9.0]] * 4)
    x = torch.tensor([[MASK_ID, 0, MASK_ID, MASK_ID]])
    assert fill(even, x, temperature=0, repetition=3.0).tolist() == [[0, 0, 1, 1]]  # all at once
    one = lambda x: torch.tensor([1.0, 0.5, 0.0, -9.0, -9.0]).expand(1, x.shape[1], -1)  # noqa: E731
    assert go_on(one, [[0]], 6, 8, repetition=3.0).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_causal_sampling_appends_and_never_writes_mask():
    def successor(x):
        logits = torch.zeros(*x.shape, 5)
        logits.scatter_(-1, ((x + 1) % 4)[..., None], 9.0)
        logits[..., MASK_ID] = 99.0
        return logits

    out = go_on(successor, [[2]], 5, block_size=8)
    assert out.tolist() == [[2, 3, 0, 1, 2]]


def test_causal_sampling_beyond_block_size_sees_the_last_block_size_tokens():
    seen = []

    def model(x):
        seen.append(x[0].tolist())
        logits = torch.zeros(*x.shape, 5)
        logits[:, -1, len(seen) % 4] = 9.0
        return logits

    out = go_on(model, [[3, 3]], 7, block_size=3)
    assert out.tolist() == [[3, 3, 1, 2, 3, 0, 1]]
    assert seen == [[3, 3], [3, 3, 1], [3, 1, 2], [1, 2, 3], [2, 3, 0]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_folder):
    from difftrain.config import Config

    config = Config(
        out_dir=str(tmp_path_factory.mktemp("sample") / "run"), data=str(corpus_folder), device="cpu",
        block_size=16, batch_size=16, n_layer=1, n_head=2, n_embd=32, max_iters=40, learning_rate=1e-2,
        warmup_iters=2, masking_warmup_iters=10, eval_interval=40, eval_iters=4, eval_batch_size=8,
    )  # fmt: skip
    train(config)
    return Path(config.out_dir)


REQUEST = SampleRequest(device="cpu", steps=5)


def write(run_dir, **changes):
    return sample_run(run_dir, dataclasses.replace(REQUEST, **changes)).text


def test_same_seed_same_text_and_another_seed_another(trained):
    assert write(trained, seed=3) == write(trained, seed=3)
    assert write(trained, seed=3) != write(trained, seed=4)


def test_greedy_ignores_the_seed(trained):
    assert write(trained, temperature=0, seed=3) == write(trained, temperature=0, seed=4)


def test_prompt_begins_every_text_and_texts_differ(trained):
    text = write(trained, prompt="red ", num_samples=3)
    samples = [part.split("\n", 1)[1] for part in text.split("--- ")[1:]]
    assert len(samples) == len(set(samples)) == 3
    assert all(s.startswith("red ") for s in samples)
    assert len(write(trained, prompt="red ", length=9)) == 9


def test_infill_keeps_the_text_around_the_gap(trained):
    text = write(trained, infill="red ____een")
    assert len(text) == 11
    assert text.startswith("red ")
    assert text.endswith("een")
    assert "_" not in text


def test_held_out_shows_original_masked_and_restored_and_ends_with_the_nats(trained):
    text = write(trained, held_out=True, temperature=0, share=0.25)
    parts = text.split("--- ")
    original, masked, restored = (part.split("\n", 1)[1].removesuffix("\n") for part in parts[1:4])
    assert len(original) == len(masked) == len(restored)
    hidden = [i for i, sign in enumerate(masked) if sign in "\u2591#"]
    assert len(hidden) == 5 * 4  # a quarter of each of five windows of 16
    assert all(original[i] == masked[i] == restored[i] for i in range(len(original)) if i not in hidden)
    n_right = sum(original[i] == restored[i] for i in hidden)
    assert f"{n_right} of 20 masked tokens restored exactly" in text
    last = text.splitlines()[-1]
    assert last.startswith("unigram entropy ")
    assert all(f" at {level} %" in last for level in (15, 50, 85))


def test_a_kept_text_never_takes_the_place_of_another(trained):
    sample = sample_run(trained, REQUEST)
    assert sample.step == 40
    first, second, third = (keep_sample(trained, sample) for _ in range(3))
    assert [p.name for p in (first, third)] == ["step-00000040-001.txt", "step-00000040-003.txt"]
    assert first.parent == trained / "samples"
    first.unlink()
    keep_sample(trained, Sample("another\n", 40))
    assert second.read_text(encoding="utf-8") == third.read_text(encoding="utf-8") == sample.text + "\n"


def test_held_out_refuses_a_folder_without_metrics_before_it_fills_and_needs_no_evaluation(
    trained, tmp_path, monkeypatch
):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / FILE).write_text('{"kind": "train", "step": 0}\n')
    assert write(run, held_out=True).splitlines()[-1].endswith("masked tokens restored exactly")
    (run / FILE).unlink()
    monkeypatch.setattr(Writer, "fill", lambda *_: pytest.fail("minutes of work for nothing"))
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        write(run, held_out=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "red Qz"}, "characters outside the vocabulary: 'Q' 'z'"),
        (
            {"prompt": "red green red green"},
            "fewer tokens than the text's 16, got 19; give a greater length",
        ),
        ({"prompt": "red green red gr"}, "fewer tokens than the text's 16, got 16; give a greater length"),
        ({"length": 170, "steps": 20}, "steps must be at least 22, one for each block of the text, got 20"),
        ({"block_length": 17}, "block_length must be at least 0 and at most block_size 16, got 17"),
        ({"infill": "red"}, "at least four underscores"),
        ({"checkpoint": "3"}, "no checkpoint '3'; steps there: 0, 40"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_what_does_not_fit_is_named(trained, changes, message):
    with pytest.raises(UserError, match=message):
        write(trained, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"num_samples": 0}, "num_samples must be at least 1 .*, got 0"),
        ({"steps": 0}, "steps must be at least 1 .*, got 0"),
        ({"length": 0}, "length must be at least 1 .*, got 0"),
        ({"policy": "magic"}, "policy must be one of fill, confidence"),
        ({"policy": "fill", "suspect": 0.3}, "policy fill does not take suspect"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"held_out": True, "num_samples": 3}, "num_samples and held_out exclude each other"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        SampleRequest(**changes)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_gpt2_run_continues_a_prompt_beyond_block_size_and_refuses_gaps(tiny, position):
    config = tiny(mode="gpt2", max_iters=2, position=position)
    train(config)
    text = write(Path(config.out_dir), steps=None, prompt="red")
    assert text.startswith("red")
    assert len(text) == 16
    longer = write(Path(config.out_dir), steps=None, prompt="red", length=40)
    assert longer.startswith(text)
    assert len(longer) == 40
    assert len(write(Path(config.out_dir), steps=None, prompt="red green red green", length=21)) == 21
    with pytest.raises(UserError, match="fewer tokens than the text's 16, got 19; give a greater length"):
        write(Path(config.out_dir), steps=None, prompt="red green red green")
    with pytest.raises(UserError, match="gpt2 mode, which cannot fill gaps"):
        write(Path(config.out_dir), steps=None, held_out=True)


def test_sampling_sees_the_logits_that_the_loss_does(tiny):
    """With the softcap, and without [MASK]: at temperature 0 as well, and in the probabilities drawn from."""
    config = tiny(recipe="mdlm", softcap=2.0, max_iters=1)
    bent = lambda logits: lambda x: bend_rows(fixed(logits)(x)[0], MASK_ID, config)[None]  # noqa: E731
    x = torch.full((1, 1), MASK_ID)
    logits = [[1.0, 3.0, 2.9, -1.0, 99.0]]
    state, scores = settled(fixed(logits), x, MASK_ID, "fill", 65, Choice(temperature=0))
    assert state.x.tolist() == [[1]]
    assert scores.passes == 65, "[MASK], the most probable, was answered in all passes but the last"
    state, scores = settled(bent(logits), x, MASK_ID, "fill", 65, Choice(temperature=0))
    assert state.x.tolist() == [[1]]
    assert scores.passes == 1
    capped = 2.0 * torch.tanh(torch.tensor([1.0, 3.0, 2.9, -1.0]) / 2.0)
    expected = torch.cat(((capped / 0.5).softmax(0), torch.zeros(1)))
    torch.testing.assert_close(
        choosing.probabilities(bent(logits)(x)[0], Choice(temperature=0.5))[0], expected
    )
    # Where the cap makes them alike, the order of filling by confidence changes too.
    two = [[60.0, 0.0, 0.0, 0.0, 0.0], [5.0, -9.0, -9.0, -9.0, 0.0]]
    orders = []
    for logits_of in (fixed(two), bent(two)):
        seen = []
        watched = lambda x, f=logits_of, seen=seen: (seen.append(x.clone()), f(x))[1]  # noqa: E731
        fill(watched, torch.full((1, 2), MASK_ID), steps=2, temperature=0, policy="confidence")
        orders.append((seen[1] != MASK_ID).int().tolist())
    assert orders == [[[1, 0]], [[0, 1]]]


def test_a_model_without_terms_is_asked_as_it_is(tiny):
    model = fixed(one_hot(1))
    assert bent_logits(model, MASK_ID, tiny(z_loss=1e-4, label_smoothing=0.1, recipe="llada")) is model
    for changes in ({"softcap": 5.0}, {"recipe": "mdlm"}, {"recipe": "llada", "forbid_mask": True}):
        assert bent_logits(model, MASK_ID, tiny(**changes)) is not model


def calls_of(monkeypatch):
    """The ids of each call of a model from now on."""
    calls, real = [], Transformer.forward
    monkeypatch.setattr(
        Transformer, "forward", lambda self, x, **how: (calls.append(x.clone()), real(self, x, **how))[1]
    )
    return calls


def test_a_run_that_never_answers_mask_fills_its_steps_share_in_each_pass(tiny, monkeypatch):
    config = tiny(recipe="mdlm", softcap=3.0, max_iters=2)
    train(config)
    calls = calls_of(monkeypatch)
    for changes, n_masked in (
        ({}, [16, 12, 9, 6, 3]),
        ({"held_out": True, "share": 1.0}, [80, 60, 45, 30, 15]),
    ):
        write(Path(config.out_dir), **changes)
        assert [int((x == x.max()).sum()) for x in calls] == n_masked
        calls.clear()
    with pytest.raises(UserError, match="policy remask needs a model .* recipe mdlm does not"):
        write(Path(config.out_dir), policy="remask")
    writer = Writer(
        find_checkpoint(Path(config.out_dir), "best").make_model(torch.device("cpu")), None, config
    )
    scores = ModelScores(writer.module, config, writer.module.head.weight.shape[0] - 1)
    x = torch.zeros(1, 4, dtype=torch.int64)
    logits = scores(x, x == 0)
    assert logits[..., -1].eq(-torch.inf).all()
    assert logits[..., :-1].abs().max() < 3.0
    torch.testing.assert_close(logits[2:3], scores(x, torch.tensor([[False, False, True, False]])))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_are_the_calls_of_the_model_for_every_policy(trained, monkeypatch, policy, steps):
    calls = calls_of(monkeypatch)
    text = write(trained, policy=policy, steps=steps, prompt="red ", num_samples=3)
    assert "_" not in text
    if policy in ("fill", "ancestral", "remask", "remask_untrained"):  # may have written all before
        assert 1 <= len(calls) <= steps
    else:
        assert len(calls) == steps
    calls.clear()
    write(trained, policy=policy, steps=14, length=50)
    assert len(calls) <= 14
    assert policy in ("fill", "ancestral") or len(calls) == 14


@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_is_the_same_alone_and_among_others_of_any_length(trained, policy):
    for length in (12, 40):
        options = {"policy": policy, "steps": 8, "length": length, "prompt": "red ", "temperature": 1.0}
        many = write(trained, num_samples=4, **options)
        assert many.startswith("--- 1\n" + write(trained, **options) + "\n--- 2\n")


def test_a_text_of_any_length_keeps_its_prompt_and_the_text_around_its_gaps(trained):
    prompt = "red green blue white black grey "
    text = write(trained, prompt=prompt, length=100, steps=20)
    assert len(text) == 100
    assert text.startswith(prompt)
    template = "red ____een " * 5 + "green"
    text = write(trained, infill=template, steps=20)
    assert len(text) == len(template)
    assert all(t in ("_", c) for t, c in zip(template, text, strict=True))


def test_a_model_whose_numbers_are_not_finite_is_named(trained):
    checkpoint = find_checkpoint(trained, "best")
    module = checkpoint.make_model(torch.device("cpu"))
    with torch.no_grad():
        module.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="the model gives NaN or infinity: its checkpoint is broken"):
        write_texts(Writer(module, checkpoint.vocabulary, checkpoint.config), REQUEST)


def test_a_gpt2_run_has_no_use_for_a_policy_or_steps(tiny):
    config = tiny(mode="gpt2", max_iters=1)
    train(config)
    for name, value in {"policy": "fill", "steps": 3, "block_length": 2}.items():
        with pytest.raises(UserError, match=f"a pass a token, and takes no {name}"):
            write(Path(config.out_dir), **{"steps": None, name: value})


def test_a_temperature_near_zero_is_greedy_and_does_not_overflow():
    filled = fill(fixed([[0.0, 1.0, 2.0, 3.0, -9.0]]), torch.full((50, 1), MASK_ID), temperature=1e-40)
    assert (filled == 3).all()


@pytest.mark.parametrize("given", [{"infill": "red ____"}, {"held_out": True}])
def test_a_length_beside_a_text_that_has_its_own_is_refused(trained, given):
    with pytest.raises(UserError, match=f"length and {next(iter(given))} exclude each other"):
        write(trained, length=20, **given)


def test_words_that_are_no_characters_are_shown_and_kept_as_escapes(tiny, tmp_path, capsys):
    import numpy as np

    folder = tmp_path / "halves"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (np.arange(200, dtype=np.uint16) % 2).tofile(folder / name)
    (folder / "meta.json").write_text('{"kind": "char", "vocab_size": 2, "itos": ["\\ud800", "\\udc80"]}')
    config = tiny(data=str(folder), max_iters=1)
    train(config)
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["sample", config.out_dir, "--device", "cpu", "--steps", "2", "--html", str(page)]) == 0
    (kept,) = Path(config.out_dir, "samples").iterdir()
    text = kept.read_text(encoding="utf-8")
    assert len(text) == 16 * len("\\ud800") + 1
    assert set(text.split("\\")) <= {"", "ud800", "udc80", "ud800\n", "udc80\n"}
    assert page.read_text(encoding="utf-8").endswith("</html>\n")


@pytest.mark.parametrize("mode", ["diffusion", "gpt2"])
def test_a_run_on_ids_without_text_can_still_write(tiny, tmp_path, mode):
    import numpy as np

    folder = tmp_path / "ids"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (np.arange(200, dtype=np.uint16) % 9).tofile(folder / name)
    (folder / "meta.json").write_text('{"vocab_size": 9}')
    config = tiny(data=str(folder), mode=mode, max_iters=1)
    train(config)
    assert write(Path(config.out_dir), steps=None).count("<") == 16
    with pytest.raises(UserError, match="text cannot be encoded"):
        write(Path(config.out_dir), prompt="a")


def test_held_out_works_on_single_tokens(tiny):
    config = tiny(block_size=1, max_iters=1)
    train(config)
    assert "masked tokens restored exactly" in write(Path(config.out_dir), held_out=True)
