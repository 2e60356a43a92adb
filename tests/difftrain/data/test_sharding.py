"""Texts become shards: the same bytes in any number of processes and after any kill, and nothing half-written."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from difftrain.appearing import HALF
from difftrain.cli import main
from difftrain.data import ShardRequest, blocks, parts, prepare_shards, read_folder, sharding
from difftrain.data.documents import is_held_out
from difftrain.data.shards import INDEX
from difftrain.errors import UserError
from waiting import PATIENCE

WORDS = ["the", "quick", "brown", "füx", "jumps", "over", "a", "lazy", "dög\n", "日本"]


@pytest.fixture
def _small(monkeypatch):
    """Small pieces of everything, in this process."""
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "CHUNK", 256)
    monkeypatch.setattr(sharding, "BLOCK", 64)
    monkeypatch.setattr(parts, "AT_ONCE", 100)


def text_of(n_words, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=n_words))


def rows_file(path, n=200):
    rows = [{"text": f"row {i} {text_of(i % 7, i)}", "id": i} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["text"] for row in rows]


def made(source, out, workers=1, **changes):
    return prepare_shards([str(source)], out, ShardRequest(**changes), workers=workers)


def content(folder):
    """All files of a folder but the memo, whose times differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".difftrain.json"}


def tokens_of(folder):
    corpus = read_folder(folder)
    return {name: getattr(corpus, name)[:] for name in ("train", "val")}


def shards_of(folder):
    index = json.loads((folder / INDEX).read_text())
    return [shard["file"] for split in index["splits"].values() for shard in split["shards"]]


# What is written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "bytes"])
@pytest.mark.usefixtures("_small")
def test_held_out_rows_are_drawn_one_by_one_and_all_text_is_there_once(tmp_path, tokenizer):
    texts = rows_file(tmp_path / "a.jsonl")
    folder = made(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer, shard_bytes=2000, seed=5)
    offsets = np.cumsum(
        [0, *(len(line) + 1 for line in (tmp_path / "a.jsonl").read_bytes().split(b"\n")[:-2])]
    )
    held_out = [is_held_out(f"a.jsonl:{offset}", 0.1, 5) for offset in offsets]
    assert 8 < sum(held_out) < 35
    corpus = read_folder(folder)
    for name, is_taken in (("train", False), ("val", True)):
        expected = "".join(
            f"{text}\n" for text, is_out in zip(texts, held_out, strict=True) if is_out == is_taken
        )
        assert corpus.vocabulary.decode(getattr(corpus, name)[:].tolist()) == expected
    assert len(shards_of(folder)) > 4


