"""The collator corrupts as the trainer does, each example by its key alone, and pads."""

import pytest
import torch

from difftrain.config import Config
from difftrain.data.corruption import corrupt, mask_alone
from difftrain.errors import UserError
from difftrain.hf import DataCollatorForDiffusion

V, LENGTH = 50, 16


def examples(n=6, length=LENGTH, seed=0):
    ids = torch.randint(0, V - 1, (n, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row.tolist(), "index": 7 * i} for i, row in enumerate(ids)]


def uneven():
    return [
        example | {"input_ids": example["input_ids"][: 4 + 3 * i]} for i, example in enumerate(examples(5))
    ]


def collator(mask_id=V - 1, index="index", **options):
    return DataCollatorForDiffusion(mask_id, V, index=index, **options)


@pytest.mark.parametrize("epoch", [0, 3])
def test_x_and_y_are_those_of_the_trainers_corruption_for_this_index_and_epoch(epoch):
    collate = collator(config=Config(seed=5, guaranteed_correct_factor=0.2))
    collate.set_epoch(epoch)
    batch = collate(examples())
    samples = torch.tensor([epoch * 2**32 + 7 * i for i in range(6)])
    tokens = torch.tensor([example["input_ids"] for example in examples()])
    x, y = corrupt(tokens, samples, seed=5, split="train", vocab_size=V, max_corruption=0.8)
    assert torch.equal(batch["input_ids"], x)
    assert torch.equal(batch["labels"], y)
    assert batch["attention_mask"].all()
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert (x == V - 1).any()
    assert (y == V - 1).any()


def test_mask_may_have_any_id_and_is_never_a_wrong_word():
    mask_id = 3
    rows = [{"input_ids": [i if i != mask_id else V - 1 for i in e["input_ids"]]} for e in examples(200)]
    batch = collator(mask_id, index=None)(rows)
    x, y, tokens = batch["input_ids"], batch["labels"], torch.tensor([e["input_ids"] for e in rows])
    is_masked = x == mask_id
    is_wrong = ~is_masked & (x != tokens)
    assert is_masked.float().mean() > 0.3
    assert torch.equal(y, torch.where(is_wrong, mask_id, tokens))
    assert set(x[is_wrong].tolist()) == set(range(V)) - {mask_id}  # the last id among them


@pytest.mark.parametrize("index", ["index", None])
def test_an_example_is_corrupted_alike_whatever_batch_it_comes_in(index):
    collate, rows = collator(index=index), uneven()
    together = collate(rows)
    for b, row in enumerate(rows):
        alone, n = collate([row]), len(row["input_ids"])
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(together[name][b, :n], alone[name][0])
    turned = collate(rows[::-1])
    assert torch.equal(turned["input_ids"], together["input_ids"].flip(0))


def test_what_is_padded_does_not_count():
    batch = collator(pad_id=11)(uneven())
    is_padding = batch["attention_mask"] == 0
    assert is_padding.sum() == sum(LENGTH - n for n in (4, 7, 10, 13, 16))
    assert (batch["input_ids"][is_padding] == 11).all()
    assert (batch["labels"][is_padding] == -100).all()
    assert (batch["labels"][~is_padding] >= 0).all()


def test_prompts_and_what_examples_pad_stay_and_do_not_count():
    row = examples(1)[0]
    row["labels"] = [-100] * 6 + row["input_ids"][6:]
    row["attention_mask"] = [1] * 14 + [0] * 2
    row["input_ids"][14:] = [V - 1, -1]  # whatever stands there
    batch = collator()([row])
    x, y, tokens = batch["input_ids"][0], batch["labels"][0], torch.tensor(row["input_ids"])
    assert torch.equal(x[:6], tokens[:6])
    assert torch.equal(x[14:], tokens[14:])
    assert (y[:6] == -100).all()
    assert (y[14:] == -100).all()
    assert (y[6:14] >= 0).all()
    assert (x[6:14] != tokens[6:14]).any()
    assert batch["attention_mask"][0].tolist() == row["attention_mask"]


def test_the_key_without_an_index_is_the_ids_and_the_epoch():
    collate, rows = collator(index=None), examples(1) * 2 + examples(1, seed=1)
    first = collate(rows)
    assert torch.equal(first["input_ids"][0], first["input_ids"][1])
    collate.set_epoch(1)
    second = collate(rows)
    assert not torch.equal(first["input_ids"][0], second["input_ids"][0])
    collate.set_epoch(0)
    assert torch.equal(collate(rows)["input_ids"], first["input_ids"])


