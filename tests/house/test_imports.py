"""Who may import whom: arrows point one way, and never in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "difftrain"

# What a file of the losses may import besides the standard library.
KERNELS = {
    "__init__": {"cases", "linear_loss", "logits_loss", "parallel_loss", "recipes", "reference", "rows"},
    "cases": {"torch", "term_validation", "validation"},
    "validation": {"torch"},
    "term_validation": {"torch", "validation"},
    "terms": {"torch", "term_validation", "validation"},
    "rows": {"torch", "cases"},
    "recipes": {"torch", "validation"},
    "calls": {"torch", "cases", "rows", "term_validation", "terms", "validation"},
    "reference": {"torch", "calls", "cases", "terms", "validation"},
    "row_blocks": {"torch"},
    "small_vocabulary": {"torch", "numpy", "cases", "terms", "validation"},
    "stepwise_reference": {
        "torch", "cases", "reference", "row_blocks", "small_vocabulary", "terms", "validation",
    },
    "sliced_reference": {"torch", "cases", "reference", "stepwise_reference", "terms", "validation"},
    "triton_kernels": {"torch", "triton"},
    "implementation": {
        "torch", "cases", "reference", "stepwise_reference", "terms", "validation", "triton_kernels",
    },
    "positions": {"torch", "cases", "terms"},
    "weight_sums": {"torch"},
    "grad_accumulation": {"torch"},
    "cpu_loss": {"torch", "calls", "implementation", "small_vocabulary", "validation"},
    "chunks": {
        "torch", "implementation", "positions", "stepwise_reference", "terms", "weight_sums",
    },
    "small_linear_loss": {
        "torch", "calls", "cases", "chunks", "implementation", "positions", "small_vocabulary", "stepwise_reference",
        "validation",
    },
    "upstream_prediction": {"torch"},
    "early_gradient": {"torch", "implementation", "terms", "upstream_prediction"},
    "operators": {
        "torch", "calls", "cases", "early_gradient", "implementation", "reference", "sliced_reference",
        "small_vocabulary", "stepwise_reference", "terms", "upstream_prediction", "validation",
    },
    "linear_operators": {"torch", "calls", "chunks", "implementation", "operators", "small_linear_loss"},
    "logits_loss": {
        "torch", "calls", "cpu_loss", "early_gradient", "implementation", "operators", "reference", "term_validation",
        "upstream_prediction", "validation",
    },
    "linear_loss": {
        "torch", "calls", "chunks", "grad_accumulation", "implementation", "linear_operators", "small_linear_loss",
        "term_validation", "validation",
    },
    "parallel_loss": {
        "torch", "calls", "cases", "implementation", "operators", "reference", "sliced_reference", "validation",
    },
}  # fmt: skip
# The folder triton_kernels: each file also torch, triton and the terms; nothing else outside the folder.
TRITON_KERNELS = {
    "__init__": {
        "case_sums",
        "device",
        "gradient",
        "loss",
        "rescale",
        "row_statistics",
        "slices",
        "tiles",
    },
    "tile_model": set(),
    "tiles": {"tile_model"},
    "spacing": set(),
    "scores": set(),
    "weights": {"spacing"},
    "device": {"weights"},
    "row_statistics": {"scores", "weights"},
    "term_arguments": {"row_statistics", "spacing"},
    "blocks": {"spacing"},
    "first_maximum": {"blocks"},
    "streamed_rows": {"blocks", "first_maximum", "row_statistics", "scores", "weights"},
    "small_rows": {"row_statistics", "scores", "spacing", "weights"},
    "upstream": set(),
    "gradient": {
        "blocks", "device", "row_statistics", "scores", "small_rows", "spacing", "streamed_rows", "term_arguments",
        "tiles", "upstream", "weights",
    },
    "loss": {
        "blocks", "device", "gradient", "row_statistics", "scores", "small_rows", "spacing", "streamed_rows",
        "term_arguments", "tiles", "upstream", "weights",
    },
    "slices": {
        "blocks", "device", "row_statistics", "scores", "small_rows", "spacing", "streamed_rows", "term_arguments",
        "tiles", "weights",
    },
    "case_sums": {"device", "row_statistics", "term_arguments", "tiles", "weights"},
    "rescale": {"device", "spacing", "tiles"},
}  # fmt: skip

# The trainer's rooms in the order of the data's way; each with the rooms below it and the libraries that it may import.
TRAINER = {
    "errors": set(),
    "appearing": {"errors"},
    "progress": {"tqdm"},
    "config": {"errors", "tomli"},
    "schedule": {"config", "torch"},  # torch: a compiled step reads its penalties from tensors
    "data": {
        "appearing", "errors", "progress", "config", "numpy", "pyarrow", "tiktoken", "tokenizers", "torch", "zstandard",
    },
    "rotary": {"torch"},
    "model": {"config", "rotary", "torch"},
    "runtime": {"errors", "progress", "config", "torch"},
    "parallel": {"config", "model", "runtime", "torch"},
    "loss": {"config", "data", "runtime", "difftrain_kernels", "torch"},
    "reporting": {
        "appearing", "errors", "progress", "config", "schedule", "difftrain_kernels", "matplotlib", "numpy", "pandas", "torch",
        "wandb",
    },
    "checkpoints": {
        "appearing", "errors", "config", "data", "model", "runtime", "parallel", "safetensors", "torch",
    },
    "run": {"errors", "config", "reporting", "checkpoints"},
    "evaluation": {
        "errors", "progress", "config", "schedule", "data", "runtime", "loss", "checkpoints", "difftrain_kernels",
        "numpy", "torch",
    },
    "sampling": {
        "appearing", "errors", "progress", "config", "schedule", "data", "model", "runtime", "loss", "reporting", "checkpoints",
        "evaluation", "numpy", "torch", "PIL", "matplotlib",
    },
    "exchange": {"appearing", "errors", "config", "data", "rotary", "model", "loss", "reporting", "checkpoints", "safetensors", "torch", "transformers"},
    "hf": {
        "errors", "config", "schedule", "data", "loss", "difftrain_kernels", "numpy", "torch", "transformers", "accelerate",
    },
    "training": {
        "appearing", "errors", "progress", "config", "schedule", "data", "model", "runtime", "parallel", "loss", "evaluation",
        "reporting", "checkpoints", "exchange", "run", "difftrain_kernels", "torch", "tqdm",
    },
    "cli": {
        "errors", "progress", "config", "data", "evaluation", "exchange", "reporting", "runtime", "sampling",
        "training", "shtab",
    },
    "hf_kernel": {"errors", "config"},
    "__init__": {"errors", "config", "schedule", "run", "sampling", "training", "difftrain_kernels"},
    "__main__": {"cli"},
}  # fmt: skip


def names_imported(path):
    """Names a file of the losses imports, relative ones without their dot, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return names