@pytest.mark.usefixtures("_small")
def test_blocks_of_a_text_are_held_out_and_the_rest_is_the_text(tmp_path):
    text = text_of(3000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = read_folder(made(tmp_path / "a.txt", tmp_path / "out", tokenizer="bytes", separator=""))
    train, val = (bytes(getattr(corpus, name)[:].astype(np.uint8)) for name in ("train", "val"))
    expected = {False: b"", True: b""}
    for offset, block in blocks.Blocks(sharding.find_sources([str(tmp_path / "a.txt")], [], "auto")[0][0]):
        expected[is_held_out(f"a.txt:{offset}", 0.1, 0)] += block
    assert (train, val) == (expected[False], expected[True])
    assert 0.03 < len(val) / len(text.encode()) < 0.2


def test_many_files_are_held_out_as_a_whole_and_few_by_block(tmp_path):
    (tmp_path / "t").mkdir()
    for i in range(sharding.MANY):
        (tmp_path / "t" / f"{i:03}.txt").write_text(f"<{i:03}>" * 3)
    request = json.loads((made(tmp_path / "t", tmp_path / "out") / INDEX).read_text())["request"]
    assert request["split"] == "document"
    corpus = read_folder(tmp_path / "out")
    val = corpus.vocabulary.decode(corpus.val[:].tolist()).splitlines()
    assert val == [f"<{i:03}>" * 3 for i in range(100) if is_held_out(f"{i:03}.txt", 0.1, 0)]
    (tmp_path / "t" / "000.txt").unlink()
    with pytest.raises(UserError, match="drawn for one split, none for"):
        made(tmp_path / "t", tmp_path / "few", split="block", val_share=1e-9)
    assert not (tmp_path / "few").exists()


@pytest.mark.usefixtures("_small")
def test_the_size_of_shards_does_not_change_the_tokens(tmp_path):
    rows_file(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text(text_of(2000), encoding="utf-8")
    for name in ("a.jsonl", "b.txt"):
        expected = tokens_of(made(tmp_path / name, tmp_path / f"{name}-one"))
        for shard_bytes in (1000, 5000):
            found = tokens_of(
                made(tmp_path / name, tmp_path / f"{name}-{shard_bytes}", shard_bytes=shard_bytes)
            )
            for split in expected:
                np.testing.assert_array_equal(found[split], expected[split])


def test_several_processes_write_the_same_bytes(tmp_path):
    (tmp_path / "t").mkdir()
    rows_file(tmp_path / "t" / "a.jsonl", 3000)
    (tmp_path / "t" / "b.txt").write_text(text_of(50000), encoding="utf-8")
    (tmp_path / "t" / "c.txt.gz").write_bytes(gzip.compress(text_of(20000, 1).encode()))
    options = {"shard_bytes": 1 << 16, "split": "block"}
    one = content(made(tmp_path / "t", tmp_path / "one", **options))
    assert one == content(made(tmp_path / "t", tmp_path / "three", workers=3, **options))
    assert sum(name.startswith("train-") for name in one) > 4


@pytest.mark.parametrize("n_words", [300, 70000])
def test_ids_have_two_bytes_as_long_as_the_vocabulary_fits(tmp_path, n_words):
    characters = "".join(chr(0x1000 + i) for i in range(n_words) if not 0xD800 <= 0x1000 + i < 0xE000)
    lines = [characters[i : i + 50] for i in range(0, len(characters), 50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    corpus = read_folder(made(tmp_path / "a.jsonl", tmp_path / "out"))
    assert corpus.record["dtype"] == ("uint16" if n_words == 300 else "uint32")
    ids = [*corpus.train[:].tolist(), *corpus.val[:].tolist()]
    assert sorted(corpus.vocabulary.decode(ids).replace("\n", "")) == sorted(characters)


def test_line_ends_and_marks_are_treated_as_in_one_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode() * 9)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "x\r\ny"}) + "\n" + json.dumps({"text": ""}) + "\n\n"
    )
    for newline, parts_of in (
        ("universal", "\ufeffone\ntwo\nthree\n"),
        ("keep", "\ufeffone\r\ntwo\rthree\n"),
    ):
        seed = next(
            n for n in range(99) if is_held_out("a.txt", 0.1, n) != is_held_out("b.jsonl:0", 0.1, n)
        )
        request = ShardRequest(newline=newline, split="document", seed=seed)
        names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
        corpus = read_folder(prepare_shards(names, tmp_path / newline, request))
        found = {corpus.vocabulary.decode(getattr(corpus, split)[:].tolist()) for split in ("train", "val")}
        text = parts_of * 9 + "\n"
        assert found == {
            text.removeprefix("\ufeff") if newline == "universal" else text,
            "x\r\ny\n".replace("\r" * (newline == "universal"), ""),
        }


def test_a_separator_stands_after_each_document(tmp_path):
    rows_file(tmp_path / "a.jsonl", 50)
    for separator in ("", "<end>\n"):
        corpus = read_folder(
            made(tmp_path / "a.jsonl", tmp_path / f"out{separator[:1]}", separator=separator)
        )
        text = corpus.vocabulary.decode([*corpus.train[:].tolist(), *corpus.val[:].tolist()])
        assert text.count("row ") == 50
        assert text.count("<end>\n") == (50 if separator else 0)


# Tokenizers -------------------------------------------------------------------------------------------


def test_byte_pairs_are_learned_and_a_mark_is_a_word(tmp_path):
    pytest.importorskip("tokenizers")
    texts = rows_file(tmp_path / "a.jsonl")
    options = {"train_bpe": 300, "separator": "<|endoftext|>", "shard_bytes": 1 << 16}
    one, two = (
        made(tmp_path / "a.jsonl", tmp_path / name, workers=n, **options) for n, name in enumerate("ab", 1)
    )
    assert content(one) == content(two)
    corpus = read_folder(one)
    assert corpus.vocabulary.n_words == 300
    mark = corpus.vocabulary.encode("<|endoftext|>")
    assert len(mark) == 1
    ids = np.concatenate([corpus.train[:], corpus.val[:]])
    assert (ids == mark[0]).sum() == 200
    documents = np.split(ids, np.nonzero(ids == mark[0])[0] + 1)[:-1]
    assert sorted(corpus.vocabulary.decode(d[:-1].tolist()) for d in documents) == sorted(texts)
    assert len(ids) < sum(map(len, texts))
    (tmp_path / "tokenizer.json").write_text(json.loads((one / "meta.json").read_text())["definition"])
    again = made(
        tmp_path / "a.jsonl",
        tmp_path / "again",
        tokenizer=str(tmp_path / "tokenizer.json"),
        separator="<|endoftext|>",
    )
    assert content(again)["train-00000.bin"] == content(one)["train-00000.bin"]


