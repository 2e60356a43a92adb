"""Every contender that is installed computes the loss it claims."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from bench_samples import DEVICE, UPSTREAMS, problem_of
from comparison import contenders, entries
from comparison.checks import Judge, verdict_on
from comparison.contenders import CONTENDERS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

# Compiling takes minutes on a CPU; that contender calls the reference.
EAGER = [c for c in CONTENDERS if not c.is_compiled]


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_every_installed_contender_is_right(kind, dtype, impl, monkeypatch):
    for name in ("fused_diffusion_loss", "fused_linear_diffusion_loss"):
        monkeypatch.setattr(contenders, name, partial(getattr(contenders, name), impl=impl))
    problem = problem_of(kind, dtype)
    judges = [Judge(p, UPSTREAMS) for p in (problem, replace(problem, pk=1.0, pm=1.0))]
    for contender in EAGER:
        if contender.kind != kind or contender.family == entries.LIBRARY:
            continue
        judge = judges[entries.NO_WEIGHTS in contender.lacks]
        try:
            loss_of = contender.make()
        except ImportError:
            assert contender.name == "torch linear_cross_entropy"  # from torch 2.13
            continue
        found = verdict_on(contender, loss_of, judge)
        if contender.name == "plain cross-entropy, our kernel":
            assert found.objection.startswith("failed: NotImplementedError: streamed rows alone")
        else:
            assert found.objection == "", contender.name
            runs_reference = impl == "auto" and DEVICE == "cpu"
            assert found.overwrites == ("over the logits" in contender.name and not runs_reference)
