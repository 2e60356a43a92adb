"""Small problems, and contenders made for a test, that the benchmark's tests share."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import contenders
import entries
import loss_checks
import loss_worker
from contenders import Contender
from loss_checks import Judge, verdict_on
from problems import make_problem

UPSTREAMS = loss_worker.UPSTREAMS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels run in the interpreter


def problem_of(kind, dtype=torch.bfloat16, n=70, vocab_size=40, device=DEVICE):
    return make_problem(n, vocab_size, dtype, device, *([16] if kind == "linear" else []))


def logits_contender(loss_of, lacks=""):
    return Contender("sample", "logits", entries.LIBRARY, lambda: loss_of, lacks)


def objection(contender, problem):
    judge = Judge(loss_checks.fitting_problem(problem, contender), UPSTREAMS)
    return verdict_on(contender, contender.make(), judge).objection


def composed(problem, **changes):
    """The whole loss from torch's cross-entropy, with something changed."""
    changed = replace(problem, **changes)
    return contenders.weighted(
        lambda logits, y: F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="none")
    )(changed, 1.0)