def test_more_byte_pairs_than_a_text_has_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("ab" * 30)
    with pytest.raises(UserError, match="train_bpe 5000 asks for more words than the text yields"):
        made(tmp_path / "a.txt", tmp_path / "out", train_bpe=5000)


# Kills and failures -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small")
def test_a_preparation_that_stops_goes_on_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(text_of(3000), encoding="utf-8")
    options = {"shard_bytes": 1000}
    expected = content(made(tmp_path / "a.txt", tmp_path / "whole", **options))
    real, fail_at = parts.write_part, 4

    def failing(job, meta, number, advance):
        if number == fail_at:
            raise KeyboardInterrupt
        real(job, meta, number, advance)

    monkeypatch.setattr(sharding, "write_part", failing)
    out, under_way = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "a.txt", out, **options)
    assert not out.exists()
    first = {path.name: path.stat().st_ino for path in under_way.glob("*-0000[0-3].bin")}
    assert len(first) > 4
    (under_way / f"train-00004.bin.77{HALF}").write_bytes(b"half")
    written = []
    monkeypatch.setattr(
        sharding, "write_part", lambda job, meta, n, a: (written.append(n), real(job, meta, n, a))
    )
    monkeypatch.setattr(sharding, "collect_alphabet", None)  # known already
    made(tmp_path / "a.txt", out, **options)
    assert written == list(range(4, len(written) + 4))
    assert content(out) == expected
    assert {name: (out / name).stat().st_ino for name in first} == first
    assert not under_way.exists()


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("change", ["source", "option"])
def test_other_sources_or_options_begin_anew(tmp_path, monkeypatch, change):
    (tmp_path / "a.txt").write_text(text_of(3000), encoding="utf-8")
    real = parts.write_part
    monkeypatch.setattr(
        sharding, "write_part", lambda job, meta, n, a: real(job, meta, n, a) if n < 3 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        made(tmp_path / "a.txt", tmp_path / "out", shard_bytes=1000)
    monkeypatch.setattr(sharding, "write_part", real)
    if change == "source":
        (tmp_path / "a.txt").write_text(text_of(3000, 1), encoding="utf-8")
    options = {"shard_bytes": 1000, "seed": int(change == "option")}
    found = content(made(tmp_path / "a.txt", tmp_path / "out", **options))
    assert found == content(made(tmp_path / "a.txt", tmp_path / "fresh", **options))


def test_a_killed_preparation_of_several_processes_goes_on(tmp_path):
    (tmp_path / "a.txt").write_text(text_of(400000) * 3, encoding="utf-8")
    command = [
        sys.executable, "-m", "difftrain", "prepare", "a.txt", "--out", "out", "--workers", "2", "--shard_mib", "1",
    ]  # fmt: skip
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not [*(tmp_path / ".out.partial").glob("part-*.json")]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len([*(tmp_path / ".out.partial").glob("part-*.json")])
    assert not (tmp_path / "out").exists() or not done
    if done:  # else it was quicker than the kill
        said = subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout
        assert "going on, " in said
    expected = content(made(tmp_path / "a.txt", tmp_path / "whole", shard_bytes=1 << 20))
    assert content(tmp_path / "out") == expected


@pytest.mark.usefixtures("_small")
def test_two_preparations_of_one_folder_do_not_meet(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(text_of(300), encoding="utf-8")
    real, messages = parts.write_part, []

    def meeting(job, meta, number, advance):
        with pytest.raises(UserError) as caught:
            made(tmp_path / "a.txt", tmp_path / "out")
        messages.append(str(caught.value))
        real(job, meta, number, advance)

    monkeypatch.setattr(sharding, "write_part", meeting)
    made(tmp_path / "a.txt", tmp_path / "out")
    assert messages == [f"another process is preparing {tmp_path / 'out'}"]


def test_a_full_disk_is_one_line_and_nothing_has_the_name(tmp_path):
    """As a limit on the size of files, which the system answers in the same way."""
    (tmp_path / "a.txt").write_text(text_of(100000), encoding="utf-8")
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    code += "; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)"
    code += "; from difftrain.cli import main; raise SystemExit(main(['prepare', 'a.txt', '--out', 'out', '--shards']))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the disk is full" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(text_of(300), encoding="utf-8")
    real = parts.write_part

    def changing(job, meta, number, advance):
        real(job, meta, number, advance)
        with (tmp_path / "a.txt").open("a") as file:
            file.write("more")

    monkeypatch.setattr(sharding, "write_part", changing)
    with pytest.raises(UserError, match=r"a\.txt has changed while it was read"):
        made(tmp_path / "a.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "harmed", "message"),
    [
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 2001: the field 'text' must be a text, got int"),
        ("a.jsonl", b'{"text": "a"', "a.jsonl, line 2001: no JSON: Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl, line 2001: no JSON: 'utf-8' codec"),
        (
            "a.jsonl",
            b'{"tex": "a"}',
            "a.jsonl, line 2001: there is no field 'text', only tex; --field names it",
        ),
        ("a.jsonl", b'["a"]', "a.jsonl, line 2001: no JSON object, but list"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 2001: the field 'text' holds '\\\\ud800'"),
        ("a.txt", b"caf\xe9", "a.txt, line 2001: not UTF-8 text"),
        ("a.txt", b"a\0b", "a.txt, line 2001: binary, with NUL bytes"),
        ("a.txt.gz", b"caf\xe9", "a.txt.gz, line 2001: not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_named_in_whichever_part_it_lies(tmp_path, capsys, name, harmed, message, workers):
    if workers == 2 and name == "a.jsonl" and b"3" not in harmed:
        pytest.skip("shown by one of them")
    good = b'{"text": "a line of many words, and more"}\n'
    data = good * 2000 + harmed + b"\n" + good * 3000
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=message):
        made(path, tmp_path / "out", workers=workers, shard_bytes=1 << 16, tokenizer="bytes")
    assert not (tmp_path / "out").exists()
    assert not [*(tmp_path / ".out.partial").glob(f"*{HALF}")]


def test_what_is_not_there_or_holds_nothing_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    for names, message in (
        (["nowhere"], "there is no file or folder .*nowhere"),
        (["empty.txt"], "empty.txt holds no text"),
        (["saved"], "saved holds several splits of a dataset; name one, such as .*saved/train"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_shards([str(tmp_path / name) for name in names], tmp_path / "out", ShardRequest())
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(UserError, match="the sources hold no text"):
        made(tmp_path / "rows.jsonl", tmp_path / "out", tokenizer="bytes")
    (tmp_path / "a.txt").write_text("ab" * 50)
    with pytest.raises(UserError, match="exists already"):
        made(tmp_path / "a.txt", tmp_path / "saved")
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        made(tmp_path / "a.txt", tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_share": 1.0}, r"val_share must be in \(0, 1\), got 1"),
        ({"split": "rows"}, "split must be auto or document or block, got 'rows'"),
        ({"format": "csv"}, "format must be auto or text or jsonl"),
        ({"train_bpe": 200}, "train_bpe must be at least 257"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ShardRequest(**changes)


# The command ------------------------------------------------------------------------------------------


def test_the_command_makes_shards_where_sources_or_options_ask_for_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(text_of(90000), encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text_of(90000).encode()))
    rows_file(tmp_path / "c.jsonl")
    for number, (words, is_sharded) in enumerate(
        (
            (["a.txt"], False),
            (["a.txt", "--shards", "--split", "block", "--val_share", "0.5"], True),
            (["b.txt.gz"], True),
            (["c.jsonl"], True),
            (["a.txt", "c.jsonl"], True),
        )
    ):
        assert main(["prepare", *words, "--out", f"out{number}"]) == 0, capsys.readouterr().err
        assert (tmp_path / f"out{number}" / INDEX).exists() == is_sharded
        line = capsys.readouterr().out.splitlines()[-1]
        corpus = read_folder(tmp_path / f"out{number}")
        assert f"{len(corpus.train):,} training and {len(corpus.val):,} validation tokens" in line
    for words, message in (
        (["c.jsonl"], "shards, which need a folder of their own: give --out DIR"),
        (["stdlib", "--workers", "2", "--out", "x"], "stdlib is one text without shards"),
        (["nowhere", "a.txt", "--out", "x"], "there is no file or folder nowhere"),
    ):
        assert main(["prepare", *words]) == 2
        assert message in capsys.readouterr().err


def test_standard_input_is_prepared_like_a_file(tmp_path):
    (tmp_path / "a.txt").write_text(text_of(90000), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def piped(data, *words):
        command = [
            sys.executable,
            "-m",
            "difftrain",
            "prepare",
            "-",
            "--out",
            str(tmp_path / "out"),
            *words,
        ]
        return subprocess.run(command, input=data, capture_output=True, env=environment)

    done = piped((tmp_path / "a.txt").read_bytes(), "--workers", "2", "--shard_mib", "1")
    assert done.returncode == 0, done.stderr
    text = sum(read_folder(tmp_path / "out").counts.values()).sum()
    assert text == len((tmp_path / "a.txt").read_text(encoding="utf-8")) + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
    (tmp_path / "out").rename(tmp_path / "first")
    for data, words, message in (
        (b"", (), b"standard input is empty"),
        (b"a\xff\n", (), b"standard input, line 1: not UTF-8 text"),
        (b'{"text": "ab"}\n{', ("--format", "jsonl"), b"standard input, line 2: no JSON"),
    ):
        done = piped(data, *words)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert message in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "first"]


# Other formats ----------------------------------------------------------------------------------------


def test_parquet_and_saved_datasets_give_the_rows_of_the_same_json(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = rows_file(tmp_path / "a.jsonl")
    table = arrow.table({"id": range(len(texts)), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    (tmp_path / "saved").mkdir()
    with (
        arrow.OSFile(str(tmp_path / "saved" / "data-0.arrow"), "wb") as file,
        arrow.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table, max_chunksize=30)
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    for name in ("a.parquet", "saved"):
        corpus = read_folder(made(tmp_path / name, tmp_path / f"out-{name}", shard_bytes=1000))
        text = [corpus.vocabulary.decode(getattr(corpus, split)[:].tolist()) for split in ("train", "val")]
        assert sorted("".join(text).splitlines()) == sorted("\n".join(texts).splitlines())
        assert text[1].count("row ") in range(5, 40)
        with pytest.raises(UserError, match="there is no column 'body', only id, text; --field names it"):
            made(tmp_path / name, tmp_path / "other", field="body")
        with pytest.raises(UserError, match="row 0.*: it must hold a text, got int"):
            made(tmp_path / name, tmp_path / "other", field="id")
        path = tmp_path / name if name == "a.parquet" else tmp_path / name / "data-0.arrow"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=f"{path.name}"):
            made(tmp_path / name, tmp_path / "other")
        assert not (tmp_path / "other").exists()


# Memory and what is loaded ----------------------------------------------------------------------------


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 1 << 14)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 12)
    monkeypatch.setattr(sharding, "BLOCK", 1 << 12)
    monkeypatch.setattr(parts, "AT_ONCE", 1 << 14)
    text, peaks = text_of(20000), []
    for times in (2, 16):
        path = tmp_path / f"{times}.txt"
        path.write_text(text * times, encoding="utf-8")
        peaks.append(
            peak_of(
                lambda path=path, times=times: made(path, tmp_path / f"out{times}", shard_bytes=1 << 18)
            )
        )
    assert peaks[1] < peaks[0] + 200_000
    assert (tmp_path / "16.txt").stat().st_size > 1_500_000


def test_preparing_loads_no_torch(tmp_path):
    (tmp_path / "a.txt").write_text(text_of(90000), encoding="utf-8")
    code = "import sys; from difftrain.cli import main; assert main(['prepare', 'a.txt', '--shards', '--out', 'out']) == 0"
    code += "; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "megabytes"),
    [(["--tokenizer", "char"], 300), (["--tokenizer", "bytes"], 300), (["--train_bpe", "4096"], 140)],
    ids=["char", "bytes", "bpe"],
)
def test_300_mb_of_text_are_prepared_within_500_mb(tmp_path, words, megabytes):
    """Each process for itself: the largest resident size of any. Byte pairs, which are slow, are learned from 64 MiB."""
    if "--train_bpe" in words:
        pytest.importorskip("tokenizers")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files if path.read_bytes().isascii())
    with (tmp_path / "a.txt").open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            file.write(text)
    command = [
        sys.executable,
        "-m",
        "difftrain",
        "prepare",
        "a.txt",
        "--out",
        "out",
        "--workers",
        "2",
        *words,
    ]
    code = f"import resource, subprocess; subprocess.run({command!r}, check=True)"
    code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    resident = int(done.stdout.splitlines()[-1]) * 1024
    print(words, resident)
    assert resident < 500_000_000


@pytest.mark.usefixtures("_small")
def test_the_digest_of_a_shard_that_was_written_in_many_pieces_is_that_of_its_file(tmp_path):
    (tmp_path / "a.txt").write_text(text_of(2000))
    folder = made(tmp_path / "a.txt", tmp_path / "out", shard_bytes=4096)
    index = json.loads((folder / INDEX).read_text())
    told = [shard for split in index["splits"].values() for shard in split["shards"]]
    assert max(shard["tokens"] for shard in told) > 10 * parts.AT_ONCE
    for shard in told:
        assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
