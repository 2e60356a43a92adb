"""What the loss kernels compile to: registers, spills, access widths, instructions per logit. No GPU.
Takes fifteen minutes of one CPU core for the whole table, seconds for one target, dtype and V. Prints the
table, and writes it to the file that --json names.

    python benchmarks/bench_codegen.py [--json FILE] [--target sm_90 ...] [--dtype bf16 ...] [--vocab-size V ...]
                                       [--terms NAME] [--kernel NAME ...]

Every kernel is compiled as the launcher would launch it (its launches are recorded, on one row of
contiguous logits), then the machine code is read: for NVIDIA the SASS, for AMD the assembly.

``slots_scan`` and ``slots_grad`` are the instructions in the body of the loop that sums exp2, and
of the loop that stores the gradient, over the logits that one pass of that body takes. What a row
does outside its loops (the target's block, the tail, reductions) is not in them. Kernels that hold
whole rows in registers have no such loop: null. AMD slots are not counted: null.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: the interpreter compiles nothing

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import constexpr

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain_kernels import triton_kernels
from difftrain_kernels.terms import PLAIN, Terms
from measuring.arguments import count, user_path
from measuring.machine_code import int32_address_products, read_amd, read_nvidia

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Small rows (characters), rows of each streamed tile, and rows that start off a 16-byte boundary.
VOCAB_SIZES = (66, 1024, 4096, 8192, 32000, 32001, 50257, 50304, 50305, 128256, 151936, 262144)
# What a loss may have beyond its penalties: each alone, and at once all that should cost no loop anything.
TERMS = {
    "plain": PLAIN,
    "free": Terms(
        token_weights=torch.ones(1), case_weights=torch.ones(3, 3), gate="probability", z_loss=1e-4,
        logit_scale=torch.tensor(0.5), forbid_mask=True, rows=True,
    ),
    "token_weights": Terms(token_weights=torch.ones(1)),
    "case_weights": Terms(case_weights=(0.5,) * 9),
    "case_weights_on_device": Terms(case_weights=torch.ones(3, 3)),
    "gate": Terms(gate="probability"),
    "z_loss": Terms(z_loss=1e-4),
    "logit_scale": Terms(logit_scale=0.5),
    "logit_scale_on_device": Terms(logit_scale=torch.tensor(0.5)),
    "forbid_mask": Terms(forbid_mask=True),
    "rows": Terms(rows=True),
    "softcap": Terms(softcap=30.0),
    "label_smoothing": Terms(label_smoothing=0.1),
    "entropy": Terms(rows=True, entropy=True),
}  # fmt: skip
BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@contextmanager
def recorded_launches():
    """A list that takes (kernel, arguments) of every launch, in whichever file; nothing is launched."""
    found: list[tuple] = []

    def record(kernel, grid):
        return lambda **arguments: found.append((kernel, arguments))

    with mock.patch.object(triton.JITFunction, "__getitem__", record):
        yield found


def launches(dtype: torch.dtype, vocab_size: int, terms: Terms = PLAIN) -> list[tuple]:
    """(kernel, arguments) of every launch that one row of this length can cause."""
    logits = torch.empty(3, vocab_size, dtype=dtype)[:1]
    labels = torch.zeros(1, dtype=torch.int64)
    labelled = (labels, labels, 0, 0.5, 0.5)
    with recorded_launches() as found:
        statistics = triton_kernels.launch_loss(logits, *labelled, terms=terms)
        # As a plain call has them, with a predicted upstream gradient; a stated one compiles to less.
        state, made_for = torch.zeros(5), torch.zeros(1)
        _, gradient = triton_kernels.launch_loss_and_gradient(
            logits, *labelled, upstream=state, made_for_out=made_for, divisor=8.0, terms=terms
        )
        triton_kernels.launch_gradient(
            logits, labels, statistics, torch.ones(()), divisor=8.0, terms=terms, mask_id=0, stated=made_for,
            state=state, gradient_out=gradient,
        )  # fmt: skip
        message = triton_kernels.launch_slice(logits, labels, 0, start=vocab_size, terms=terms)
        messages = message.expand(2, *message.shape)
        triton_kernels.launch_combine(messages, *labelled, vocab_size=2 * vocab_size, terms=terms)
        triton_kernels.launch_case_sums(_of_many_rows(statistics), terms)
        triton_kernels.launch_rescale(gradient, torch.ones(()), stated=2.0)
    return found


def _of_many_rows(statistics: triton_kernels.RowStatistics) -> triton_kernels.RowStatistics:
    """Statistics whose case sums take both levels of the addition."""
    return triton_kernels.RowStatistics(
        *(torch.empty(*part.shape[:-1], 1024).to(part.dtype) for part in statistics)
    )


def compile_launch(kernel, arguments: dict, target: GPUTarget):
    """Compile a recorded launch with the specialisation that Triton's launcher would choose."""
    constants = {p.name for p in kernel.params if p.is_constexpr}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    unaligned = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    constexprs, attributes = {}, {}

    def specialise(value, place: tuple, is_fixed: bool, is_aligned: bool = True):
        """The type of an argument, or of each in a tuple; notes what the compiler may know of it."""
        if isinstance(value, tuple):
            types = [specialise(part, (*place, i), is_fixed) for i, part in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if (
            value is None
            or isinstance(value, constexpr)
            or (not is_fixed and isinstance(value, int) and value == 1)
        ):
            constexprs[place] = value
            return "constexpr"
        is_tensor = isinstance(value, torch.Tensor)
        number = value.data_ptr() if is_tensor else value
        if is_aligned and not is_fixed and isinstance(number, int) and number % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"

    signature = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", arguments[name]
        else:
            signature[name] = specialise(arguments[name], (index,), name in fixed, name not in unaligned)
    warps = arguments["num_warps"]
    if target.backend == "hip":
        warps = max(1, warps // 2)
    options = {"num_warps": warps, "enable_fp_fusion": arguments["enable_fp_fusion"]}
    if target.backend == "cuda" and "maxnreg" in arguments:
        options["maxnreg"] = arguments["maxnreg"]
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes), target=target, options=options
    )


