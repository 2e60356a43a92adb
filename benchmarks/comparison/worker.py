"""The process that checks and times contenders, one job after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection

import torch

from comparison.checks import Judge, failure, fitting_problem, verdict_on
from comparison.contenders import CONTENDERS, Contender, Loss
from comparison.entries import MEASURES, NO_WEIGHTS, TIMED, Entry, add_rates
from comparison.problems import Problem, make_problem
from measuring import device
from measuring.supervision import RESTART
from measuring.timing import (
    Call,
    copies_beyond_cache,
    copy_bandwidth,
    peak_mib,
    product_ms,
    quantiles,
    time_calls,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UPSTREAMS = tuple(scale for scale in MEASURES.values() if scale is not None)


@dataclass(frozen=True)
class Job:
    """One contender on one shape: (N, V), or (N, D, V) for the linear losses."""

    shape: tuple[int, ...]
    dtype: str
    contender: str
    budget_ms: float = 200.0  # device time for each measure

    @property
    def kind(self) -> str:
        return "logits" if len(self.shape) == 2 else "linear"

    def blank(self, outcome: str) -> Entry:
        """An entry without a time."""
        contender = find_contender(self)
        return Entry(list(self.shape), self.dtype, self.contender, contender.family, contender.lacks, "", outcome)  # fmt: skip

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))} {self.dtype}, {self.contender}"


def find_contender(job: Job) -> Contender:
    return next(c for c in CONTENDERS if (c.kind, c.name) == (job.kind, job.contender))


def calls_of(loss_of: Loss, problems: list[Problem], scale: float | None, source: Problem | None) -> list[Call]:  # fmt: skip
    """One call per problem: the loss alone, or the loss and its gradients.

    Args:
        source: for a loss that writes over its inputs, where their values are taken from again.
    """

    def forward(problem: Problem) -> None:
        with torch.no_grad():
            loss_of(problem, 1.0)

    def both(problem: Problem) -> None:
        torch.autograd.grad(loss_of(problem, scale), problem.inputs, upstream)

    if scale is None:
        problems, run = [p.without_gradient() for p in problems], forward
    else:
        upstream, run = torch.full((), scale, device=problems[0].y.device), both
    return [Call(partial(run, p), partial(p.restore, source) if source else None) for p in problems]


class ShapeBench:
    """One shape's inputs and limits; one judge at a time, since it holds gradients of full size."""

    def __init__(self, job: Job, where: str | None = None):
        n, *width, vocab_size = job.shape
        self.problem = make_problem(n, vocab_size, DTYPES[job.dtype], where or device.kind(), *width)
        self.judge, self.judges_plain = None, None
        self.products: dict[bool, float] = {}

    def entries(self, job: Job, copy_gb_per_s: float) -> list[Entry]:
        """One entry per measure, or one that says why there is none."""
        contender = find_contender(job)
        is_plain = NO_WEIGHTS in contender.lacks
        if self.judges_plain != is_plain:
            self.judge = self.judges_plain = None  # free it before the next one is made
            self.judge = Judge(fitting_problem(self.problem, contender), UPSTREAMS)
            self.judges_plain = is_plain
        loss_of = contender.make()
        verdict = verdict_on(contender, loss_of, self.judge)
        if verdict.objection:
            return [job.blank(verdict.objection)]
        if self.problem.kind == "linear" and not self.products:
            self.products = product_ms(*self.problem.inputs, job.budget_ms)
        found = self._timed(job, loss_of, verdict.overwrites)
        for entry in found:
            add_rates(entry, copy_gb_per_s, self.products)
        return found

    def _timed(self, job: Job, loss_of: Loss, overwrites: bool) -> list[Entry]:
        inputs = self.problem.inputs
        nbytes = sum(t.nbytes for t in inputs)
        n_copies = copies_beyond_cache(nbytes, _cache_bytes())
        # The judge's problem itself stays as it is.
        problems = [self.problem.copy() for _ in range(n_copies)]
        source = self.problem if overwrites else None
        found = []
        for measure, scale in MEASURES.items():
            calls = calls_of(loss_of, problems, scale, source)
            times = time_calls(calls, job.budget_ms)
            middle, low, high = quantiles(times)
            figures = {"ms": middle, "ms_20": low, "ms_80": high, "samples": len(times)}
            figures["peak_mib"] = peak_mib(calls[0].run)
            figures["gradients_mib"] = 0.0 if scale is None else nbytes / 2**20
            found.append(replace(job.blank(TIMED), measure=measure, **figures))
        return found


def _cache_bytes() -> int:
    return device.cache_bytes()


def work(jobs: list[Job], connection: Connection) -> None:
    """Send (entries, seconds) for each job in turn; RESTART where the device no longer answers."""
    copy_gb_per_s = copy_bandwidth(jobs[0].budget_ms) / 1e9
    bench, bench_of = None, None
    for job in jobs:
        began = time.perf_counter()
        try:
            if bench_of != (job.shape, job.dtype):
                bench = bench_of = None
                device.empty_cache()
                torch._dynamo.reset()
                bench, bench_of = ShapeBench(job), (job.shape, job.dtype)
            found = bench.entries(job, copy_gb_per_s)
        except Exception as error:
            found = [job.blank(failure(error))]
        connection.send((found, time.perf_counter() - began))
        device.empty_cache()
        try:
            device.synchronize()
        except Exception:  # an illegal access leaves a context in which every later call fails
            connection.send(RESTART)
            return