def allowed(name, permitted):
    return name.split(".")[0] in sys.stdlib_module_names or any(
        name == p or name.startswith(p + ".") for p in permitted
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels/difftrain_kernels").glob("*.py")), ids=lambda p: p.stem
)
def test_kernels_follow_the_import_table(path):
    assert path.stem in KERNELS, "a new file needs its row in the table"
    assert {n for n in names_imported(path) if not allowed(n, KERNELS[path.stem])} == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels/difftrain_kernels/triton_kernels").rglob("*.py")), ids=lambda p: p.stem
)
def test_the_triton_folder_follows_its_import_table(path):
    """The kernels and the reference never meet: a shared mistake would hide itself."""
    assert path.stem in TRITON_KERNELS, "a new file needs its row in the table"
    permitted = TRITON_KERNELS[path.stem] | {"torch", "triton", "terms"}
    assert {n for n in names_imported(path) if not allowed(n, permitted)} == set()


@pytest.mark.parametrize("table", [KERNELS, TRITON_KERNELS], ids=["package", "triton_kernels"])
def test_imports_run_in_no_circle(table):
    TopologicalSorter(table).prepare()


def test_triton_is_imported_in_one_folder_alone_and_late():
    folder = ROOT / "kernels/difftrain_kernels"
    importers = [p.relative_to(folder) for p in folder.rglob("*.py") if "triton" in names_imported(p)]
    assert {p.parts[0] for p in importers} == {"triton_kernels"}
    for path in folder.glob("*.py"):
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        names = {
            alias.name for node in top_level if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert "triton_kernels" not in names, path


def test_nobody_imports_tests_or_benchmarks():
    # Benchmarks name their commands and rooms without a package before them.
    parts = {p.stem for p in (ROOT / "benchmarks").iterdir()}
    for folder, bad in (("kernels", parts), ("difftrain", parts), ("benchmarks", set())):
        for path in (ROOT / folder).rglob("*.py"):
            names = {n.split(".")[0] for n in names_imported(path)}
            assert not names & {"tests", "benchmarks", "oracle", "conftest", *bad}, path


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
