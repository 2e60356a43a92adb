import ast
import sys
from pathlib import Path

import pytest
import torch

from difftrain.cli import _parse, main
from difftrain.data.vocabulary import Tiktoken, Tokenizer
from difftrain.errors import UserError, import_extra
from difftrain.reporting.columns import Columns
from difftrain.reporting.log import check_trackers
from difftrain.reporting.plot import plot_run
from difftrain.training.loop import train

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "difftrain"


@pytest.mark.parametrize(
    ("module", "use", "message"),
    [
        (
            "wandb",
            lambda tiny: check_trackers(tiny(wandb_log=True)),
            "wandb is not installed: pip install 'difftrain[wandb]'",
        ),
        (
            "torch.utils.tensorboard",
            lambda tiny: check_trackers(tiny(tensorboard=True)),
            "tensorboard is not installed: pip install 'difftrain[tb]'",
        ),
        (
            "tokenizers",
            lambda tiny: Tokenizer("{}").n_words,
            "tokenizers is not installed: pip install 'difftrain[tok]'",
        ),
        (
            "tiktoken",
            lambda tiny: Tiktoken("gpt2").n_words,
            "tiktoken is not installed: pip install 'difftrain[tok]'",
        ),
        (
            "shtab",
            lambda tiny: _parse(["--print-completion", "bash"]),
            "shtab is not installed: pip install 'difftrain[completion]'",
        ),
        (
            "pandas",
            lambda tiny: Columns([]).to_pandas(),
            "pandas is not installed: pip install 'difftrain[pandas]'",
        ),
    ],
)
def test_a_missing_extra_says_the_command_that_installs_it(tiny, monkeypatch, module, use, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        use(tiny)
    assert str(caught.value) == message


def test_plotting_without_matplotlib_says_the_command_that_installs_it(tiny, monkeypatch, tmp_path, capsys):
    config = tiny(max_iters=1)
    train(config)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"^matplotlib is not installed: pip install 'difftrain\[plot\]'$"):
        plot_run(Path(config.out_dir))
    capsys.readouterr()
    assert main(["plot", config.out_dir]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), f"not enough memory for {2**60} bytes more; ask for less"),
        (lambda: torch.empty(2**62, 8, dtype=torch.uint8), "not enough memory; ask for less at a time"),
        (lambda: [0] * 2**60, "not enough memory; ask for less at a time"),
    ],
)  # fmt: skip
def test_memory_that_cannot_be_had_is_one_line(tiny, monkeypatch, capsys, ask, told):
    from difftrain.sampling import texts

    monkeypatch.setattr(texts, "sample_run", lambda *_: ask())
    assert main(["sample", "run", "--num_samples", "2147483647"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"difftrain: {told}")
    assert err.count("\n") == 1


def test_another_error_of_the_runtime_keeps_its_traceback(monkeypatch):
    from difftrain.sampling import texts

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(texts, "sample_run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["sample", "run"])


def test_an_extra_that_is_there_is_imported_with_its_folders():
    assert import_extra("xml.dom", "xml") is sys.modules["xml.dom"]


def test_every_extra_that_is_asked_for_exists_and_the_command_stands_in_one_place():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (extras,) = (
        {key.value for key in node.value.keys}
        for node in ast.walk(setup)
        if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    asked = {
        node.args[1].value
        for source in sources.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_extra"
    }
    assert asked >= {"completion", "pandas", "plot", "tb", "tok", "wandb"}
    assert asked <= extras
    assert [path for path, source in sources.items() if "pip install" in source] == [PACKAGE / "errors.py"]
