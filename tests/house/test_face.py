"""The public names: a list that is written down here, so that adding to it is a decision."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import difftrain
import difftrain_kernels

ROOT = Path(__file__).parent.parent.parent
LOSSES = [
    "CaseTable",
    "RowOutputs",
    "diffusion_loss_reference",
    "fused_diffusion_loss",
    "fused_linear_diffusion_loss",
    "recipes",
    "vocab_parallel_diffusion_loss",
]
FACE = sorted(
    [
        *LOSSES,
        "Config",
        "PenaltyTensors",
        "Run",
        "TrainingFailed",
        "UserError",
        "__version__",
        "learning_rate",
        "load",
        "masking_penalties",
        "train",
    ]
)


@pytest.mark.parametrize(("package", "names"), [(difftrain, FACE), (difftrain_kernels, LOSSES)])
def test_the_public_names_are_those_on_the_list_and_sorted(package, names):
    assert package.__all__ == names
    assert set(names) <= set(dir(package))
    assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", [name for name in FACE if name != "__version__"])
def test_each_name_is_the_one_of_its_home(name):
    value = getattr(difftrain, name)
    if name == "recipes":  # a module
        assert value is difftrain_kernels.recipes
        return
    assert getattr(importlib.import_module(value.__module__), name) is value
    if name in LOSSES:
        assert getattr(difftrain_kernels, name) is value


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="no_such_name"):
        difftrain.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "use",
    [
        "import difftrain; difftrain.__all__; dir(difftrain)",
        "from difftrain import Config; Config()",
        "from difftrain.cli import main; main(['--help'])",
        "from difftrain.cli import main; main(['train', '--help'])",
        "from difftrain.cli import main; main([])",
        "from difftrain.cli import main; main(['--version'])",
        "from difftrain.cli import main; main(['--print-completion', 'bash'])",
        "from difftrain.cli import main; main(['train', '--no_such_option', '1'])",
    ],
)
def test_what_needs_no_torch_does_not_import_it(use):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
try:
    {use}
except SystemExit:
    pass
heavy = {{"torch", "numpy", "triton", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
