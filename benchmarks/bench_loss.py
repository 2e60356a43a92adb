"""Time and memory of the loss beside its peers, on a CUDA GPU.

    python benchmarks/bench_loss.py [--quick] [--vocab V ...] [--rows N] [--linear N,D,V ...] [--dtype bf16]
                                    [--json FILE]

Every contender is first held against the reference accumulated in fp64, value and gradients, for
upstream gradients 1 and 1/8; a wrong one is shown as wrong and not timed. Then: forward without
gradient, and forward + backward with either upstream gradient. The limit is the bytes that must
move (logits read once, for gradients also written once) over the bandwidth of a device copy
measured in the same process; for the linear loss, its matrix products (1, or 3 with gradients).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch
from contenders import CONTENDERS, Contender, Problem, make_problem
from loss_checks import objections

HERE = Path(__file__).resolve().parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The last is few, long rows' opposite: characters.
LOGITS_SHAPES = [(8192, v) for v in (50304, 50305, 128256, 151936, 262144)] + [(262144, 66)]
LINEAR_SHAPES = [(8192, 768, 50304), (65536, 768, 50304), (8192, 4096, 128256)]
UPSTREAMS = (1.0, 0.125)
MEASURES = (
    ("forward", None),
    ("forward + backward, upstream 1", 1.0),
    ("forward + backward, upstream 1/8", 0.125),
)


# Models -------------------------------------------------------------------------------------------


def bytes_moved(n: int, vocab_size: int, itemsize: int, with_gradient: bool) -> int:
    """The least that must move: the logits read once, and their gradient written once."""
    return n * vocab_size * itemsize * (2 if with_gradient else 1)


# Measuring ----------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One line of the table. Times in ms, memory in MiB above the inputs."""

    shape: list[int]
    dtype: str
    contender: str
    lacks: str
    measure: str
    outcome: str  # "timed", or why not
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    peak_mib: float | None = None
    gb_per_s: float | None = None
    percent_of_limit: float | None = None
    times_the_products: float | None = None


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def cuda_ms(call: Callable[[], object]) -> float:
    """One call between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_calls(
    calls: list[Callable], budget_ms: float, clock: Callable = cuda_ms
) -> tuple[float, float, float]:
    """Quantiles over the calls in turn, after two rounds to warm up, for about ``budget_ms``."""
    for call in calls:
        call()
    first = max(clock(call) for call in calls)
    count = min(200, max(5, math.ceil(budget_ms / max(first, 1e-3))))
    return quantiles([clock(calls[i % len(calls)]) for i in range(count)])


def copies_beyond_cache(nbytes: int, cache_bytes: int) -> int:
    """How many inputs to take in turn, so that none is in the cache when it comes up again."""
    return max(2, math.ceil(2 * cache_bytes / nbytes))


def calls_of(loss_of, problems: list[Problem], scale: float | None) -> list[Callable]:
    """One call per problem: the loss alone, or the loss and its gradients."""

    def forward(problem):
        with torch.no_grad():
            loss_of(problem, 1.0)

    def both(problem):
        torch.autograd.grad(loss_of(problem, scale), problem.inputs, upstream)

    upstream = None if scale is None else torch.full((), scale, device=problems[0].y.device)
    return [partial(forward if scale is None else both, problem) for problem in problems]


def peak_mib(call: Callable) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(budget_ms: float) -> float:
    """Bytes per second that a copy of 1 GiB on the device reads and writes."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * 2**30 / (time_calls([lambda: target.copy_(source)], budget_ms)[0] / 1e3)


def product_ms(problem: Problem, budget_ms: float) -> dict[bool, float]:
    """Time of the plain products of a linear head: the logits alone, and with both gradients."""
    hidden, weight = (t.detach() for t in problem.inputs)
    logits = hidden @ weight.t()
    alone = time_calls([lambda: torch.mm(hidden, weight.t(), out=logits)], budget_ms)[0]
    rest = time_calls([lambda: (logits @ weight, logits.t() @ hidden)], budget_ms)[0]
    return {False: alone, True: alone + rest}


def add_rates(entry: Entry, problem: Problem, bandwidth: float, products: dict[bool, float]) -> None:
    """Fill in what follows from an entry's time."""
    with_gradient = entry.measure != MEASURES[0][0]
    if problem.kind == "logits":
        (logits,) = problem.inputs
        moved = bytes_moved(*logits.shape, logits.element_size(), with_gradient)
        entry.gb_per_s = moved / entry.ms / 1e6
        entry.percent_of_limit = 100 * moved / bandwidth / (entry.ms / 1e3)
    else:
        entry.times_the_products = entry.ms / products[with_gradient]


