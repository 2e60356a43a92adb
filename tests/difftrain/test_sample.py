import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from difftrain.data.vocabulary import Characters
from difftrain.errors import UserError
from difftrain.loss import bent_logits
from difftrain.reporting.log import FILE
from difftrain.sampling import texts as texts_module
from difftrain.sampling.fill import continue_causal, fill
from difftrain.sampling.texts import Sample, SampleRequest, encode_template, keep_sample, sample_run
from difftrain.training.loop import train

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


def test_fill_replaces_masks_and_nothing_else():
    x = torch.tensor([[MASK_ID, 1, MASK_ID, 3]])
    filled = fill(fixed(one_hot(0, 0, 2, 0)), x, MASK_ID, temperature=0)
    assert filled.tolist() == [[0, 1, 2, 3]]
    assert x.tolist() == [[MASK_ID, 1, MASK_ID, 3]]


def test_a_sampled_mask_stays_until_the_last_pass_which_forbids_it():
    model = fixed([[0.0, 1.0, 2.0, 0.0, 9.0], [5.0, 0.0, 0.0, 0.0, 1.0]])
    x = torch.full((1, 2), MASK_ID)
    filled = fill(model, x, MASK_ID, max_steps=3, temperature=0)
    assert filled.tolist() == [[2, 0]]
    assert model.passes == 4


def test_fill_stops_when_nothing_is_masked():
    model = fixed(one_hot(0, 1))
    fill(model, torch.full((1, 2), MASK_ID), MASK_ID, max_steps=50, temperature=0)
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

    filled = fill(
        model, torch.full((1, 4), MASK_ID), MASK_ID, max_steps=2, temperature=0, by_confidence=True
    )
    assert filled.tolist() == [[1, 1, 1, 1]]
    assert [s[0].tolist() for s in seen] == [[4, 4, 4, 4], [4, 1, 1, 4]]


def test_temperature_and_top_k_shape_the_distribution():
    logits = [[0.0, 1.0, 2.0, 3.0, -9.0]]
    x = torch.full((4000, 1), MASK_ID)
    generator = torch.Generator().manual_seed(0)
    draws = {}
    for name, options in {"plain": {}, "cold": {"temperature": 0.5}, "top": {"top_k": 2}}.items():
        filled = fill(fixed(logits), x, MASK_ID, generator=generator, **options)
        draws[name] = torch.bincount(filled.flatten(), minlength=5)[:4] / 4000
    scores = torch.arange(4.0)
    torch.testing.assert_close(draws["plain"], scores.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(draws["cold"], (2 * scores).softmax(0), atol=0.03, rtol=0)
    assert draws["top"][:2].sum() == 0
    torch.testing.assert_close(draws["top"][2:], torch.tensor([2.0, 3.0]).softmax(0), atol=0.03, rtol=0)


def test_causal_sampling_appends_and_never_writes_mask():
    def successor(x):
        logits = torch.zeros(*x.shape, 5)
        logits.scatter_(-1, ((x + 1) % 4)[..., None], 9.0)
        logits[..., MASK_ID] = 99.0
        return logits

    out = continue_causal(successor, torch.tensor([[2]]), 5, MASK_ID, block_size=8, temperature=0)
    assert out.tolist() == [[2, 3, 0, 1, 2]]


def test_causal_sampling_beyond_block_size_sees_the_last_block_size_tokens():
    seen = []

    def model(x):
        seen.append(x[0].tolist())
        logits = torch.zeros(*x.shape, 5)
        logits[:, -1, len(seen) % 4] = 9.0
        return logits

    out = continue_causal(model, torch.tensor([[3, 3]]), 7, MASK_ID, block_size=3, temperature=0)
    assert out.tolist() == [[3, 3, 1, 2, 3, 0, 1]]
    assert seen == [[3, 3], [3, 3, 1], [3, 1, 2], [1, 2, 3], [2, 3, 0]]


def test_gaps_are_runs_of_four_or_more_underscores():
    words = Characters(tuple("ab_c"))
    assert encode_template("a____b", words) == [0, 4, 4, 4, 4, 1]
    assert encode_template("__a_____", words) == [2, 2, 0, 4, 4, 4, 4, 4]
    with pytest.raises(UserError, match="at least four underscores"):
        encode_template("a___b", words)
    with pytest.raises(UserError, match="outside the vocabulary: 'x'"):
        encode_template("x____", words)


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


REQUEST = SampleRequest(device="cpu", max_steps=4)


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
    monkeypatch.setattr(texts_module, "fill", lambda *_, **__: pytest.fail("minutes of work for nothing"))
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        write(run, held_out=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "red Qz"}, "characters outside the vocabulary: 'Q' 'z'"),
        ({"prompt": "red green red green"}, "fewer tokens than the text's 16, got 19"),
        ({"length": 17}, "length must be at most block_size 16, got 17"),
        ({"infill": "red"}, "at least four underscores"),
        ({"infill": "____" * 5}, "at most block_size 16 tokens, got 20"),
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
        ({"temperature": -1.0}, "temperature must be at least 0 .*, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 .*, got nan"),
        ({"num_samples": 0}, "num_samples must be at least 1 .*, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        SampleRequest(**changes)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_gpt2_run_continues_a_prompt_beyond_block_size_and_refuses_gaps(tiny, position):
    config = tiny(mode="gpt2", max_iters=2, position=position)
    train(config)
    text = write(Path(config.out_dir), prompt="red")
    assert text.startswith("red")
    assert len(text) == 16
    longer = write(Path(config.out_dir), prompt="red", length=40)
    assert longer.startswith(text)
    assert len(longer) == 40
    assert len(write(Path(config.out_dir), prompt="red green red green", length=21)) == 21
    with pytest.raises(UserError, match="fewer tokens than the text's 16, got 19; give a greater length"):
        write(Path(config.out_dir), prompt="red green red green")
    with pytest.raises(UserError, match="gpt2 mode, which cannot fill gaps"):
        write(Path(config.out_dir), held_out=True)


def test_sampling_sees_the_logits_that_the_loss_does(tiny, monkeypatch):
    """With the softcap, and without [MASK]: at temperature 0 as well, and in the probabilities drawn from."""
    drawn, real = [], torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *a, **o: (drawn.append(p.clone()), real(p, *a, **o))[1]
    )
    config = tiny(recipe="mdlm", softcap=2.0, max_iters=1)
    model = fixed([[1.0, 3.0, 2.9, -1.0, 99.0]])
    logits_of = bent_logits(model, MASK_ID, config)
    x = torch.full((1, 1), MASK_ID)
    assert fill(model, x, MASK_ID, temperature=0).tolist() == [[1]]
    assert model.passes == 65, "[MASK], the most probable, was answered in all passes but the last"
    model.passes = 0
    assert fill(logits_of, x, MASK_ID, temperature=0).tolist() == [[1]]
    assert model.passes == 1
    fill(logits_of, x, MASK_ID, temperature=0.5)
    capped = 2.0 * torch.tanh(torch.tensor([1.0, 3.0, 2.9, -1.0]) / 2.0)
    expected = torch.cat(((capped / 0.5).softmax(0), torch.zeros(1)))
    torch.testing.assert_close(drawn[-1], expected[None])
    # Where the cap makes them alike, the order of filling by confidence changes too.
    two = [[60.0, 0.0, 0.0, 0.0, 0.0], [5.0, -9.0, -9.0, -9.0, 0.0]]
    orders = []
    for logits in (fixed(two), bent_logits(fixed(two), MASK_ID, config)):
        seen = []
        watched = lambda x, f=logits, seen=seen: (seen.append(x.clone()), f(x))[1]  # noqa: E731
        fill(watched, torch.full((1, 2), MASK_ID), MASK_ID, max_steps=2, temperature=0, by_confidence=True)
        orders.append((seen[1] != MASK_ID).int().tolist())
    assert orders == [[[1, 0]], [[0, 1]]]


