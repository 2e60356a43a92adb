"""Paths given to the programs, as a shell would have them; and numbers of things."""

import argparse
from pathlib import Path

import pytest

from measuring.arguments import count, user_path


def test_home_and_variables_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "there"))
    assert user_path("~/out.json") == tmp_path / "out.json"
    assert user_path("$WHERE/out.json") == tmp_path / "there" / "out.json"
    assert user_path("out.json") == Path("out.json")


def test_an_unset_variable_is_one_line_of_the_command_line(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=user_path)
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", "$NOT_SET_ANYWHERE/a.json"])
    assert "names the environment variable NOT_SET_ANYWHERE, which is not set" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "", "²"])
def test_what_is_no_number_of_things_is_one_line_of_the_command_line(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=count)
    assert parser.parse_args(["--saves", "20"]).saves == 20
    with pytest.raises(SystemExit):
        parser.parse_args(["--saves", text])
    assert f"argument --saves: must be a number of at least 1, got {text}" in capsys.readouterr().err
