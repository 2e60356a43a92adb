"""A run knows its data again: what has changed since a checkpoint is refused, unless it is allowed."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from corpora import nanogpt_folder, rewrite
from difftrain.checkpoints.folder import digest_of
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.cli import main
from difftrain.errors import UserError
from difftrain.sampling.texts import SampleRequest, sample_run
from difftrain.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = "--allow_changed_data goes on with it as it is now"
LETTERS = {"itos": ["a", "b", "c"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A corpus of three words whose tokens do not repeat."""
    ids = np.random.default_rng(0).integers(0, 3, 900)
    return nanogpt_folder(tmp_path / "data", train=ids[:600], val=ids[600:], meta=LETTERS)


@pytest.fixture
def config(tiny, folder):
    """A finished run of two steps on it, to be resumed to four."""
    config = tiny(data=str(folder), max_iters=2)
    train(config)
    return dataclasses.replace(config, max_iters=4)


def step_of(config):
    return find_checkpoint(Path(config.out_dir), "latest").step


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def swap(name, keeps_mtime):
    """Turn a token file around: other tokens, as many of each word."""

    def change(folder):
        rewrite(folder / name, np.fromfile(folder / name, "uint16")[::-1], keeps_mtime=keeps_mtime)

    return change


def cut(folder):
    rewrite(folder / "train.bin", np.fromfile(folder / "train.bin", "uint16")[:-1])


def rename_words(folder):
    (folder / "meta.json").write_text('{"itos": ["a", "c", "b"]}')


def forget_words(folder):
    (folder / "meta.json").write_text('{"vocab_size": 3}')


CHANGES = {
    "train.bin": swap("train.bin", False),
    "val.bin": swap("val.bin", False),
    "train.bin, its mtime kept": swap("train.bin", True),
    "train.bin, shorter": cut,
    "vocabulary": rename_words,
    "vocabulary, no words": forget_words,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_refuses_changed_data_by_name_and_touches_nothing(config, folder, what, capsys):
    CHANGES[what](folder)
    before = contents(config.out_dir)
    what = what.split(",")[0]
    said = f"the data {folder} has changed since step-00000002: {what} in {folder}"
    for options in ({"resume": True}, {"resume": True, "eval_only": True}):
        with pytest.raises(UserError) as caught:
            train(config, **options)
        assert str(caught.value) == f"{said}; {REFUSED}"
    assert contents(config.out_dir) == before
    capsys.readouterr()
    train(config, resume=True, allow_changed_data=True)
    assert f"note: {said}" in capsys.readouterr().out.splitlines()
    assert step_of(config) == 4
    train(dataclasses.replace(config, max_iters=5), resume=True)  # now it is the run's data
    assert "note: the data" not in capsys.readouterr().out


def test_ids_of_another_type_are_other_data(tmp_path, tiny, capsys):
    """The same bytes: of twice as many ids as uint16."""
    tokens = np.array([1, 0, 2, 0] * 200)
    folder = nanogpt_folder(tmp_path / "d", train=tokens, val=tokens, meta={"vocab_size": 3})
    config = tiny(data=str(folder), max_iters=1)
    train(config)
    (folder / "meta.json").write_text('{"vocab_size": 3, "dtype": "uint32"}')
    with pytest.raises(UserError, match="has changed since step-00000001: dtype in"):
        train(config, resume=True)


def test_another_number_of_words_is_refused_whatever_is_allowed(config, folder):
    (folder / "meta.json").write_text('{"vocab_size": 4}')
    with pytest.raises(UserError, match="another vocabulary of 3 words, the data .* has 4"):
        train(config, resume=True, allow_changed_data=True)


def test_several_files_are_all_named(config, folder):
    swap("train.bin", False)(folder)
    swap("val.bin", False)(folder)
    rename_words(folder)
    with pytest.raises(UserError, match="step-00000002: train.bin, val.bin, vocabulary in"):
        train(config, resume=True)


def test_the_fallback_checkpoint_is_compared_with_its_own_record(config, folder):
    swap("train.bin", False)(folder)
    train(config, resume=True, allow_changed_data=True)
    path = Path(config.out_dir) / "checkpoints" / "step-00000004" / "state.json"
    path.write_text("")
    with pytest.raises(UserError, match="has changed since step-00000002: train.bin"):
        train(config, resume=True)
    swap("train.bin", False)(folder)  # as step 2 had it
    train(config, resume=True)


# What is no change ----------------------------------------------------------------------------------


def notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: [(folder / name).touch() for name in ("train.bin", "val.bin")],
        lambda folder: [swap(name, False)(folder) for name in ("train.bin", "val.bin") * 2],
        lambda folder: (folder / "meta.json").write_text('{"dtype": "uint16",\n "itos": ["a", "b", "c"]}'),
        lambda folder: (folder / "input.txt").write_text("more"),
    ],
    ids=["touched", "changed and changed back", "meta data written otherwise", "another file"],
)
def test_equal_content_goes_on_silently(config, folder, change, capsys):
    change(folder)
    capsys.readouterr()
    train(config, resume=True)
    assert notes(capsys) == ["note: max_iters was 2 in step-00000002 and is 4 from here on"]


