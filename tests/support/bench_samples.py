"""Small problems, and contenders made for a test, that the benchmark's tests share."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from comparison import checks, contenders, entries, worker
from comparison.checks import Judge, verdict_on
from comparison.contenders import Contender
from comparison.problems import make_problem

UPSTREAMS = worker.UPSTREAMS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels run in the interpreter


def problem_of(kind, dtype=torch.bfloat16, n=70, vocab_size=40, device=DEVICE):
    return make_problem(n, vocab_size, dtype, device, *([16] if kind == "linear" else []))


def logits_contender(loss_of, lacks=""):
    return Contender("sample", "logits", entries.LIBRARY, lambda: loss_of, lacks)


def objection(contender, problem):
    judge = Judge(checks.fitting_problem(problem, contender), UPSTREAMS)
    return verdict_on(contender, contender.make(), judge).objection


def composed(problem, **changes):
    """The whole loss from torch's cross-entropy, with something changed."""
    changed = replace(problem, **changes)
    return contenders.weighted(
        lambda logits, y: F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="none")
    )(changed, 1.0)


def entry_of(kind, **changes):
    shape = [8, 10] if kind == "logits" else [70, 16, 40]
    values = {"dtype": "bf16", "contender": "sample", "family": "ours", "lacks": "", "ms": 2.0}
    return entries.Entry(
        shape, **(values | {"measure": entries.BOTH, "outcome": entries.TIMED, "peak_mib": 7.0} | changes)
    )
