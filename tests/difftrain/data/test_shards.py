"""Shards are read as one array, without a pass over them at the start, and what is wrong with them is named."""

import json
import os

import numpy as np
import pytest
import torch

from corpora import nanogpt_folder
from difftrain.cli import main
from difftrain.data import Corpus, ShardRequest, contents, prepare_shards, read_folder
from difftrain.data.shards import COUNTS, INDEX, Shards
from difftrain.errors import UserError
from difftrain.training.loop import train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six shards of a text, of uneven sizes."""
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    lines = ["".join("abcde \n"[i] for i in rng.integers(7, size=60)) for _ in range(6000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    request = ShardRequest(shard_bytes=1 << 17)
    return prepare_shards([str(tmp_path / "a.jsonl")], tmp_path / "shards", request)


def first_shard(folder):
    return folder / json.loads((folder / INDEX).read_text())["splits"]["train"]["shards"][0]["file"]


def test_shards_are_one_array():
    arrays = [
        np.arange(start, stop, dtype=np.uint16) for start, stop in ((0, 5), (5, 6), (6, 20), (20, 33))
    ]
    shards, whole = Shards(arrays), np.arange(33, dtype=np.uint16)
    assert len(shards) == 33
    for start in range(-2, 36):
        for stop in (*range(-1, 36), None):
            found = shards[start:stop]
            assert found.dtype == np.uint16
            np.testing.assert_array_equal(found, whole[start:stop])
    places = np.random.default_rng(0).integers(33, size=(7, 9))
    np.testing.assert_array_equal(shards[places], whole[places])
    assert shards[np.empty((0, 3), np.int64)].shape == (0, 3)
    for bad in (slice(0, 9, 2), np.array([33]), np.array([-1])):
        with pytest.raises(IndexError):
            shards[bad]


def test_windows_are_those_of_one_file_with_the_same_tokens(folder):
    corpus = read_folder(folder)
    assert len(corpus.train._arrays) > 2
    one = Corpus(corpus.train[:], corpus.val[:], corpus.vocabulary, folder)
    samples = torch.arange(400, dtype=torch.int64, device="cpu")
    for split in ("train", "val"):
        found, expected = (c.windows(split, samples, seed=3, length=900) for c in (corpus, one))
        assert torch.equal(found, expected)
    assert torch.equal(corpus.unigram_counts, one.unigram_counts)
    assert corpus.unigram_entropy() == one.unigram_entropy()


def test_no_shard_is_read_at_the_start_until_it_is_touched(folder, monkeypatch):
    reads, real = [], contents._read
    monkeypatch.setattr(
        contents, "_read", lambda path, dtype: (reads.append(path.name), real(path, dtype))[1]
    )
    monkeypatch.setattr(np, "bincount", None)  # which counts all of a split
    record = read_folder(folder).record
    read_folder(folder).unigram_entropy()
    assert reads == []
    os.utime(first_shard(folder))
    assert read_folder(folder).record == record
    assert reads == [first_shard(folder).name]


def test_the_digests_of_an_index_are_those_of_its_files(folder):
    told = {}
    for split in json.loads((folder / INDEX).read_text())["splits"].values():
        told |= {shard["file"]: (shard["sha256"], shard["largest"]) for shard in split["shards"]}
    found = [contents._read(folder / name, "uint16") for name in told]
    assert [(content["sha256"], content["largest"]) for content in found] == list(told.values())


def harmed_index(**changes):
    def harm(folder):
        index = json.loads((folder / INDEX).read_text())
        index["splits"]["train"]["shards"][0] |= changes
        (folder / INDEX).write_text(json.dumps(index))

    return harm


def other_ids(folder):
    ids = np.fromfile(first_shard(folder), np.uint16)
    np.roll(ids, 1).tofile(first_shard(folder))


def cut_off(folder):
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 2)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_off, r"train-00000\.bin must have \d+ bytes as its index says, and has \d+"),
        (lambda folder: first_shard(folder).unlink(), r"train-00000\.bin must have \d+ bytes .* and has 0"),
        (other_ids, r"train-00000\.bin is not what its index says: its digest differs"),
        (harmed_index(largest=7), r"train-00000\.bin holds the id 7, but its vocabulary has 7 words"),
        (harmed_index(sha256="0"), r"train-00000\.bin is not what its index says"),
        (harmed_index(tokens="x"), r"shards\.json is damaged: ValueError"),
        (lambda folder: (folder / INDEX).write_text("{"), r"shards\.json is damaged"),
        (lambda folder: (folder / INDEX).write_text("[]"), r"shards\.json is damaged: TypeError"),
        (
            lambda folder: (folder / INDEX).write_text('{"format": 2}'),
            r"has format 2, and this version reads 1",
        ),
        (lambda folder: (folder / COUNTS).write_bytes(b"x"), r"counts\.npy is missing or damaged"),
        (
            lambda folder: np.save(folder / COUNTS, np.zeros((2, 7), np.int64)),
            r"counts\.npy is not what its index",
        ),
    ],
)
def test_a_folder_that_is_not_as_its_index_says_is_refused(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError, match=message):
        read_folder(folder)


def test_a_run_trains_on_shards_and_knows_them_again(folder, tiny, tmp_path, capsys):
    config = tiny(data=str(folder), max_iters=2)
    train(config)
    again = ["train", "--resume", "--out_dir", config.out_dir, "--max_iters", "3"]
    prepare_shards([str(tmp_path / "a.jsonl")], tmp_path / "other", ShardRequest(seed=1))
    assert main([*again, "--data", str(tmp_path / "other")]) == 2
    assert "train.bin" in capsys.readouterr().err
    folder.rename(tmp_path / "moved")
    assert main([*again, "--data", str(tmp_path / "moved")]) == 0, capsys.readouterr().err
    latest = ["--checkpoint=latest", "--device=cpu"]  # the best one is of before the move
    assert main(["evaluate", config.out_dir, "--windows=4", "--draws=1", *latest]) == 0
    assert main(["sample", config.out_dir, "--held_out", "--steps=2", *latest]) == 0


def test_an_index_of_something_else_does_not_make_shards_of_a_folder(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    assert read_folder(folder).train.tolist() == [0, 1, 2, 1, 0, 2]
