"""What a whole row costs: instructions per logit and bytes moved, counted while the compiled code runs. No GPU.
Takes about ten seconds of one CPU core for each V. Prints the table, and writes it to the file that --json names.

    python benchmarks/bench_rows.py [--json FILE] [--dtype bf16] [--vocab-size V ...] [--kernel NAME ...]
                                    [--terms NAME] [--capability 90]

Every kernel is launched on one row as Triton's launcher would launch it, and its PTX is executed (``ptx``).
``per_logit`` are the instructions of all warps times 32, over V: what ``bench_codegen.py`` counts of the loops
alone, with what a row does outside them. The row's maximum is neither [MASK] nor the target; in
``answered`` it is the target, where the kernel looks up which of equal maxima came first. PTX is not yet
machine code: in the loops it takes about as many instructions (see NOTES.md).

``narrow`` is the share of the bytes of logits and gradient that accesses of less than 16 bytes move;
``read`` and ``written`` are bytes over V * size of a logit, ``sectors`` 32-byte sectors touched by accesses over
the least that the row could lie in.
"""

from __future__ import annotations

import argparse
import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: the interpreter compiles nothing

import torch
import triton

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from bench_codegen import DTYPES, TERMS, launches, show
from difftrain_kernels.terms import PLAIN, Terms
from measuring.arguments import count, user_path
from ptx.device import Launch, emulated

VOCAB_SIZES = (4097, 5000, 8192, 16385, 32000, 50304, 50305)
ROW_ARGUMENTS = ("logits_ptr", "gradient_ptr")


def execute(
    dtype: torch.dtype, vocab_size: int, *, is_answered: bool, terms: Terms = PLAIN,
    kernels: list[str] | None = None, capability: int = 90,
) -> list[Launch]:  # fmt: skip
    """Every launch over one row of this length, or those of the kernels named, executed."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(vocab_size, generator=generator, dtype=torch.float32)
    row[0] = 9.0 if is_answered else -9.0  # the target's, and [MASK]'s
    recorded = [
        (kernel, given)
        for kernel, given in launches(dtype, vocab_size, terms)
        if any(name in given for name in ROW_ARGUMENTS)
    ]
    tensors = tuple(v for _, given in recorded for v in given.values() if isinstance(v, torch.Tensor))
    for _, given in recorded:
        if "logits_ptr" in given:
            given["logits_ptr"].copy_(row)
    with emulated(capability=capability, overwrites=tensors) as session:
        for kernel, given in recorded:
            if not kernels or short_name(kernel.__name__) in kernels:
                kernel[(1,)](**given)
    return session.launches


def short_name(kernel: str) -> str:
    """A kernel's name as the tables have it."""
    return kernel.strip("_").removesuffix("_kernel")


def figures_of(launch: Launch, vocab_size: int, element_size: int) -> dict:
    """What is counted of one row."""
    row_bytes = vocab_size * element_size
    moved = {"load": 0, "store": 0, "narrow": 0, "sectors": 0}
    for (segment, kind, width, unit), n in launch.traffic.items():
        if segment.split("=")[0] in ROW_ARGUMENTS:
            if unit == "bytes":
                moved[kind] += n
                moved["narrow"] += n if width < 16 else 0
            elif unit == "sectors":
                moved["sectors"] += n
    total = moved["load"] + moved["store"]
    least = -(-row_bytes // 32) * (round(moved["load"] / row_bytes) + round(moved["store"] / row_bytes))
    return {
        "per_logit": round(launch.instructions * 32 / vocab_size, 2),
        "read": round(moved["load"] / row_bytes, 3),
        "written": round(moved["store"] / row_bytes, 3),
        "sectors": round(moved["sectors"] / least, 3) if least else None,
        "narrow": round(moved["narrow"] / total, 3) if total else None,
    }


def measure(dtype_name: str, vocab_size: int, terms: Terms = PLAIN, **options) -> list[dict]:
    """One entry per kernel."""
    dtype, rows = DTYPES[dtype_name], []
    plain = execute(dtype, vocab_size, is_answered=False, terms=terms, **options)
    answered = execute(dtype, vocab_size, is_answered=True, terms=terms, **options)
    for launch, other in zip(plain, answered, strict=True):
        figures = figures_of(launch, vocab_size, dtype.itemsize)
        rows.append(
            {
                "kernel": short_name(launch.kernel),
                "dtype": dtype_name,
                "vocab_size": vocab_size,
                "per_logit": figures.pop("per_logit"),
                "answered": round(other.instructions * 32 / vocab_size, 2),
                **figures,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=user_path, help="write the table as a list of objects")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--vocab-size", nargs="+", type=count, default=list(VOCAB_SIZES))
    parser.add_argument("--kernel", nargs="+", help="such as loss_and_gradient; all by default")
    parser.add_argument("--terms", choices=TERMS, default="plain", help="of the loss; plain by default")
    parser.add_argument("--capability", type=int, default=90, help="of the device, such as 80 or 90")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocab_size in options.vocab_size:
        rows += measure(
            options.dtype, vocab_size, TERMS[options.terms],
            kernels=options.kernel, capability=options.capability,
        )  # fmt: skip
    print(f"torch {torch.__version__}, triton {triton.__version__}, capability {options.capability}")
    show(rows, options.json)


if __name__ == "__main__":
    main()
