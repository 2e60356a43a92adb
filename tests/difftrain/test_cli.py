import dataclasses
import pickle
import signal
import sys

import pytest

from difftrain.cli import main
from difftrain.config import Config
from difftrain.config.sources import preset_names
from difftrain.data import preparing
from difftrain.training.run_folder import locked
from launch import finish, start
from waiting import wait_until


@pytest.fixture
def words(tiny):
    """The command-line words of a tiny run."""

    def make(**changes):
        values = dataclasses.asdict(tiny(**changes))
        return [f"--{name}={value}" for name, value in values.items() if value != getattr(Config(), name)]

    return make


def fails(capsys, *argv):
    """Run a command that must fail, before a configuration is shown; returns its one line on stderr."""
    assert main([str(word) for word in argv]) == 2
    shown = capsys.readouterr()
    assert "block_size=" not in shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("difftrain: ")
    return lines[0]


def test_train_plot_and_sample_work_on_one_run(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *words(max_iters=3)]) == 0
    assert "block_size=16" in capsys.readouterr().out
    assert main(["plot", str(run)]) == 0
    assert (run / "plots" / "curves.png").exists()
    capsys.readouterr()
    assert main(["sample", str(run), "--device", "cpu", "--steps", "2", "--prompt", "red"]) == 0
    assert capsys.readouterr().out.startswith("red")
    assert main(["train", "--resume", "--out_dir", str(run), "--max_iters", "4"]) == 0
    assert "steps 3 to 4" in capsys.readouterr().out


def test_prepare_says_how_to_train_with_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("abcab" * 50)
    assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "225 training and 25 validation tokens, 3 words" in out
    assert f"--data {tmp_path / 'out'}" in out
    monkeypatch.setattr(preparing, "read_text", lambda *_: pytest.fail("work before the refusal"))
    assert "exists already" in fails(capsys, "prepare", tmp_path / "a.txt", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--batchsize", "3"], "unknown option --batchsize; did you mean --batch_size"),
        (["train", "--penalty_keep=1"], "unknown option --penalty_keep; did you mean --penalty_keep_mask"),
        (["train", "--batch_size", "many"], "batch_size must be int, got 'many'"),
        (["train", "--mode", "bert"], "mode must be one of diffusion, gpt2, got 'bert'"),
        (["train", "--penalty_keep_mask", "-1"], "penalty_keep_mask must be at least 0.0, got -1.0"),
        (["train", "--penalty_mask_correct", "nan"], "penalty_mask_correct must be finite, got nan"),
        (["train", "--max_iters", "0"], "max_iters must be at least 1, got 0"),
        (["train", "dmo"], "no preset named 'dmo'; did you mean demo"),
        (["train", "demo", "extra"], "unexpected argument extra"),
        (["train", "--config", "none.toml"], "configuration file not found: none.toml"),
        (["train", "--resume", "--out_dir", "none"], "cannot resume: none is not a run folder"),
        (["train", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["train", "--data", "nowhere"], "there is no nowhere"),
        (["train", "--device", "tpu"], "device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        (["train", "--seed", "99999999999999999999999"], "seed must be at most 9223372036854775807"),
        (["train", "--out_dir", "a\x7fb"], "out_dir must be printable text"),
        (["train", "--data", ""], "data must not be empty"),
        (["train", "--eval_iters", "1"], "eval_iters must be at least 2, got 1"),
        (["trian"], "invalid choice: 'trian'"),
        (["sample", "nowhere"], "nowhere is not a run folder"),
        (["sample", ".", "--top_k", "x"], "argument --top_k: invalid int value: 'x'"),
        (["plot", "nowhere"], "nowhere is not a run folder"),
        (["prepare", "nowhere"], "there is no nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gives_one_line_exit_code_2_and_writes_nothing(
    argv, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path / "cache"))
    assert message in fails(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_and_a_missing_tracker_are_told_before_a_configuration(
    words, tmp_path, capsys, monkeypatch
):
    with locked(tmp_path / "run"):
        assert "is in use by another process" in fails(capsys, "train", *words())
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'difftrain[wandb]'" in fails(capsys, "train", *words(wandb_log=True))


def test_a_run_begins_with_its_configuration_in_lines_that_fit(words, capsys):
    assert main(["train", *words(max_iters=1)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("out_dir=")
    title = next(i for i, line in enumerate(lines) if " parameters on cpu " in line)
    assert max(map(len, lines[1:title])) <= 100
    pairs = " ".join(lines[:title]).split(" ")
    assert [pair.split("=")[0] for pair in pairs] == [
        field.name
        for field in dataclasses.fields(Config)
        if field.name not in ("wandb_run_name", "init_from")  # which are empty
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ab", "too short to train on"),
        (b"abcdef" * 10, "has 6 tokens, and block_size asks for 16 at a time"),
    ],
    ids=["empty", "too short", "shorter than block_size"],
)
def test_unusable_text_gives_one_line_and_no_run(words, tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_bytes(content)
    assert message in fails(capsys, "train", *words(data=str(tmp_path / "a.txt")))
    assert not (tmp_path / "run").exists()


def test_an_existing_run_an_unwritable_place_and_a_strange_prompt(words, tmp_path, capsys):
    assert main(["train", *words(max_iters=1)]) == 0
    capsys.readouterr()
    assert "already holds a run; give --resume, --overwrite" in fails(capsys, "train", *words(max_iters=1))
    (tmp_path / "file").write_text("")
    assert "is not writable" in fails(capsys, "train", *words(out_dir=str(tmp_path / "file" / "run")))
    assert "has no checkpoint '\u00b2'" in fails(
        capsys, "sample", tmp_path / "run", "--checkpoint", "\u00b2"
    )
    assert "out must be a .png file" in fails(capsys, "plot", tmp_path / "run", "--out", "x.foo")
    assert "outside the vocabulary: 'Q'" in fails(capsys, "sample", tmp_path / "run", "--prompt", "Q")


def test_a_hostile_pickle_gives_one_line(words, tmp_path, capsys, corpus_folder):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes((corpus_folder / name).read_bytes())
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": print}))
    assert "meta.pkl is refused" in fails(capsys, "train", *words(data=str(folder)))


def test_help_shows_every_option_with_its_default_and_the_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text
    assert all(name in text for name in preset_names())
    assert max(map(len, text.splitlines())) <= 120


def test_difftrain_alone_shows_the_help(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == alone
    assert all(
        f"    {command} " in alone for command in ("train", "watch", "report", "plot", "sample", "prepare")
    )


def test_ctrl_c_in_a_real_process_saves_and_exits_with_0(words, tmp_path):
    argv = words(max_iters=10**6, log_interval=1, eval_interval=10**6)
    process = start("-m", "difftrain", "train", *argv)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def is_under_way():
        assert process.poll() is None, finish(process)
        return metrics.exists() and metrics.read_text().count("\n") > 3

    wait_until(is_under_way, "the first steps")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    assert "go on with: difftrain train --resume --out_dir" in out.splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