def compare(
    shape: tuple, dtype_name: str, contenders: list[Contender], bandwidth: float, budget_ms: float
) -> list[Entry]:
    """All contenders on one shape, (N, V) or (N, D, V): first each is checked, then those that are right are timed."""
    n, *width, vocab_size = shape
    problem = make_problem(n, vocab_size, DTYPES[dtype_name], "cuda", *width)
    found = objections(problem, contenders, UPSTREAMS)
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    n_copies = copies_beyond_cache(sum(t.nbytes for t in problem.inputs), cache)
    problems = [problem, *(problem.copy() for _ in range(n_copies - 1))]
    products = product_ms(problem, budget_ms) if problem.kind == "linear" else {}
    entries = []
    for contender, objection in zip(contenders, found, strict=True):
        blank = Entry(list(shape), dtype_name, contender.name, contender.lacks, "", objection)
        timed = [blank] if objection else measure(contender, blank, problems, budget_ms)
        for entry in timed:
            if entry.ms is not None:
                add_rates(entry, problem, bandwidth, products)
        entries += timed
    return entries


def measure(contender: Contender, blank: Entry, problems: list[Problem], budget_ms: float) -> list[Entry]:
    """One entry per measure, or one that says why there is none."""
    try:
        loss_of = contender.make()
        entries = []
        for name, scale in MEASURES:
            calls = calls_of(loss_of, problems, scale)
            middle, low, high = time_calls(calls, budget_ms)
            figures = {"ms": middle, "ms_20": low, "ms_80": high, "peak_mib": peak_mib(calls[0])}
            entries.append(replace(blank, measure=name, outcome="timed", **figures))
        return entries
    except torch.OutOfMemoryError:
        return [replace(blank, outcome="out of memory")]


# Reporting ----------------------------------------------------------------------------------------


def report(entries: list[Entry]) -> str:
    """The table, one block per shape."""
    lines, shape = [], None
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


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    """What the figures depend on."""
    import triton

    changed = (
        "" if _output("git", "status", "--porcelain", "--untracked-files=no") == "" else " with changes"
    )
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[
            0
        ],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _output("git", "rev-parse", "--short", "HEAD") + changed,
    }


def shape_of(text: str) -> tuple[int, ...]:
    shape = tuple(int(part) for part in text.split(","))
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected N,D,V, got {text}")
    return shape


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape of each kind, shorter measurements")
    parser.add_argument("--vocab", nargs="+", type=int, metavar="V", help="these vocabulary sizes alone")
    parser.add_argument("--rows", type=int, metavar="N", help="positions, with --vocab (8192)")
    parser.add_argument(
        "--linear", nargs="*", type=shape_of, metavar="N,D,V", help="these linear shapes alone"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and entries")
    options = parser.parse_args(arguments)
    if options.rows is not None and not options.vocab:
        parser.error("--rows needs --vocab")
    return options


def shapes_of(options: argparse.Namespace) -> list[tuple[int, ...]]:
    """What to measure. Naming shapes of one kind leaves the other kind out."""
    logits = [(options.rows or 8192, v) for v in options.vocab or []]
    if logits or options.linear is not None:
        return logits + (options.linear or [])
    return [LOGITS_SHAPES[0], LINEAR_SHAPES[0]] if options.quick else LOGITS_SHAPES + LINEAR_SHAPES


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("bench_loss.py measures on a CUDA GPU, and torch finds none.", file=sys.stderr)
        return 1
    budget_ms = 50.0 if options.quick else 200.0
    facts = environment()
    for name, value in facts.items():
        print(f"{name}: {value}")
    bandwidth = copy_bandwidth(budget_ms)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    entries = []
    for dtype_name in options.dtype:
        for shape in shapes_of(options):
            kind = "logits" if len(shape) == 2 else "linear"
            found = compare(
                shape, dtype_name, [c for c in CONTENDERS if c.kind == kind], bandwidth, budget_ms
            )
            print(report(found), flush=True)
            entries += found
    if options.json:
        result = {
            "environment": facts,
            "copy_gb_per_s": bandwidth / 1e9,
            "entries": [asdict(e) for e in entries],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
