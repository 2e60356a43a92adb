"""Each kernel and each command once: with the packaging, what a very slow machine tests (make test-core)."""

import ast
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from difftrain.cli import COMMANDS
from difftrain.reporting.log import read_metrics
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss
from launch import obey

ROOT = Path(__file__).parent.parent.parent
CORE = {"test_every_kernel_is_launched_and_right", "test_every_command_runs", "test_a_built_wheel_holds"}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that have been launched, compiled or interpreted."""
    jit = pytest.importorskip("triton.runtime.jit")
    names, real = set(), jit.KernelInterface.__getitem__

    def launcher(self, grid):
        names.add(self.fn.__name__)
        return real(self, grid)

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", launcher)
    return names


def all_kernels():
    """Names of all kernels, in whichever file they stand."""
    from triton.runtime.jit import KernelInterface

    modules = [
        m for name, m in sys.modules.items() if f"{name}.".startswith("difftrain_kernels.triton_kernels.")
    ]
    values = [value for module in modules for value in vars(module).values()]
    names = {value.fn.__name__ for value in values if isinstance(value, KernelInterface)}
    return {name for name in names if name.endswith("_kernel")}


@pytest.mark.core
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN
def test_every_kernel_is_launched_and_right(launched, device):
    from difftrain_kernels import triton_kernels
    from loss_problems import random_problem, rows_are

    for family, vocab_size in (("small", 66), ("streamed", 600)):
        with rows_are(family):
            logits, y, x = (t.to(device) for t in random_problem(3, vocab_size, 4, torch.float32, seed=1))
            head = torch.linspace(-1, 1, vocab_size * 8, device=device).view(vocab_size, 8)
            hidden = logits[:, :8].clone()
            for loss_of, inputs in (
                (fused_diffusion_loss, [logits]),
                (partial(fused_diffusion_loss, upstream_prediction=False), [logits]),
                # Stated, so that the gradient is made in forward, and not met: rescaled in backward.
                (partial(fused_diffusion_loss, upstream_scale=0.5), [logits]),
                # With a table whose sums differ from those of nll.
                (partial(fused_diffusion_loss, token_weights=y.abs()), [logits]),
                (fused_linear_diffusion_loss, [hidden, head]),
            ):
                results = []
                for impl in ("triton", "reference"):
                    leaves = [t.clone().requires_grad_() for t in inputs]
                    loss, cases = loss_of(*leaves, y, x, 4, 0.25, 0.5, impl=impl, return_cases=True)
                    (3 * loss).backward()
                    results.append([loss.detach(), cases.counts, cases.nll, *(t.grad for t in leaves)])
                for found, expected in zip(*results, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            # Two slices of the vocabulary: together the loss of the whole.
            half = vocab_size // 2
            messages = [
                triton_kernels.launch_slice(logits[:, start : start + half], y, 4, start=start)
                for start in (0, half)
            ]
            statistics = triton_kernels.launch_combine(
                torch.stack(messages), y, x, 4, 0.25, 0.5, vocab_size=vocab_size
            )
            expected = fused_diffusion_loss(logits, y, x, 4, 0.25, 0.5, reduction="none", impl="reference")
            torch.testing.assert_close(statistics.row_loss, expected, rtol=1e-5, atol=1e-6)
    case = torch.arange(1000, dtype=torch.int32, device=device) % 10  # more than one block of rows
    rows = triton_kernels.RowStatistics(case, torch.ones(6, 1000, dtype=torch.float32, device=device))
    counts, nll_sums, _ = triton_kernels.launch_case_sums(rows)
    assert counts.flatten().tolist() == nll_sums.flatten().tolist() == [100] * 9
    assert launched == all_kernels()
    assert len(launched) > 8


@pytest.mark.core
def test_every_command_runs(tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("red green blue white black\n" * 100)
    model = (
        "--n_layer 1 --n_head 1 --n_embd 8 --block_size 16 --batch_size 4 --device cpu --position learned"
    )
    steps = "--max_iters 3 --eval_iters 2 --eval_batch_size 2 --log_interval 1"
    commands = {
        "prepare": ["prepare", text, "--out", tmp_path / "tokens"],
        "train": ["train", "--data", tmp_path / "tokens", "--out_dir", run, *model.split(), *steps.split()],
        "schedule": ["schedule", run],
        "watch": ["watch", run],
        "report": ["report", run],
        "plot": ["plot", run],
        "evaluate": ["evaluate", run, "--windows", 4, "--draws", 1, "--device", "cpu"],
        "repair": ["repair", run, text, "--check", "--suspect", 1, "--device", "cpu"],
        "sample": ["sample", run, "--prompt", "red ", "--steps", 2, "--device", "cpu"],
        "export": ["export", "nanogpt", run, "--out", tmp_path / "ckpt.pt"],
        "import": ["import", "nanogpt", tmp_path / "ckpt.pt", "--out", tmp_path / "again"],
    }
    assert set(commands) == {module.__name__.split(".")[-1].rstrip("_") for module in COMMANDS}
    written = {}
    for name, words in commands.items():
        code, written[name], err = obey(words)
        assert code == 0, err
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == [0, 1, 2]
    assert (run / "plots" / "curves.png").stat().st_size > 0
    assert "nats a token" in written["evaluate"]
    assert (run / "report.html").stat().st_size > 0
    assert "penalty_keep_mask: by its own options" in written["schedule"]
    assert "finished, 3 steps are done" in written["watch"]
    assert written["sample"].startswith("red ")
    assert "[MASK] keeps its id" in written["import"]


def test_the_core_is_not_empty_and_stands_in_this_room():
    """So that `pytest -m core tests/house` finds all of it without importing the rest of the tests."""
    marked = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "pytest.mark.core" in map(
                ast.unparse, node.decorator_list
            ):
                marked[node.name] = path.parent.name
    assert set(marked.values()) == {"house"}
    for name in CORE:
        assert any(test.startswith(name) for test in marked), f"{name} is not marked as core"
