"""The trainer computes the same whatever torch's default dtype and device are, and in inference mode."""

from pathlib import Path

import pytest
import torch

from defaults import UNDER_EACH_DEFAULT
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.data import corrupt, mask_share, open_corpus, sample_indices
from difftrain.evaluation import evaluate, make_validation_set
from difftrain.model import Transformer
from difftrain.reporting.log import read_metrics
from difftrain.runtime import Runtime
from difftrain.sampling.choosing import Choice
from difftrain.schedule import PenaltyTensors
from difftrain.training.loop import train
from specified_fill import settled

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Runtime(torch.device("cpu"), torch.float32, rank=0, world_size=1)
MASK_ID, V = 4, 5


@UNDER_EACH_DEFAULT
def test_a_run_and_its_resume_are_the_same_under_any_defaults(changed, tiny, tmp_path):
    records, weights = [], []
    for name in ("plain", "changed"):
        config = tiny(out_dir=str(tmp_path / name), max_iters=4, eval_interval=2, dropout=0.1)
        if name == "plain":
            train(config)
        else:
            with changed():
                train(tiny(out_dir=str(tmp_path / name), max_iters=2, eval_interval=2, dropout=0.1))
                train(config, resume=True)
        losses = ("step", "loss", "loss_final", "nll", "cases", "masked_nll", "validation_id", "grad_norm")
        records.append([{k: r[k] for k in losses if k in r} for r in read_metrics(Path(config.out_dir))])
        model = find_checkpoint(Path(config.out_dir), "latest").make_model(torch.device("cpu"))
        weights.append(dict(model.named_parameters()))
    assert records[0] == records[1]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def pieces(config, corpus):
    """What a step is made of, each of it a pure function."""
    torch.manual_seed(3)
    model = Transformer(config, corpus.vocabulary.vocab_size)
    samples = sample_indices(1, 0, 0, 1, config)
    tokens = corpus.windows("train", samples, seed=1, length=config.block_size)
    keys = {"seed": 1, "split": "train", "vocab_size": corpus.vocabulary.vocab_size}
    x, y = corrupt(tokens, samples, max_corruption=0.8, **keys)
    validation_set = make_validation_set(corpus, config)
    tables = evaluate(model, validation_set, corpus.vocabulary.mask_id, HERE)
    pk, pm = PenaltyTensors("cpu").update(3, config)
    tensors = [*model.parameters(), model(x), x, y, *mask_share(tokens, samples, share=0.3, **keys)]
    return [t.detach() for t in (*tensors, pk, pm)], tables, validation_set.id


@pytest.mark.parametrize("position", ["rotary", "learned"])
@UNDER_EACH_DEFAULT
def test_the_pieces_of_a_step_are_the_same_under_any_defaults(changed, position, tiny):
    config = tiny(position=position)
    corpus = open_corpus(config.data)
    expected = pieces(config, corpus)
    with changed():
        found = pieces(config, corpus)
    assert found[1:] == expected[1:]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)


def test_the_pieces_of_a_step_are_the_same_in_inference_mode(tiny):
    config = tiny()
    corpus = open_corpus(config.data)
    expected = pieces(config, corpus)
    with torch.inference_mode():
        found = pieces(config, corpus)
    assert found[1:] == expected[1:]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], expected[0], strict=True))


def test_penalty_tensors_made_in_inference_mode_follow_the_steps_of_training(tiny):
    config = tiny(masking_warmup_iters=4, penalty_keep_mask=0.5, penalty_mask_correct=1.0)
    with torch.inference_mode():
        penalties = PenaltyTensors("cpu")
    assert [p.item() for p in penalties.update(2, config)] == [0.75, 0.5]


@UNDER_EACH_DEFAULT
def test_a_sampler_fills_its_share_of_each_step_under_any_defaults(changed):
    def model(x):  # the word tells the step: 0 in the first, 1 in the second
        word = 0 if (x == MASK_ID).all() else 1
        return torch.nn.functional.one_hot(torch.full_like(x, word), V).float()

    x = torch.full((1, 257), MASK_ID)
    with changed():
        filled = settled(model, x, MASK_ID, "confidence", 2, Choice(temperature=0))[0].x
    assert torch.bincount(filled[0]).tolist() == [129, 128]  # 128.5 is no number of bf16
