import json
import pickle

import numpy as np
import pytest
import torch

from corpora import nanogpt_folder
from difftrain.config import Config
from difftrain.data import open_corpus, prepare, read_folder, sample_indices
from difftrain.data.opening import read_plain_pickle
from difftrain.errors import UserError

TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


# Preparing ----------------------------------------------------------------------------------------


def test_a_text_file_becomes_token_files_that_decode_to_it(text_file):
    corpus = open_corpus(str(text_file))
    decoded = "".join(corpus.vocabulary.decode(split.tolist()) for split in (corpus.train, corpus.val))
    assert decoded == TEXT
    assert len(corpus.val) == len(TEXT) // 10
    assert corpus.vocabulary.mask_id == len(set(TEXT))
    assert corpus.vocabulary.vocab_size == len(set(TEXT)) + 1


def test_preparing_again_reuses_the_cache_and_another_text_gets_its_own(text_file, cache):
    first = prepare(str(text_file))
    stamp = (first / "train.bin").stat().st_mtime_ns
    assert prepare(str(text_file)) == first
    assert (first / "train.bin").stat().st_mtime_ns == stamp
    text_file.write_text(TEXT + "more\n")
    assert prepare(str(text_file)) != first
    assert len(list(cache.iterdir())) == 2


def test_one_file_of_ten_is_held_out_of_a_folder(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for i in range(20):
        (folder / "sub" / f"{i:02}.txt").write_text(f"<{i:02}>" * 20)
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00\x81")
    corpus = open_corpus(str(folder))
    val = corpus.vocabulary.decode(corpus.val.tolist())
    assert {val[i : i + 4] for i in range(0, 80, 4)} == {"<09>"}
    assert "<19>" in val
    assert "<09>" not in corpus.vocabulary.decode(corpus.train.tolist())


def test_a_failed_preparation_leaves_nothing_behind(text_file, cache, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(str(text_file))
    assert list(cache.iterdir()) == []


def test_the_builtin_corpus_is_source_text_without_mask(monkeypatch, tmp_path):
    import sysconfig

    library = tmp_path / "lib"
    for name in ("a.py", "b.py", "test/t.py", "site-packages/s.py", "umlaut.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"x = {name!r}\n" * 9 + ("# \u00fc" if name == "umlaut.py" else ""))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    corpus = open_corpus("stdlib")
    text = corpus.vocabulary.decode(corpus.train.tolist() + corpus.val.tolist())
    assert "a.py" in text
    assert "b.py" in text
    assert "t.py" not in text
    assert "s.py" not in text
    assert "umlaut" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("short.txt", b"ab", "too short to train on: 2 characters"),
        ("latin.txt", b"caf\xe9" * 20, "latin.txt is not UTF-8 text"),
        ("same.txt", b"a" * 100, "at least 2 words, got 1"),
    ],
    ids=["empty", "short", "not UTF-8", "one character"],
)
def test_unusable_text_is_refused_and_nothing_is_cached(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_corpus(str(tmp_path / name))
    assert not cache.exists() or list(cache.iterdir()) == []


def test_missing_and_empty_places_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data must be stdlib, a text file or a folder, .*nowhere"):
        open_corpus(str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void holds neither train.bin nor text files"):
        open_corpus(str(tmp_path / "void"))


# nanoGPT's folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt_folder_with_json_meta(tmp_path, dtype):
    meta = {"vocab_size": 3, "itos": ["a", "b", "c"], "dtype": dtype}
    corpus = open_corpus(str(nanogpt_folder(tmp_path / "d", dtype=dtype, meta=meta)))
    assert corpus.vocabulary.decode(corpus.train.tolist()) == "abcbac"


def test_nanogpt_folder_with_its_meta_pickle(tmp_path):
    folder = nanogpt_folder(tmp_path / "d")
    meta = {"vocab_size": 3, "itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert read_folder(folder).vocabulary.encode("ab\n") == [1, 2, 0]


def test_folder_without_meta_holds_gpt2_ids(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", train=(50256, 1, 2))
    assert read_folder(folder).vocabulary.mask_id == 50257


class _Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_names_code_is_refused_unexecuted(tmp_path, capsys):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": _Hostile()}))
    with pytest.raises(UserError, match=r"refused.*builtins\.print"):
        read_plain_pickle(tmp_path / "meta.pkl")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": (0, 1, 3)}, "train.bin holds the id 3 at position 2, but its vocabulary has 3 words"),
        ({"train": (0, 5, 7)}, "train.bin holds the id 5 at position 1, but its vocabulary has 3 words"),
        ({"val": (9, 1, 2)}, "val.bin holds the id 9 at position 0, but its vocabulary has 3 words"),
        ({"val": ()}, "val.bin is missing or empty"),
        ({"meta": {"vocab_size": 1}}, "at least 2 words, got 1"),
        ({"meta": {"itos": ["ab", "c"]}}, "itos must list one character for each id"),
        ({"meta": {"kind": "weird"}}, "must give vocab_size"),
        ({"meta": [1]}, "must hold an object, got list"),
        ({"meta": {"vocab_size": 3, "dtype": "int8"}}, "dtype must be uint16 or uint32, got 'int8'"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path, changes, message):
    folder = nanogpt_folder(tmp_path / "d", **({"meta": {"vocab_size": 3}} | changes))
    with pytest.raises(UserError, match=message):
        open_corpus(str(folder))


def test_broken_json_and_odd_file_sizes_are_refused(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    (folder / "train.bin").write_bytes(b"\0\0\0")
    with pytest.raises(UserError, match="no file of uint16: its size is 3 bytes"):
        read_folder(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_folder(folder)


# Windows and samples ------------------------------------------------------------------------------


def test_a_window_is_a_piece_of_its_split_and_depends_on_its_index_alone(text_file):
    corpus = open_corpus(str(text_file))
    samples = torch.arange(50)
    windows = corpus.windows("train", samples, seed=7, length=16)
    text = corpus.vocabulary.decode(corpus.train.tolist())
    assert all(corpus.vocabulary.decode(w) in text for w in windows.tolist())
    alone = torch.cat([corpus.windows("train", s[None], seed=7, length=16) for s in samples])
    assert torch.equal(windows, alone)
    assert not torch.equal(windows, corpus.windows("train", samples, seed=8, length=16))
    assert not torch.equal(windows, corpus.windows("val", samples, seed=7, length=16))


def test_windows_reach_the_first_and_the_last_token(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", train=range(10), meta={"vocab_size": 10})
    windows = read_folder(folder).windows("train", torch.arange(200), seed=0, length=8)
    assert windows[:, 0].unique().tolist() == [0, 1, 2]
    whole = read_folder(folder).windows("train", torch.arange(3), seed=0, length=10)
    assert whole.tolist() == [list(range(10))] * 3


def test_starts_are_uniform_over_a_long_file(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", train=range(60000), meta={"vocab_size": 60000})
    starts = read_folder(folder).windows("train", torch.arange(6000), seed=0, length=1)[:, 0]
    share = torch.bincount(starts // 6000, minlength=10) / 6000
    assert (share - 0.1).abs().max() < 0.02
    assert len(starts.unique()) > 5500


def test_ten_files_are_enough_to_hold_one_out(tmp_path):
    (tmp_path / "t").mkdir()
    for i in range(10):
        (tmp_path / "t" / f"{i}.txt").write_text(str(i) * 30)
    corpus = open_corpus(str(tmp_path / "t"))
    assert corpus.vocabulary.decode(corpus.val.tolist()) == "9" * 30


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation", "micro_batches"),
    [
        (1, 12, 1, (1, 12)),
        (1, 4, 3, (3, 4)),
        (2, 2, 6, (3, 2)),
        (3, 4, 3, (1, 4)),
        (2, 12, 1, (1, 6)),  # fewer micro-batches than processes: smaller ones
        (4, 6, 2, (1, 3)),
        (2, 4, 3, (2, 3)),
    ],
)
def test_a_step_takes_the_same_samples_for_any_number_of_processes_and_micro_batches(
    world_size, batch_size, accumulation, micro_batches
):
    config = Config(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert config.micro_batches(world_size) == micro_batches
    samples = [
        sample_indices(5, micro_step, rank, world_size, config)
        for rank in range(world_size)
        for micro_step in range(micro_batches[0])
    ]
    assert {len(part) for part in samples} == {micro_batches[1]}
    assert torch.cat(samples).tolist() == list(range(60, 72))


def test_a_step_that_cannot_be_shared_out_evenly_is_refused():
    with pytest.raises(UserError, match=r"must be a multiple of 2 for 2 processes, got 3 \* 1"):
        Config(batch_size=3).micro_batches(2)


def test_too_long_windows_name_the_split(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    with pytest.raises(
        UserError, match="the val split .* has 3 tokens, and block_size asks for 4 at a time"
    ):
        read_folder(folder).check_length(4)
    read_folder(folder).check_length(3)


def test_unigram_entropy_of_known_frequencies(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", val=(0, 0, 1, 2), meta={"vocab_size": 4})
    assert read_folder(folder).unigram_entropy() == pytest.approx(1.5 * np.log(2))