def test_a_model_without_terms_is_asked_as_it_is(tiny):
    model = fixed(one_hot(1))
    assert bent_logits(model, MASK_ID, tiny(z_loss=1e-4, label_smoothing=0.1, recipe="llada")) is model
    for changes in ({"softcap": 5.0}, {"recipe": "mdlm"}, {"recipe": "llada", "forbid_mask": True}):
        assert bent_logits(model, MASK_ID, tiny(**changes)) is not model


def test_a_run_that_never_answers_mask_fills_its_steps_share_in_each_pass(tiny, monkeypatch):
    config = tiny(recipe="mdlm", softcap=3.0, max_iters=2)
    train(config)
    calls, real = [], texts_module.fill

    def spy(logits_of, x, mask_id, **options):
        calls.append((logits_of(x), options))
        return real(logits_of, x, mask_id, **options)

    monkeypatch.setattr(texts_module, "fill", spy)
    for changes in ({}, {"held_out": True}):
        write(Path(config.out_dir), **changes)
        logits, options = calls.pop()
        assert options["by_confidence"]
        assert logits[..., -1].eq(-torch.inf).all()
        assert logits[..., :-1].abs().max() < 3.0


def test_a_temperature_near_zero_is_greedy_and_does_not_overflow():
    filled = fill(
        fixed([[0.0, 1.0, 2.0, 3.0, -9.0]]), torch.full((50, 1), MASK_ID), MASK_ID, temperature=1e-40
    )
    assert (filled == 3).all()


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
    assert write(Path(config.out_dir)).count("<") == 16
    with pytest.raises(UserError, match="text cannot be encoded"):
        write(Path(config.out_dir), prompt="a")


def test_held_out_works_on_single_tokens(tiny):
    config = tiny(block_size=1, max_iters=1)
    train(config)
    assert "masked tokens restored exactly" in write(Path(config.out_dir), held_out=True)
