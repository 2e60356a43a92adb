"""Every token of a corpus is read once, and what was found is remembered as long as its files stay."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from corpora import nanogpt_folder, rewrite
from difftrain.data import contents, open_corpus, read_folder
from difftrain.data.contents import BLOCK, MEMO, contents_of
from difftrain.errors import UserError

YEAR = 365 * 86400 * 10**9  # ns
FILES = ("train.bin", "val.bin")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read whole, in a world where it is a year later."""
    names, real, now = [], contents._read, contents.time.time_ns
    monkeypatch.setattr(
        contents, "_read", lambda path, dtype: (names.append(path.name), real(path, dtype))[1]
    )
    monkeypatch.setattr(contents.time, "time_ns", lambda: now() + YEAR)
    return names


# Ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize(
    "where",
    [0, BLOCK // 2 - 1, (1 << 24) + 5, -1],
    ids=["first", "last of a block", "beyond the 16 millionth", "last"],
)
def test_one_bad_id_anywhere_is_found_and_its_place_said(tmp_path, name, dtype, where):
    folder = nanogpt_folder(tmp_path / "d", dtype=dtype, meta={"vocab_size": 3, "dtype": dtype})
    ids = np.zeros((1 << 24) + 9, dtype)
    ids[where] = 3
    ids.tofile(folder / name)
    position = where % len(ids)
    with pytest.raises(UserError) as caught:
        open_corpus(str(folder))
    assert str(caught.value) == (
        f"{folder / name} holds the id 3 at position {position}, but its vocabulary has 3 words"
    )


def test_files_are_read_in_blocks_of_bounded_memory(tmp_path):
    folder = nanogpt_folder(tmp_path / "d")
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(16 * BLOCK)
    tracemalloc.start()
    try:
        (train, _) = contents_of(folder, FILES, "uint16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert train.largest == 2
    assert peak < 4 * BLOCK


def test_digests_are_sha256_of_the_files_and_stand_in_the_record(tmp_path):
    folder = nanogpt_folder(tmp_path / "d", train=range(3000), meta={"vocab_size": 3000})
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert read_folder(folder).record == {"dtype": "uint16", **expected}


# Remembering ----------------------------------------------------------------------------------------


def test_a_file_is_read_whole_once(tmp_path, reads):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    first = read_folder(folder).record
    assert reads == [*FILES]
    for _ in range(3):
        assert read_folder(folder).record == first
    assert reads == [*FILES]


def test_a_vocabulary_that_shrinks_is_checked_against_what_is_remembered(tmp_path, reads):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    read_folder(folder)
    (folder / "meta.json").write_text('{"vocab_size": 2}')
    with pytest.raises(UserError, match="train.bin holds the id 2 at position 2, but its vocabulary has 2"):
        read_folder(folder)
    assert reads == [*FILES]


@pytest.mark.parametrize(
    ("ids", "keeps_mtime"),
    [([0, 0, 0, 0, 0, 9], False), ([0, 0, 0, 0, 0, 9], True), ([0, 0, 0, 0, 0, 9, 1], True)],
    ids=["of equal length", "of equal length and mtime", "of equal mtime"],
)
def test_a_changed_file_is_read_again(tmp_path, reads, ids, keeps_mtime):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    read_folder(folder)
    rewrite(folder / "train.bin", ids, keeps_mtime=keeps_mtime)
    with pytest.raises(UserError, match="holds the id 9 at position 5"):
        read_folder(folder)
    assert reads == [*FILES, "train.bin"]


def test_another_type_of_ids_is_another_content(tmp_path, reads):
    folder = nanogpt_folder(tmp_path / "d", train=[1, 2], val=[1, 2], meta={"vocab_size": 3})
    read_folder(folder)
    (folder / "meta.json").write_text('{"vocab_size": 3, "dtype": "uint32"}')
    with pytest.raises(UserError, match=f"holds the id {1 + (2 << 16)} at position 0"):
        read_folder(folder)


def test_a_file_changed_just_now_is_not_trusted_to_stay(tmp_path, reads, monkeypatch):
    """A second change within one tick of the file system's clock would leave its marks as they are."""
    folder = nanogpt_folder(tmp_path / "d")
    now = (folder / "val.bin").stat().st_ctime_ns
    for later, remembered in ((0, False), (contents.SETTLED, False), (contents.SETTLED + 1, True)):
        monkeypatch.setattr(contents.time, "time_ns", lambda later=later: now + later)
        contents_of(folder, ["val.bin"], "uint16")
        assert (folder / MEMO).exists() == remembered


def test_where_the_folder_cannot_be_written_the_cache_remembers(tmp_path, reads, cache):
    folder = nanogpt_folder(tmp_path / "d")
    (folder / MEMO).mkdir()  # in the way; permissions do not stop every user
    before = sorted(path.name for path in folder.iterdir())
    for _ in range(2):
        contents_of(folder, FILES, "uint16")
    assert reads == [*FILES]
    assert sorted(path.name for path in folder.iterdir()) == before
    contents_of(nanogpt_folder(tmp_path / "e"), FILES, "uint16")
    assert reads == [*FILES] * 2


@pytest.mark.parametrize("place", ["file/cache", "$NOWHERE/cache"])
def test_where_nothing_can_be_written_it_is_no_error(tmp_path, reads, monkeypatch, place):
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFTRAIN_CACHE", place if place[0] == "$" else str(tmp_path / place))
    folder = nanogpt_folder(tmp_path / "d")
    (folder / MEMO).mkdir()
    for _ in range(2):
        assert read_folder(folder).record["train.bin"]
    assert reads == [*FILES] * 2


@pytest.mark.parametrize(
    "harm",
    [
        lambda memo: b"\xff{",
        lambda memo: b"[" * 100_000,
        lambda memo: b"[1]",
        lambda memo: b"5",
        lambda memo: json.dumps(memo | {"train.bin": 5}).encode(),
        lambda memo: json.dumps(memo | {"train.bin": memo["train.bin"] | {"largest": "2"}}).encode(),
        lambda memo: json.dumps(memo | {"train.bin": memo["train.bin"] | {"largest": True}}).encode(),
        lambda memo: json.dumps(memo | {"train.bin": memo["train.bin"] | {"sha256": 7}}).encode(),
        lambda memo: json.dumps(memo | {"train.bin": {}}).encode(),
    ],
)
def test_a_harmed_memo_is_as_good_as_none(tmp_path, reads, harm):
    folder = nanogpt_folder(tmp_path / "d")
    expected = contents_of(folder, FILES, "uint16")
    (folder / MEMO).write_bytes(harm(json.loads((folder / MEMO).read_text())))
    assert contents_of(folder, FILES, "uint16") == expected
    assert "train.bin" in reads[2:]
    reads.clear()
    assert contents_of(folder, FILES, "uint16") == expected
    assert reads == []


def test_reading_a_large_file_is_said_once(tmp_path, reads, monkeypatch):
    folder = nanogpt_folder(tmp_path / "d", meta={"vocab_size": 3})
    monkeypatch.setattr(contents, "LARGE", 12)  # bytes, which six tokens have
    said = []
    for _ in range(2):
        open_corpus(str(folder), said.append)
    assert said == [f"reading {folder / 'train.bin'} once, to check its ids and to know it again"]
