"""Who may import whom in the trainer: arrows point down the data's way, and never in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "difftrain"

# Rooms in the order of the data's way; each with the rooms below it and the libraries that it may import.
TRAINER = {
    "errors": set(),
    "config": {"errors", "tomli"},
    "schedule": {"config", "torch"},  # torch: a compiled step reads its penalties from tensors
    "data": {"errors", "config", "numpy", "tiktoken", "tokenizers", "torch"},
    "model": {"config", "torch"},
    "runtime": {"errors", "config", "torch"},
    "parallel": {"config", "model", "runtime", "torch"},
    "loss": {"config", "runtime", "difftrain_kernels", "torch"},
    "evaluate": {"config", "data", "runtime", "loss", "difftrain_kernels", "torch"},
    "reporting": {"errors", "config", "schedule", "difftrain_kernels", "matplotlib", "torch", "wandb"},
    "checkpoints": {
        "errors", "config", "data", "model", "runtime", "parallel", "safetensors", "torch",
    },
    "sampling": {"errors", "config", "data", "runtime", "reporting", "checkpoints", "torch"},
    "training": {
        "errors", "config", "schedule", "data", "model", "runtime", "parallel", "loss", "evaluate",
        "reporting", "checkpoints", "difftrain_kernels", "torch", "tqdm",
    },
    "cli": {"errors", "config", "data", "reporting", "sampling", "training", "shtab"},
    "hf_kernel": set(),
    "__init__": {"errors", "config", "schedule", "difftrain_kernels"},
    "__main__": {"cli"},
}  # fmt: skip


def module_of(path):
    """The dotted name of a file of the package, such as ``difftrain.data.corpus``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(path):
    """The modules a file imports, at any depth of its code; ``from package import module`` is the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_extra":
            found.add(node.args[0].value)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_of(path): path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_each_file_imports_only_what_its_room_may(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert room in TRAINER, "a new room needs its row in the table"
    for name in imports_of(path):
        top, *below = name.split(".")
        if top in sys.stdlib_module_names or name == "difftrain":  # that is its __version__
            continue
        imported = below[0] if top == "difftrain" else top
        assert imported in TRAINER[room] or imported == room, f"{room} imports {name}"


def test_the_rooms_stand_in_an_order_in_which_none_imports_a_later_one():
    rooms = list(TRAINER)
    for i, (room, permitted) in enumerate(TRAINER.items()):
        later = permitted & set(rooms[i + 1 :])
        assert not later, f"{room} may import {later}, which stands below it in the table"


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imports_of(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())