def test_evaluation_is_corrupted_otherwise_and_alike_in_every_epoch():
    training = collator()
    evaluation = training.for_evaluation()
    first = evaluation(examples())["input_ids"]
    assert not torch.equal(first, training(examples())["input_ids"])
    training.set_epoch(4)
    assert torch.equal(evaluation(examples())["input_ids"], first)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_live_on_see_the_epoch_and_change_nothing(workers):
    collate, rows = collator(), examples(8)

    def loader(n):
        return torch.utils.data.DataLoader(
            rows, batch_size=2, collate_fn=collate, num_workers=n, persistent_workers=n > 0
        )

    alone, many = loader(0), loader(workers)
    for epoch in (0, 1):
        collate.set_epoch(epoch)
        for ours, theirs in zip(many, alone, strict=True):
            assert torch.equal(ours["input_ids"], theirs["input_ids"])


@pytest.mark.parametrize("recipe", ["llada", "mdlm"])
def test_a_recipe_that_masks_alone_weighs_by_what_it_drew(recipe):
    batch = collator(config=Config(recipe=recipe, seed=5))(examples())
    samples = 7 * torch.arange(6)
    tokens = torch.tensor([example["input_ids"] for example in examples()])
    x, y, p_mask = mask_alone(tokens, samples, seed=5, split="train", vocab_size=V)
    assert torch.equal(batch["input_ids"], x)
    assert torch.equal(batch["labels"], y)
    torch.testing.assert_close(batch["token_weights"], torch.where(x == V - 1, 1 / p_mask, 0))
    assert (collator(config=Config(recipe=recipe))(uneven())["token_weights"][0, 4:] == 0).all()


def test_empty_examples_and_batches_are_empty():
    assert collator()([])["input_ids"].shape == (0, 0)
    batch = collator()([{"input_ids": [], "index": 0}, *examples(1)])
    assert batch["attention_mask"].sum(1).tolist() == [0, LENGTH]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": [1, V]}, rf"input_ids must be in \[0, {V}\) and not mask_id {V - 1}, got 1 to {V}"),
        ({"input_ids": [1, V - 1]}, "not mask_id"),
        ({"input_ids": [-1, 1]}, r"got -1 to 1"),
        ({"labels": [1, 2, 3]}, "labels must have one number for each of 16 ids, got 3"),
        ({"index": 2**32}, r"index must be in \[0, 2\^32\), got 4294967296"),
        ({"index": None}, "index must be"),
        ({"index": torch.tensor(2.5)}, "index must be"),
        (
            {"input_ids": [1.5, 2.0]},
            r"input_ids must be a row of whole numbers, got float64 of shape \(2,\)",
        ),
        (
            {"input_ids": [[1, 2]]},
            r"input_ids must be a row of whole numbers, got int64 of shape \(1, 2\)",
        ),
        ({"input_ids": "abc"}, "input_ids must be a row of whole numbers, got <U3 of shape"),
        (
            {"input_ids": [[1], [2, 3]]},
            "input_ids must be a row of whole numbers, got rows of several lengths",
        ),
        ({"labels": 1}, r"labels must be a row of whole numbers, got int64 of shape \(\)"),
        ({"labels": None}, "labels must be a row of whole numbers, got object of shape"),
    ],
)
def test_bad_examples_are_told_in_one_line(change, said):
    with pytest.raises(UserError, match=said) as caught:
        collator()([examples(1)[0] | change])
    assert "\n" not in str(caught.value)


def test_a_missing_number_is_told():
    with pytest.raises(UserError, match="an example must have input_ids and index, got input_ids"):
        collator()([{"input_ids": [1, 2]}])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_id": V}, rf"mask_id must be in \[0, {V}\), got {V}"),
        ({"mask_id": -1}, "mask_id must be at least 0"),
        ({"split": "test"}, "split must be train or val, got 'test'"),
        ({"config": Config(mode="gpt2")}, "mode must be diffusion in Hugging Face's Trainer, got gpt2"),
        ({"config": Config(replacement="unigram")}, "replacement must be uniform"),
        ({"config": Config(self_errors=0.5)}, "self_errors must be 0"),
        (
            {"config": Config(schedules='{mask_factor = {shape = "constant", value = 0.5}}')},
            "schedules must be of penalty_keep_mask and penalty_mask_correct, by steps",
        ),
    ],
)
def test_bad_options_are_told_in_one_line(options, said):
    with pytest.raises(UserError, match=said):
        collator(**options)
