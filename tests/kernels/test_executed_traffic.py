"""Bytes that the compiled kernels move, counted while they run, against the model in benchmarks/NOTES.md."""

import pytest
import torch

from difftrain_kernels.triton_kernels import tiles
from executed import run_clean
from kernel_terms import WAYS, launch
from loss_problems import random_problem, strided_copy

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.xdist_group("executed, streamed"),
]
N, BLOCK = 3, 4096  # logits of a streamed block of bf16
ROWS = ("logits_ptr", "gradient_ptr")


def launches(vocab_size, way):
    """What the launches over rows did, by the kernel's name; every row counts."""
    mask_id = min(9, vocab_size - 1)
    rows, y, x = random_problem(N, vocab_size, mask_id, torch.bfloat16, seed=vocab_size)
    logits, _ = strided_copy(rows)
    found = run_clean(
        launch, logits=logits, y=y.clamp(min=0), x=x, mask_id=mask_id, pk=0.25, pm=0.5, way=way, upstream=0.5,
        divisor=4.0, seeds=(1,), overwrites=("logits",) if way.endswith("over the logits") else (),
    )  # fmt: skip
    return {run.kernel: run for run in found.launches}


def touched(run):
    """Bytes and sectors read, and bytes and sectors written, of logits and gradient."""
    parts = [figures for name, figures in run.touched.items() if name.split("=")[0] in ROWS]
    return tuple(sum(column) for column in zip(*parts, strict=True))


def moved(run, kind, *, narrower_than=1 << 30):
    """Bytes that the accesses to logits and gradient moved."""
    return sum(
        n for (name, way, width, unit), n in run.traffic.items()
        if name.split("=")[0] in ROWS and way == kind and unit == "bytes" and width < narrower_than
    )  # fmt: skip


def check(vocab_size, *, with_loss):
    """2NV bytes of bf16 for the loss, 4NV where the gradient is made with it, 6NV in all where it is made after it."""
    small = vocab_size <= tiles.SMALL_VOCAB
    row_bytes = N * vocab_size * 2
    sectors = -(-row_bytes // 32)
    runs = launches(vocab_size, WAYS[2] if with_loss else WAYS[0])
    # (kernel, its reads and writes in NV, how often a row is read in blocks)
    plan = {"loss_and_gradient": (1, 1, 2)} if with_loss else {"loss": (1, 0, 1), "gradient": (1, 1, 1)}
    for name, (reads, writes, passes) in plan.items():
        run = runs[f"_small_{name}_kernel" if small else f"_{name}_kernel"]
        bytes_read, sectors_read, bytes_written, sectors_written = touched(run)
        assert (bytes_read, bytes_written) == (reads * row_bytes, writes * row_bytes)
        # Of memory nothing but the rows is read, and no sector that holds none of them.
        assert sectors <= sectors_read <= sectors + 1
        assert writes * sectors <= sectors_written <= writes * (sectors + 1)
        if not small:
            # The whole blocks in accesses of 16 bytes; the rest, and the target's and [MASK]'s logits, may be narrower.
            edge = N * 2 * (vocab_size % BLOCK + BLOCK * (vocab_size * 2 % 16 != 0) + 64)
            # A row whose answer hangs on where its maximum came first has one block more read.
            assert moved(run, "load", narrower_than=16) <= (passes + 1) * edge
            assert moved(run, "store", narrower_than=16) <= edge
        # What is read twice is read from the cache: the second pass over a row, a block that is searched.
        assert moved(run, "load") <= passes * row_bytes + N * (2 * 2 * BLOCK + 64)
        assert row_bytes * writes <= moved(run, "store") <= row_bytes * writes + N * 2 * 512


@pytest.mark.parametrize("vocab_size", [66, 4097])
def test_rows_are_read_once_and_written_once(vocab_size):
    check(vocab_size, with_loss=True)
    check(vocab_size, with_loss=False)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [1, 67, 4096, 5000, 12289, 16385, 50257, 50304])
def test_rows_of_other_lengths_too(vocab_size):
    check(vocab_size, with_loss=True)
    check(vocab_size, with_loss=False)
