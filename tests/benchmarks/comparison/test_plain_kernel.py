"""The plain cross-entropy that tells what the weights cost: right, and from the loss's own loops."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench_samples import DEVICE, objection, problem_of
from comparison import checks
from comparison.contenders import CONTENDERS
from comparison.plain_kernel import plain_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN


def test_the_plain_kernel_is_a_cross_entropy_with_its_gradient_scaled(monkeypatch):
    problem = problem_of("logits", n=12, vocab_size=4200)
    plain = next(c for c in CONTENDERS if c.name == "plain cross-entropy, our kernel")
    assert objection(plain, problem) == ""
    assert objection(replace(plain, lacks=""), problem).startswith("wrong: loss off by")
    (logits,) = problem.inputs
    loss = plain_cross_entropy(logits, problem.y, -1, upstream_scale=0.5)
    (gradient,) = torch.autograd.grad(
        loss, logits, torch.tensor(0.25, device=DEVICE)
    )  # another than stated
    exact = checks.exact_results(replace(problem, pk=1.0, pm=1.0)).gradients[0]
    torch.testing.assert_close(gradient.float(), exact * 0.25, rtol=1e-2, atol=1e-6)


COMPILE_PLAIN = """
import json, sys
sys.path[:0] = sys.argv[1:]
import bench_codegen, torch
from comparison.plain_kernel import plain_cross_entropy
from measuring.machine_code import read_nvidia
logits = torch.empty(3, 50304, dtype=torch.bfloat16)[:1]
y = torch.zeros(1, dtype=torch.int64)
with bench_codegen.recorded_launches() as launches:
    for wants_gradient in (False, True):
        logits.requires_grad_(wants_gradient)
        plain_cross_entropy(logits, y, -1, upstream_scale=1.0)
figures = []
for kernel, arguments in launches:
    compiled = bench_codegen.compile_launch(kernel, arguments, bench_codegen.TARGETS["sm_90"])
    figures.append(read_nvidia(compiled.asm["cubin"], 16, True))
print(json.dumps(figures))
"""


def test_the_plain_kernel_compiles_to_the_losss_own_loops_without_the_predictions_share():
    root = Path(__file__).resolve().parents[3]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_PLAIN, str(root / "benchmarks"), str(root / "kernels")],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    loss, both = json.loads(done.stdout)
    ours = json.loads((root / "benchmarks/results/codegen_bf16.json").read_text())
    (ours,) = (
        r for r in ours
        if (r["target"], r["vocab_size"], r["kernel"]) == ("sm_90", 50304, "loss_and_gradient")
    )  # fmt: skip
    for figures in (loss, both):
        assert figures["spill_instructions"] == figures["narrow_accesses_in_loops"] == 0
        # Not counting the blocks of maxima saves something, yet the loop stays the same one.
        assert 0.9 * ours["slots_scan"] < figures["slots_scan"] < ours["slots_scan"]
    assert abs(both["slots_grad"] - ours["slots_grad"]) < 0.1
