"""``difftrain repair`` on the command line."""

import io
import json
import os
import subprocess
import sys

import pytest

from difftrain.cli import main
from difftrain.sampling import loaded as loaded_module
from ring_model import LETTERS, ring

RIGHT = LETTERS * 20
WRONG = RIGHT[:40] + "e" + RIGHT[41:]


@pytest.fixture
def obey(monkeypatch, capfdbinary, tmp_path):
    """Exit code, standard output and error of ``difftrain repair RUN WORDS`` on a text; its file is named FILE."""
    monkeypatch.setattr(loaded_module, "load", lambda *_: ring())

    def repair(content, *words):
        (tmp_path / "a.txt").write_bytes(content)
        words = [str(tmp_path / "a.txt") if word == "FILE" else word for word in words]
        code = main(["repair", "run", *words])
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return repair


def test_the_repaired_text_is_printed_byte_for_byte(obey):
    assert obey(WRONG.encode(), "FILE") == (0, RIGHT.encode(), "")
    assert obey(RIGHT.encode(), "FILE") == (0, RIGHT.encode(), "")
    foreign = "\ufeff" + RIGHT[:20] + "\r\n"
    assert obey(foreign.encode(), "FILE", "--keep_unknown") == (0, foreign.encode(), "")


@pytest.mark.parametrize(
    ("words", "shown"),
    [([], b""), (["--diff"], b""), (["--check"], b""), (["--json"], b'{"text": "", "edits": []}\n')],
)
def test_an_empty_text_is_repaired_to_an_empty_one(obey, words, shown):
    code, out, err = obey(b"", "FILE", *words)
    assert (code, err) == (0, "")
    assert out == shown or json.loads(out) == json.loads(shown)


def test_a_diff_json_and_a_check_tell_the_same_places(obey):
    code, out, _ = obey(WRONG.encode(), "FILE", "--diff")
    assert (code, out.decode()) == (0, f"1: [-{WRONG}-]{{+{RIGHT}+}}\n")
    code, out, _ = obey(WRONG.encode(), "FILE", "--json")
    record = json.loads(out)
    assert (code, record["text"], record["edits"][0]["position"]) == (0, RIGHT, 40)
    code, out, _ = obey(WRONG.encode(), "FILE", "--check")
    assert code == 1
    assert out.decode().endswith("a.txt:1:41: 'e' is wrong with probability 1.00\n")
    code, out, _ = obey(WRONG.encode(), "FILE", "--check", "--json")
    assert (code, json.loads(out)["edits"][0]["new"]) == (1, None)
    assert obey(RIGHT.encode(), "FILE", "--check") == (0, b"", "")
    assert obey(WRONG.encode(), "FILE", "--max_changes", "0") == (0, WRONG.encode(), "")
    assert obey(WRONG.encode(), "FILE", "--check", "--suspect", "1")[0] == 0


def test_standard_input_is_read(obey, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WRONG.encode())))
    assert obey(b"", "-") == (0, RIGHT.encode(), "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WRONG.encode())))
    assert obey(b"", "-", "--check")[1].startswith(b"standard input:1:41: ")


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        (b"ab\0c", ["FILE"], "a.txt cannot be repaired: it is binary, with NUL bytes"),
        (b"ab\xff", ["FILE"], "a.txt cannot be repaired: it is not UTF-8 text"),
        ("abcé".encode(), ["FILE"], "characters outside the vocabulary: 'é'"),
        (b"abc", ["/no/such/file"], "No such file or directory: '/no/such/file'"),
        (b"abc", ["/"], "Is a directory: '/'"),
        (b"abc", ["FILE", "--suspect", "2"], "suspect must be in (0, 1], got 2.0"),
        (
            b"abc",
            ["FILE", "--check", "--diff"],
            "--diff shows what was changed, and --check changes nothing",
        ),
        (b"abc", ["FILE", "--diff", "--json"], "not allowed with argument"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_printed(obey, content, words, told):
    code, out, err = obey(content, *words)
    assert (code, out) == (2, b"")
    assert told in err
    assert err.count("\n") == 1


def test_a_reader_that_leaves_ends_it_quietly(tmp_path, tiny):
    from difftrain.training.loop import train

    config = tiny(max_iters=1)
    train(config)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "difftrain", "repair", config.out_dir, "-", "--device", "cpu"],
        input=b"red green blue", stdout=writer, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