def measure(
    targets: list[str], dtypes: list[str], vocab_sizes: list[int], terms: Terms, kernels: list[str] | None
) -> list[dict]:
    """One entry per kernel (all, or those named), target, dtype and vocabulary."""
    rows = []
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        for vocab_size in vocab_sizes:
            for kernel, arguments in launches(dtype, vocab_size, terms):
                name = kernel.__name__.strip("_").removesuffix("_kernel")
                if kernels and name not in kernels:
                    continue
                for target in targets:
                    compiled = compile_launch(kernel, arguments, TARGETS[target])
                    if "cubin" in compiled.asm:
                        figures = read_nvidia(compiled.asm["cubin"], BITS[dtype], "REPEAT" in arguments)
                    else:
                        figures = read_amd(compiled.asm["amdgcn"])
                    rows.append(
                        {
                            "kernel": name,
                            "target": target,
                            "dtype": dtype_name,
                            "vocab_size": vocab_size,
                            "aligned": vocab_size * dtype.itemsize % 16 == 0,
                            **figures,
                            "int32_address_products": int32_address_products(compiled.asm["ttir"]),
                            "warps": arguments["num_warps"],
                        }
                    )
    return rows


def show(rows: list[dict], file: Path | None) -> None:
    """Print rows of one kind as a table, and write them to the file if there is one."""
    keys = list(rows[0])
    widths = [max(len(k), *(len(str(r[k])) for r in rows)) for k in keys]
    for cells in [keys, *([str(r[k]) for k in keys] for r in rows)]:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    if file:
        file.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=user_path, help="write the table as a list of objects")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--vocab-size", nargs="+", type=count, default=list(VOCAB_SIZES))
    parser.add_argument("--kernel", nargs="+", help="such as loss_and_gradient; all by default")
    parser.add_argument("--terms", choices=TERMS, default="plain", help="of the loss; plain by default")
    options = parser.parse_args()
    rows = measure(options.target, options.dtype, options.vocab_size, TERMS[options.terms], options.kernel)
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    show(rows, options.json)


if __name__ == "__main__":
    main()
