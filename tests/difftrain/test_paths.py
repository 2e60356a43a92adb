"""``~`` and environment variables in every path, in every command and in every file that holds options."""

import dataclasses
import sys
from pathlib import Path

import pytest

from difftrain import hf_kernel
from difftrain.cli import COMMANDS, _Parser, main
from difftrain.config import Config
from difftrain.config import sources as sources_module
from difftrain.config.options import PATHS
from difftrain.config.paths import expand_path
from difftrain.config.sources import read_toml, resolve_config
from difftrain.data.preparing import cache_folder
from difftrain.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder, the variable PLACE for it, and a working folder that must stay empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", str(folder))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("DIFFTRAIN_CACHE", "~/cache")
    monkeypatch.chdir(tmp_path / "here")
    yield folder
    assert list((tmp_path / "here").iterdir()) == []


WAYS = ["~/{}", "$PLACE/{}", "${{PLACE}}/{}", "$HOME/../home/{}"]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_shell_expands_is_expanded(home, way):
    assert Path(expand_path(way.format("a b"))).resolve() == home / "a b"


@pytest.mark.parametrize("text", ["runs/default", "/a/~b", "a~", "price$", "$", "stdlib", "", "./~b"])
def test_other_paths_stay_as_they_are(text):
    assert expand_path(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOWHERE/run", "names the environment variable NOWHERE, which is not set"),
        ("a/${NOWHERE}", "names the environment variable NOWHERE, which is not set"),
        ("~nobody-of-this-name/run", "names the user 'nobody-of-this-name', and there is none"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        expand_path(text)


def test_a_file_of_just_this_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cost$NOWHERE.txt", "~no-user-of-this-name"):
        (tmp_path / name).write_text("")
        assert expand_path(name) == name


# Options and the files that hold them ---------------------------------------------------------------


def test_the_options_that_are_paths_are_marked():
    assert PATHS == ["out_dir", "data", "init_from"]


@pytest.mark.parametrize("way", WAYS[:2])
def test_paths_of_presets_files_and_the_command_line_are_expanded(home, way, monkeypatch):
    values = {name: way.format(name) for name in PATHS}
    expected = {name: str(home / name) for name in PATHS}
    lines = "".join(f'{name} = "{value}"\n' for name, value in values.items())
    (home / "c.toml").write_text(lines)
    monkeypatch.setattr(sources_module, "_preset_text", lambda name: lines)
    for config in (
        resolve_config("demo", None, {}),
        resolve_config(None, way.format("c.toml"), {}),
        resolve_config(None, None, values),
    ):
        assert {name: getattr(config, name) for name in PATHS} == expected


def test_a_run_is_saved_with_the_places_it_used_and_goes_on_in_another_environment(
    tiny, home, corpus_folder, monkeypatch, capsys
):
    (home / "corpus").symlink_to(corpus_folder)
    config = dataclasses.replace(tiny(max_iters=1), data="$PLACE/corpus", out_dir="~/run")
    (home / "c.toml").write_text(config.to_toml())
    assert main(["train", "--config", "~/c.toml"]) == 0
    saved = Config(**read_toml(home / "run" / "config.toml"))
    assert (saved.out_dir, saved.data) == (str(home / "run"), str(home / "corpus"))
    monkeypatch.delenv("PLACE")
    assert main(["train", "--resume", "--out_dir", "~/run", "--max_iters", "2"]) == 0
    assert "steps 1 to 2" in capsys.readouterr().out


def test_a_saved_configuration_is_taken_as_it_stands(home):
    (home / "run").mkdir()
    saved = Config(out_dir=str(home / "run"), data="/gone/cost$NOWHERE.txt")
    (home / "run" / "config.toml").write_text(saved.to_toml())
    assert resolve_config(None, None, {"out_dir": "~/run"}, resume=True) == saved


# Commands -------------------------------------------------------------------------------------------


def test_every_command_expands_its_paths(tiny, home, capsys):
    text = "the quick brown fox jumps over the lazy dog\n" * 40
    (home / "fox.txt").write_text(text)
    assert main(["prepare", "~/fox.txt", "--out", "$PLACE/tokens"]) == 0
    assert (home / "tokens" / "train.bin").exists()
    (home / "c.toml").write_text(dataclasses.replace(tiny(max_iters=1), data="~/tokens").to_toml())
    assert main(["train", "--config", "$PLACE/c.toml", "--out_dir", "~/run"]) == 0
    assert main(["plot", "~/run", "--out", "$PLACE/curves.png"]) == 0
    assert (home / "curves.png").exists()
    assert main(["sample", "$PLACE/run", "--device", "cpu", "--steps", "1"]) == 0
    assert list((home / "run" / "samples").iterdir())
    assert main(["prepare", "~/fox.txt"]) == 0
    assert list((home / "cache").glob("fox-*"))
    capsys.readouterr()


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--out_dir", "$NOWHERE/run"],
        ["train", "--data", "$NOWHERE/run"],
        ["train", "--config", "$NOWHERE/c.toml"],
        ["sample", "$NOWHERE/run"],
        ["plot", "$NOWHERE/run"],
        ["plot", ".", "--out", "$NOWHERE/x.png"],
        ["prepare", "$NOWHERE/fox.txt"],
        ["prepare", "stdlib", "--out", "$NOWHERE/out"],
        ["prepare", "stdlib", "--tokenizer", "$NOWHERE/tokenizer.json"],
    ],
    ids=" ".join,
)
def test_a_variable_that_is_not_set_is_named_in_one_line(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err == (
        f"difftrain: {next(word for word in argv if 'NOWHERE' in word)} names the environment variable "
        "NOWHERE, which is not set\n"
    )


def test_a_tokenizers_file_is_found_at_home(home, capsys):
    (home / "fox.txt").write_text("fox " * 40)
    (home / "tokenizer.json").write_text("{}")
    assert main(["prepare", "~/fox.txt", "--tokenizer", "~/tokenizer.json"]) == 2
    assert "tokenizer file not found" not in capsys.readouterr().err


def test_every_argument_that_takes_a_path_is_of_a_kind_that_is_expanded():
    """``_parse`` expands what is a Path; texts that may be paths are expanded by their commands."""
    parser = _Parser()
    commands = parser.add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    texts = {"config", "source", "tokenizer", *PATHS}  # checked above
    for name, command in commands.choices.items():
        for action in command._actions:
            words = f"{action.metavar} {action.dest}".lower()
            if any(word in words for word in ("dir", "file", "folder", "run ", "path")):
                assert action.type is Path or action.dest in texts, f"{name} {action.dest}"


def test_the_export_for_hugging_face_expands_its_folder(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_kernel", "~/kernel"])
    hf_kernel.main()
    assert (home / "kernel" / "build" / "torch-cpu").is_dir()
    monkeypatch.setattr(sys, "argv", ["hf_kernel", "$NOWHERE/kernel"])
    with pytest.raises(SystemExit):
        hf_kernel.main()
    assert "NOWHERE, which is not set" in capsys.readouterr().err


def test_the_caches_place_is_expanded(home, monkeypatch):
    assert cache_folder() == home / "cache"
    monkeypatch.setenv("DIFFTRAIN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert cache_folder() == home / "xdg" / "difftrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == home / ".cache" / "difftrain"
