"""The code in README.md and docs/*.md runs, and its commands exist.

A page says what runs in comments that its readers do not see. ``<!-- run -->`` above a Python block:
it runs after the page's earlier ones and sees their names. ``<!-- run``, lines of code and ``-->``: a
block that is not shown, for what the shown ones need, or what must hold after them. ``<!-- not run:
reason -->``: it is left out.
"""

import importlib.util
import re
import shlex

import pytest
import torch

from difftrain.cli import _parse
from difftrain.config import Config, resolve_config
from difftrain.errors import UserError
from pages import NAMES, ROOT, blocks_of, code_words_of

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
BLOCKS = [block for name in NAMES for block in blocks_of(name, TEXTS[name])]
RUN = sorted({block.page for block in BLOCKS if block.mark == "run"})
LANGUAGES = {"python", "sh", "toml", ""}
PROGRAMS = ("difftrain", "make", "python", "torchrun")


def at(block):
    return f"{block.page}:{block.line}"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder to run in, and torch.compile without the compiling of machine code, which takes a compiler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path / "cache"))
    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *f, **options: plain(*f, **options | {"backend": "aot_eager"})
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", RUN)
def test_the_python_blocks_of_a_page_run_in_order(page):
    names = {"__name__": page}
    for block in BLOCKS:
        if block.page == page and block.mark == "run":
            code = "\n" * (block.line - 1) + block.code  # so that an error names the page's own line
            exec(compile(code, ROOT / page, "exec"), names)


def test_every_block_has_a_language_and_every_python_block_runs_or_says_why_not():
    assert [at(block) for block in BLOCKS if block.language not in LANGUAGES] == []
    assert [at(block) for block in BLOCKS if block.language == "python" and not block.mark] == []


# Commands -----------------------------------------------------------------------------------------


def commands_of(block):
    """The commands of a block: each line of a shell block; where no language is given, what starts a program of ours."""
    lines = [line for line in block.code.splitlines() if line and line[0] != "#"]
    return [line for line in lines if block.language == "sh" or line.split()[0] in PROGRAMS]


IN_BLOCKS = [
    (at(block), line) for block in BLOCKS if block.language in ("sh", "") for line in commands_of(block)
]
IN_PROSE = [
    (name, words) for name in NAMES for words in code_words_of(TEXTS[name]) if words.split()[0] in PROGRAMS
]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check_difftrain(words):
    """Parse a command as ``difftrain`` does, and for ``train`` find its configuration; alone it shows the help."""
    if not words:
        return
    args = _parse(words)
    if words[0] == "train" and not args.resume:
        chosen = {name: word for name, word in vars(args).items() if hasattr(Config, name)}
        resolve_config(args.preset, None, chosen)


def check_command(line):
    """Fail where a command could not be started: a target, file, module or option that is not there."""
    words = shlex.split(line, comments=True)
    program = words.pop(0)
    if program == "torchrun":
        while words[0].startswith("--"):  # torchrun's own
            words.pop(0)
        program = "python"
    if program == "python" and words[:2] == ["-m", "difftrain"]:
        program, words = "difftrain", words[2:]
    if program == "difftrain":
        check_difftrain(words)
    elif program == "make":
        assert set(words) <= TARGETS, f"no target {words} in the Makefile"
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif program == "python":
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"
    else:
        assert program == "pip", f"what is {program}?"


@pytest.mark.parametrize(("place", "line"), IN_BLOCKS, ids=lambda value: value)
def test_a_command_of_a_block_can_be_given(place, line):
    check_command(line)


@pytest.mark.parametrize(("place", "line"), IN_PROSE, ids=lambda value: value)
def test_a_command_in_the_prose_exists(place, line, capsys):
    """There it may be named without what it needs, and may ask for help, which ends the program."""
    try:
        check_command(line)
    except (UserError, SystemExit) as ended:
        if isinstance(ended, UserError) and "arguments are required" not in str(ended):
            raise


@pytest.mark.parametrize(
    "line",
    [
        "difftrain train dmo",
        "difftrain train demo --batchsize 3",
        "difftrain train demo --mode bert",
        "torchrun --nproc_per_node=2 -m difftrain train demo --parallel fsdp --compile step",
        "difftrain sample runs/demo --hold_out",
        "make tests",
        "python benchmarks/bench_speed.py",
        "python -m difftrain.no_such_module",
        "diftrain train demo",
    ],
)
def test_a_command_that_cannot_be_given_is_seen(line):
    with pytest.raises((UserError, AssertionError)):
        check_command(line)
