"""What the loss should take on a device, before anything is measured: a roofline with named constants.

A call takes, for each of its kernels, what its bytes take at the part of a copy's bandwidth that its tile keeps busy,
or what its instructions take at the device's issue rate, whichever is more, and for each of its launches a launch's
cost. What second reads of a row move, and that part, are the model's by which tiles are chosen (``tile_model.py``).
Instructions are those of the machine code (``results/codegen_bf16.json``). Matrix products, and what
other libraries take, are not predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

from comparison.entries import ACCUMULATED, BOTH, FORWARD, OURS, TIMED, Entry, bytes_moved
from measuring.checkout import ROOT
from reporting.goals import (
    GOALS,
    LOSS,
    NOT_MEASURED,
    NOT_PREDICTED,
    STATED,
    NotMeasured,
    Table,
    evaluate,
)
from reporting.result_files import FOLDER

# By its path: the package beside it imports torch and Triton, which a report does without.
_spec = spec_from_file_location(
    "tile_model", ROOT / "kernels/difftrain_kernels/triton_kernels/tile_model.py"
)
tile_model = module_from_spec(_spec)
_spec.loader.exec_module(tile_model)

COUNTS = FOLDER / "codegen_bf16.json"
SMALL_VOCAB = 4096  # up to here rows are held whole, and nothing is known of the bandwidth
SHAPES = [(8192, v) for v in (50304, 50305, 128256, 151936, 262144)] + [(262144, 66)]
# Microseconds from the end of a kernel to the work of the next where the host is ahead: 3.8 a kernel of 2.9,
# on a V100. NVIDIA's blog, "Getting Started with CUDA Graphs" (2019).
LAUNCH_US = 3.8 - 2.9
# What a copy on the device reaches of the bandwidth on paper: 3.0 of 3.35 TB/s on an H100, 4.3 of 4.8 on an
# H200, both seen with torch 2.11. Taken for other devices too, where nobody has looked.
COPY_SHARE = 0.9


@dataclass(frozen=True)
class Device:
    """``gb_per_s`` on paper, of which ``copy`` is reached; ``clock`` in GHz, ``l2`` in bytes.

    ``threads``: resident on a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
    """

    name: str
    called: str  # a part of the name that the driver gives it
    target: str
    gb_per_s: float
    multiprocessors: int
    clock: float
    l2: float
    threads: int
    source: str

    @property
    def copy(self) -> float:
        """Bytes per second of a copy, read and written."""
        return COPY_SHARE * self.gb_per_s * 1e9

    @property
    def machine(self) -> tile_model.Machine:
        """As the model of tiles asks for it; registers and shared memory as an H100's."""
        return tile_model.Machine(self.multiprocessors, int(self.l2), warps=self.threads // 32)

    @property
    def issue(self) -> float:
        """Instructions that lanes start in a second: four schedulers to a multiprocessor, 32 lanes each.

        Of fp32 an A100 takes half of that; its bytes still take longer.
        """
        return self.multiprocessors * 4 * 32 * self.clock * 1e9


DEVICES = (
    Device(
        "H100 SXM", "H100 80GB HBM3", "sm_90", 3350, 132, 1.98, 50e6, 2048,
        "NVIDIA's H100 datasheet (3.35 TB/s; 67 TFLOP/s in fp32 are 1.98 GHz) and Hopper whitepaper (132, 50 MB)",
    ),
    Device(
        "H200", "H200", "sm_90", 4800, 132, 1.98, 50e6, 2048,
        "NVIDIA's H200 datasheet (4.8 TB/s, 67 TFLOP/s in fp32); the rest is the H100's",
    ),
    Device(
        "A100 80GB SXM", "A100-SXM4-80GB", "sm_80", 2039, 108, 1.41, 40e6, 2048,
        "NVIDIA's A100 datasheet (2039 GB/s) and Ampere whitepaper (108, 1410 MHz, 40 MB)",
    ),
    Device(
        "RTX 4090", "RTX 4090", "sm_89", 1008, 128, 2.52, 72e6, 1536,
        "NVIDIA's Ada whitepaper (1008 GB/s, 128, 2520 MHz, 72 MB)",
    ),
    Device(
        "RTX 5090", "RTX 5090", "sm_120", 1792, 170, 2.407, 96e6, 1536,
        "NVIDIA's RTX Blackwell whitepaper (1792 GB/s, 170, 2407 MHz, 96 MB)",
    ),
)  # fmt: skip
H100 = DEVICES[0]


@dataclass(frozen=True)
class Call:
    """``kernels``: each with how often it reads or writes all logits; ``launches`` with torch's own."""

    name: str
    contender: str
    measures: tuple[str, ...]
    kernels: tuple[tuple[str, int], ...]
    launches: int


CALLS = (
    # The kernel and the mean of the rows.
    Call("forward", LOSS, (FORWARD,), (("loss", 1),), 2),
    # From the second call of a kind on: its upstream gradient is what the last one received, and the kernel of
    # backward finds nothing to do.
    Call("default", LOSS, (BOTH, ACCUMULATED), (("loss_and_gradient", 2),), 3),
    # The gradient in backward.
    Call("not predicted", NOT_PREDICTED, (BOTH, ACCUMULATED), (("loss", 1), ("gradient", 2)), 3),
    # In place of the gradient the check on the device that it is the stated one.
    Call("stated", STATED, (BOTH, ACCUMULATED), (("loss_and_gradient", 2),), 3),
)


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one call; ``floor`` is what a copy of the least bytes takes.

    ``rereads``: the share of second reads of a row that are taken to miss the L2.
    ``is_counted``: the machine code's loops are in it, not the bytes alone.
    """

    ms: float
    floor: float
    rereads: float
    is_counted: bool

    @property
    def percent_of_floor(self) -> float:
        return 100 * self.floor / self.ms


@cache
def _counts() -> list[dict]:
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def counts_of(kernel: str, device: Device, vocab_size: int) -> dict:
    """The machine code's figures of a kernel; those of the largest row below where a size was not compiled.

    Raises:
        NotMeasured: it was not compiled for the device.
    """
    is_aligned = vocab_size % 8 == 0
    names = (f"small_{kernel}",) if vocab_size <= SMALL_VOCAB else (kernel,)
    rows = [r for r in _counts() if r["kernel"] in names and r["target"] == device.target]
    rows = [r for r in rows if r["aligned"] == is_aligned and r["vocab_size"] <= vocab_size] or [
        r for r in rows if r["vocab_size"] == vocab_size
    ]
    if not rows:
        raise NotMeasured(f"{kernel} was not compiled for {device.target} and V = {vocab_size}")
    return max(rows, key=lambda r: r["vocab_size"])


def predict(call: Call, shape: tuple[int, int], device: Device) -> Prediction:
    """One call in bf16.

    Raises:
        NotMeasured: the machine code for the device was not read.
    """
    n, vocab_size = shape
    seconds, rereads, is_counted = call.launches * LAUNCH_US * 1e-6, 0.0, True
    bandwidth = device.copy
    if vocab_size > SMALL_VOCAB:
        tile = tile_model.tiles_by_merit(vocab_size, 2, device.machine)[0]
        bandwidth *= tile_model.used_bandwidth(tile, vocab_size, device.machine)
    for kernel, passes in call.kernels:
        counts = counts_of(kernel, device, vocab_size)
        moved = passes * bytes_moved(n, vocab_size, 2, False)
        slots = [counts[key] for key in ("slots_scan", "slots_grad") if counts[key]]
        is_counted &= bool(slots)
        if len(slots) == 2:
            rereads = 1.0 - tile_model.second_read_hits(tile, 2 * vocab_size, device.machine)
            moved += rereads * bytes_moved(n, vocab_size, 2, False)
        seconds += max(moved / bandwidth, sum(slots) * n * vocab_size / device.issue)
    floor = bytes_moved(n, vocab_size, 2, call.measures != (FORWARD,)) / device.copy
    return Prediction(1e3 * seconds, 1e3 * floor, rereads, is_counted)


def predicted_entries(device: Device) -> Iterator[dict]:
    """The predictions in the form of a results file's entries, to be held against the goals."""
    for shape in SHAPES:
        for call in CALLS:
            try:
                found = predict(call, shape, device)
            except NotMeasured:
                continue
            for measure in call.measures:
                entry = Entry(list(shape), "bf16", call.contender, OURS, "", measure, TIMED, ms=found.ms)
                entry.percent_of_limit = found.percent_of_floor
                yield asdict(entry)


def device_called(name: str) -> Device | None:
    """The device of a results file, by the name that the driver gave it; None where there is no prediction."""
    return next((d for d in DEVICES if d.called in name), None)


# As text ------------------------------------------------------------------------------------------


def cell(call: Call, shape: tuple[int, int], device: Device) -> str:
    """``ms (per cent of the floor)``."""
    found = predict(call, shape, device)
    mark = "" if found.is_counted else "+"
    return f"{found.ms:.3f} ({found.percent_of_floor:.0f} %){mark}"


def goal_of(call: Call, shape: tuple[int, int]) -> str:
    """What is asked of the call's share of the floor."""
    what = {"forward": "forward", "stated": "loss and gradient"}.get(call.name)
    asked = [g for g in GOALS if (g.what, g.shape) == (what, shape) and "limit" in g.unit]
    return f"{asked[0].asked:g} %" if asked else "-"


def table() -> str:
    """Every call and shape on every device whose machine code was read, beside the goals."""
    read = {row["target"] for row in _counts()}
    devices = [device for device in DEVICES if device.target in read]
    head = ["N x V", "call", "goal (H100)", *(device.name for device in devices)]
    rows = [
        [
            " x ".join(map(str, shape)),
            call.name,
            goal_of(call, shape),
            *(cell(call, shape, d) for d in devices),
        ]
        for shape in SHAPES
        for call in CALLS
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def constants() -> str:
    """The constants with their sources."""
    head = [
        "device",
        "GB/s on paper",
        "of a copy",
        "10^12 instructions/s",
        "L2, MB",
        "machine code",
        "source",
    ]
    rows = [
        [
            d.name, f"{d.gb_per_s:g}", f"{d.copy / 1e9:.0f}", f"{d.issue / 1e12:.1f}", f"{d.l2 / 1e6:g}",
            d.target + ("" if d.target in {row["target"] for row in _counts()} else ", not read yet"), d.source,
        ]
        for d in DEVICES
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def goals_text() -> str:
    """One line per goal that a prediction says something about."""
    verdicts = evaluate(GOALS, predicted_entries(H100))
    return "\n".join(f"{v.goal}: predicted {v.outcome}" for v in verdicts if v.state != NOT_MEASURED)


def beside(entries: list[dict], device_name: str) -> str:
    """Measured beside predicted, for each call and shape of a results file; empty where nothing was predicted."""
    device, measured, rows = device_called(device_name), Table(entries), []
    if device is None:
        return ""
    for shape in SHAPES:
        for call in CALLS:
            try:
                entry = measured.entry(shape, call.contender, call.measures[0])
                found = predict(call, shape, device)
            except NotMeasured:
                continue
            share = f"{entry['ms']:.3f} ({entry['percent_of_limit']:.0f} %)"
            rows.append([
                " x ".join(map(str, shape)), call.name, cell(call, shape, device), share, f"{entry['ms'] / found.ms:.2f}"
            ])  # fmt: skip
    if not rows:
        return ""
    head = ["N x V", "call", "predicted, ms (% of the limit)", "measured, ms (% of the limit)", "ratio"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