def test_a_run_copied_with_its_data_goes_on(config, folder, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(config.out_dir, moved / "run", copy_function=shutil.copyfile)
    shutil.copytree(folder, moved / "data", copy_function=shutil.copyfile)
    swap("train.bin", False)(folder)  # what was left behind does not matter
    capsys.readouterr()
    argv = ["--out_dir", str(moved / "run"), "--data", str(moved / "data"), "--max_iters", "4"]
    assert main(["train", "--resume", *argv]) == 0
    assert notes(capsys) == [
        f"note: data was {folder} in step-00000002 and is {moved / 'data'} from here on",
        "note: max_iters was 2 in step-00000002 and is 4 from here on",
    ]


# Texts ----------------------------------------------------------------------------------------------


def test_an_edited_text_is_prepared_anew_and_a_resume_refuses_it(tiny, tmp_path, capsys):
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    config = tiny(data=str(text), max_iters=1)
    train(config)
    text.write_text(text.read_text()[:-45] + "the quick brown dog jumps over the lazy fox\n\n")
    with pytest.raises(UserError) as caught:
        train(config, resume=True)
    assert str(caught.value).startswith(f"the data {text} has changed since step-00000001: val.bin in ")
    train(config, resume=True, allow_changed_data=True)


# Records --------------------------------------------------------------------------------------------


def test_every_checkpoint_has_the_digests_of_its_data(config, folder):
    expected = {"dtype": "uint16"} | {name: digest_of(folder / name) for name in ("train.bin", "val.bin")}
    for step in ("0", "2"):
        assert find_checkpoint(Path(config.out_dir), step).state["data"] == expected


@pytest.mark.parametrize("record", [None, [], 5])
def test_a_checkpoint_without_a_record_goes_on_with_a_note(config, folder, record, capsys):
    for checkpoint in (Path(config.out_dir) / "checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        if record is None:
            del state["data"]
        else:
            state["data"] = record
        (checkpoint / "state.json").write_text(json.dumps(state))
        digests = json.loads((checkpoint / "digests.json").read_text())
        digests["state.json"] = digest_of(checkpoint / "state.json")
        (checkpoint / "digests.json").write_text(json.dumps(digests))
    rename_words(folder)  # the vocabulary has always been saved
    with pytest.raises(UserError, match=f"has changed since step-00000002: vocabulary in .*{REFUSED}"):
        train(config, resume=True)
    (folder / "meta.json").write_text(json.dumps(LETTERS))
    swap("train.bin", False)(folder)
    capsys.readouterr()
    train(config, resume=True)
    assert notes(capsys)[0] == (
        f"note: step-00000002 does not say what data it was trained on, so {folder} is not compared with it"
    )
    assert find_checkpoint(Path(config.out_dir), "latest").state["data"]["train.bin"]


# Commands -------------------------------------------------------------------------------------------


def test_the_command_refuses_in_one_line_and_has_the_option_it_names(config, folder, capsys):
    swap("train.bin", False)(folder)
    capsys.readouterr()
    argv = ["train", "--resume", "--out_dir", config.out_dir, "--max_iters", "3"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(f"train.bin in {folder}; {REFUSED}\n")
    assert main([*argv, "--allow_changed_data"]) == 0
    assert step_of(config) == 3


def test_a_held_out_text_comes_from_the_runs_own_data(config, folder, capsys):
    run = config.out_dir
    request = SampleRequest(held_out=True, device="cpu", steps=2, checkpoint="latest")
    original = sample_run(Path(run), request).text.split("\n")[1]
    swap("train.bin", False)(folder)  # nothing of it is shown
    assert sample_run(Path(run), request).text.split("\n")[1] == original
    swap("val.bin", False)(folder)
    argv = ["sample", run, "--held_out", "--device", "cpu", "--checkpoint", "latest"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err == (
        f"difftrain: the data {folder} has changed since step-00000002: val.bin in {folder}, so this text may "
        "not be held out; --allow_changed_data takes it nevertheless\n"
    )
    assert main([*argv, "--allow_changed_data"]) == 0
    assert main(["sample", run, "--device", "cpu", "--steps", "1"]) == 0  # no data is read
