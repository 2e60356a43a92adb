"""Time and memory of the loss beside its peers, on a CUDA GPU.
Takes 8 minutes at most, with --quick 1; --minutes sets another end. Prints a table as it goes, and writes
the files that --json and --plot name.

    python benchmarks/bench_loss.py [--quick] [--vocab V ...] [--rows N] [--linear N,D,V ...] [--dtype bf16]
                                    [--only TEXT ...] [--json FILE] [--resume] [--plot FILE]

Every contender is first held against the reference accumulated in fp64: loss without gradient, loss
and gradients for upstream gradients 1 and 1/8. A wrong one is shown as wrong and not timed. Then:
forward without gradient, and forward + backward with either upstream gradient. The limit is the
bytes that must move (logits read once, for gradients also written once) over the bandwidth of a
device copy measured in the same process; for the linear loss, its matrix products (1, or 3 with
gradients).

A worker process does the jobs. One that crashes, hangs or finds no memory is reported, and the run
goes on. What torch.compile must compile comes last.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from comparison.contenders import CONTENDERS
from comparison.entries import Entry
from comparison.worker import DTYPES, Job, work
from measuring import device
from measuring.arguments import count, linear_shape, user_path
from measuring.environment import environment
from measuring.rehearsal import is_rehearsed
from measuring.supervision import NOT_MEASURED, run_jobs
from reporting.plot_loss import plot_entries, pyplot
from reporting.result_files import ResultError, current_stage, save_stage

LOGITS_SHAPES = [(8192, v) for v in (50304, 50305, 128256, 151936, 262144)]
LOGITS_SHAPES += [(262144, 66)]  # characters: many short rows
LINEAR_SHAPES = [(8192, 768, 50304), (65536, 768, 50304), (8192, 4096, 128256)]
BUDGET_MS, QUICK_BUDGET_MS = 200.0, 50.0  # device time of one measure
JOB_SECONDS = 120.0  # a worker silent for so long hangs; compiling takes some of it


def plan(options: argparse.Namespace) -> list[Job]:
    """The jobs in order: shape by shape, then those that want compiling, since they may take the time.

    Within a shape, contenders that are held against the same loss stand together.
    """
    jobs = []
    budget_ms = 1.0 if is_rehearsed() else QUICK_BUDGET_MS if options.quick else BUDGET_MS
    for is_compiled in (False, True):
        for dtype in options.dtype:
            for shape in shapes_of(options):
                kind = "logits" if len(shape) == 2 else "linear"
                chosen = [c for c in CONTENDERS if (c.kind, c.is_compiled) == (kind, is_compiled)]
                if options.only:
                    chosen = [c for c in chosen if any(text in c.name for text in options.only)]
                chosen.sort(key=lambda c: "no weights" in c.lacks)
                jobs += [Job(shape, dtype, c.name, budget_ms) for c in chosen]
    return jobs


def report(entries: list[Entry], shape: list[int] | None = None) -> str:
    """The table's lines, with a heading wherever the shape is not the one before (``shape``)."""
    lines = []
    for e in entries:
        if e.shape != shape:
            shape = e.shape
            lines += ["", f"{' x '.join(map(str, shape))}, {e.dtype}"]
        name = e.contender + (f" ({e.lacks})" if e.lacks else "")
        if e.ms is None:
            lines.append(f"  {name:42} {e.outcome}")
            continue
        rate = (
            f"{e.times_the_products:6.2f} x products"
            if e.gb_per_s is None
            else f"{e.gb_per_s:7.0f} GB/s {e.percent_of_limit:5.1f} %"
        )
        spread = f"{e.ms:9.3f} ms [{e.ms_20:.3f}, {e.ms_80:.3f}]"
        lines.append(f"  {name:42} {e.measure:34} {spread:32} {rate} {e.peak_mib:9.0f} MiB")
    return "\n".join(lines)


# Command line -------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape of each kind, shorter measurements")
    parser.add_argument("--vocab", nargs="+", type=count, metavar="V", help="these vocabulary sizes alone")
    parser.add_argument("--rows", type=count, metavar="N", help="positions, with --vocab (8192)")
    parser.add_argument(
        "--linear", nargs="*", type=linear_shape, metavar="N,D,V", help="these linear shapes alone"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contenders whose name holds a text")
    parser.add_argument("--minutes", type=float, help="end after this long (8, with --quick 1)")
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="write the results as stage loss of FILE"
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure what FILE does not have of these kernels"
    )
    parser.add_argument("--plot", type=user_path, metavar="FILE.png", help="draw them (needs matplotlib)")
    parser.add_argument("--commit", help="what to record where git cannot tell")
    options = parser.parse_args(arguments)
    if options.rows is not None and not options.vocab:
        parser.error("--rows needs --vocab")
    if options.resume and not options.json:
        parser.error("--resume needs --json")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot must name a .png file, got {options.plot}")
    if options.minutes is None:
        options.minutes = 1.0 if options.quick else 8.0
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    return options


def shapes_of(options: argparse.Namespace) -> list[tuple[int, ...]]:
    """What to measure. Naming shapes of one kind leaves the other kind out."""
    logits = [(options.rows or 8192, v) for v in options.vocab or []]
    if logits or options.linear is not None:
        return logits + (options.linear or [])
    return [LOGITS_SHAPES[0], LINEAR_SHAPES[0]] if options.quick else LOGITS_SHAPES + LINEAR_SHAPES


def measured(options: argparse.Namespace, stage: str, facts: dict[str, str]) -> list[Entry]:
    """What the file that is to be resumed has of the stage already, of the same device and kernels."""
    record = current_stage(options.json, stage, facts) if options.resume else None
    entries = [Entry(**entry) for entry in record["entries"]] if record else []
    return [entry for entry in entries if not entry.outcome.startswith(NOT_MEASURED)]


def main(arguments: list[str] | None = None, stage: str = "loss") -> int:
    """Measure; ``stage`` is what becomes of it in the file that --json names."""
    options = parse(arguments)
    if not device.is_there():
        print("bench_loss.py measures on a CUDA GPU, and torch finds none.", file=sys.stderr)
        return 1
    facts = environment(options.commit)
    for name, value in facts.items():
        print(f"{name}: {value}")
    entries: list[Entry] = []
    seconds: dict[str, float] = {}
    try:
        if options.plot:
            pyplot()  # before minutes are spent
        entries += measured(options, stage, facts)
        done = {(tuple(e.shape), e.dtype, e.contender) for e in entries}
        jobs = [job for job in plan(options) if (job.shape, job.dtype, job.contender) not in done]
        for job, answer, problem in run_jobs(
            work, jobs, job_seconds=JOB_SECONDS, seconds=60 * options.minutes
        ):
            found, seconds[str(job)] = answer or ([job.blank(problem)], 0.0)
            print(report(found, entries[-1].shape if entries else None), flush=True)
            entries += found
            if options.json:
                record = {"entries": [asdict(e) for e in entries], "seconds": seconds}
                save_stage(options.json, stage, record, facts)
        if options.plot:
            title = f"{facts['device']}, {facts['date'][:10]}"
            plot_entries([asdict(e) for e in entries], options.plot, title)
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
