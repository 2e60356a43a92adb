"""Seed small faults in the loss kernels and the trainer, one at a time, and see that the tests notice each.

    python tests/mutants.py [NUMBER ...]

Not part of the default run (about twenty minutes on one core). Every fault is a replacement of text
in a copy of the repository; the run stops at the first test that fails. Exit code 1 if a fault
survives, or if its text is no longer there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trainer_mutants

ROOT = Path(__file__).resolve().parent.parent
TILES, WEIGHTS, ROW_STATISTICS, BLOCKS, STREAMED_ROWS, SMALL_ROWS, LOSS, GRADIENT, SLICES, CASE_SUMS = TRITON = [
    f"kernels/difftrain_kernels/triton_kernels/{name}.py"
    for name in (
        "tiles", "weights", "row_statistics", "blocks", "streamed_rows", "small_rows", "loss", "gradient",
        "slices", "case_sums",
    )
]  # fmt: skip
LOGITS_LOSS = "kernels/difftrain_kernels/logits_loss.py"
PARALLEL = "kernels/difftrain_kernels/parallel_loss.py"
REFERENCE = "kernels/difftrain_kernels/reference.py"
# In this order; a fault is killed by the first stage that fails. Hypothesis is late: it shrinks.
KERNEL_STAGES = (
    ["tests/test_triton_kernels.py", "-k", "written or label or 2_31 or weights or certain or range"],
    ["tests/test_triton_kernels.py", "-k", "not rows_match_the_oracle"],
    ["tests/test_logits_loss.py"],
    ["tests/test_codegen.py"],
    ["tests/test_triton_kernels.py", "-k", "rows_match_the_oracle"],
)
STAGES = {
    **dict.fromkeys(TRITON, KERNEL_STAGES),
    LOGITS_LOSS: (["tests/test_logits_loss.py"], ["tests/test_triton_kernels.py"]),
    PARALLEL: (["tests/test_parallel_loss.py", "-k", "not kernels"],),
    REFERENCE: (["tests/test_reference.py"], ["tests/test_parallel_loss.py", "-k", "not kernels"]),
    **trainer_mutants.STAGES,
}
# The test that should notice, where it is not among the first; all tests follow if it does not.
HINTS = {
    "pk for every answer": "weights",
    "pm for [MASK] wanted": "weights",
    "pk where [MASK] is the target": "weights",
    "nll from a rounded": "offsets",
    "exponent rounded twice in the scan": "offsets",
    "exponent rounded twice in the gradient": "offsets",
    "gradient of the target as p - 1": "certain",
    "small gradient of the target": "certain",
    "target summed with the rest": "certain",
    "first head element lost": "every_tile and 4097",
    "gradient's head not written": "every_tile and 4097",
    "unwritten ignored row": "written",
    "ignored row's head keeps": "ignored_rows",
    "unwritten first block": "written",
    "ignored small row keeps": "ignored_rows",
    "NaN at the target goes unseen": "infinities",
    "NaN is no maximum": "infinities",
    "maximum starts at -inf": "infinities",
    "empty total passes": "range",
    "gap from [MASK] downwards": "every_tile and 66",
    "ignored rows in the case table": "ignored_rows",
    "case table loses its last rows": "partial_blocks",
    "stated rows recomputed": "not_touched",
    "every row takes the first": "any_stride or met",
    "gradient buffer ignores": "phase",
    "unaligned rows treated as aligned": "count_as_aligned",
    "bulk accesses through": "budget",
    "mean over counted": "met",
    "sum's gradient divided": "met",
    "buffer given away": "second_backward",
    "statement trusted": "met",
    "version counter not bumped in forward": "loudly",
    "version counter not bumped in backward": "loudly or second_backward",
    "logits overwritten unasked": "keep_their_bits",
    "slice": "test_parallel_loss and kernels",
}
# (file, what is wrong, text, replacement); all occurrences are replaced.
MUTANTS = [
    (STREAMED_ROWS, "tail mask off by one", "mask=column < vocab_size, other", "mask=column <= vocab_size, other"),
    (STREAMED_ROWS, "tail sums one logit less", "mask=column < vocab_size, other", "mask=column < vocab_size - 1, other"),
    (STREAMED_ROWS, "gradient's tail is one short", "offsets < vocab_size\n        values", "offsets < vocab_size - 1\n        values"),
    (STREAMED_ROWS, "gradient's tail is one long", "offsets < vocab_size\n        values", "offsets <= vocab_size\n        values"),
    (SMALL_ROWS, "small rows read a column too many", "& (column < vocab_size), column", "& (column <= vocab_size), column"),
    (BLOCKS, "row stride replaced by V", "row_ptr = ptr + row * stride", "row_ptr = ptr + row * 600"),
    (LOSS, "gradient uses the logits' stride", "row_pointer(gradient_ptr, row, gradient_stride, ALIGNED)", "row_pointer(gradient_ptr, row, logits_stride + 1, ALIGNED)"),
    (GRADIENT, "gradient from statistics uses the logits' stride", "row_pointer(gradient_ptr, row, gradient_stride, ALIGNED)", "row_pointer(gradient_ptr, row, logits_stride + 1, ALIGNED)"),
    (STREAMED_ROWS, "dropped rescale of the running sum", "return new_top, total * tl.exp2(top * LOG2E - shift), exps", "return new_top, total, exps"),
    (STREAMED_ROWS, "dropped rescale between lanes", "tl.sum(total * tl.exp2(top * LOG2E - shift), axis=0)", "tl.sum(total, axis=0)"),
    (LOSS, "missing int64 in the row offset", "row = tl.program_id(0).to(tl.int64)\n", "row = tl.program_id(0)\n"),
    (GRADIENT, "missing int64 in the gradient's row offset", "row = tl.full([], index, tl.int64)\n        upstream = tl.load(upstream_ptr + row * upstream_stride)\n        if upstream != stated:  # always", "row = tl.full([], index, tl.int32)\n        upstream = tl.load(upstream_ptr + row * upstream_stride)\n        if upstream != stated:  # always"),
    (WEIGHTS, "label narrowed to int32", "return tl.where(is_label, y, -1).to(tl.int32), is_label", "return y.to(tl.int32), is_label"),
    (WEIGHTS, "int32 labels when judged", "is_label = (y >= 0) & (y < vocab_size)", "is_label = (y.to(tl.int32) >= 0) & (y.to(tl.int32) < vocab_size)"),
    (WEIGHTS, "label V passes", "is_label = (y >= 0) & (y < vocab_size)", "is_label = (y >= 0) & (y <= vocab_size)"),
    (STREAMED_ROWS, "tie goes to the later block", "tl.where(new_top > top, block, seen)", "tl.where(new_top >= top, block, seen)"),
    (STREAMED_ROWS, "tie goes to the last lane's block", "first_block = tl.min(tl.where(top == row_top, seen, n_full), axis=0)", "first_block = tl.max(tl.where(top == row_top, seen, -1), axis=0)"),
    (SMALL_ROWS, "tie goes to the last index in a small row", "first_top = tl.min(tl.where(exists & (numbers == top[:, None]), column, BLOCK_V), axis=1)", "first_top = tl.max(tl.where(exists & (numbers == top[:, None]), column, -1), axis=1)"),
    (STREAMED_ROWS, "any maximum at [MASK] counts as predicted", "says_mask = predicted == mask_id\n    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)\n    # A label -1", "says_mask = mask_logit == top\n    kind, weight = kind_and_weight(x, y, says_mask, mask_id, pk, pm)\n    # A label -1"),
    (STREAMED_ROWS, "a prediction not needed passes for the label -1", "tl.where(is_label & (predicted == y), 1, 2)", "tl.where(predicted == y, 1, 2)"),
    (WEIGHTS, "pk and pm swapped", "weight = tl.where(is_masked & says_mask, pk, 1.0)", "weight = tl.where(is_masked & says_mask, pm, 1.0)"),
    (WEIGHTS, "pk for every answer", "tl.where(is_masked & says_mask, pk, 1.0)", "tl.where(is_masked, pk, 1.0)"),
    (WEIGHTS, "pm for [MASK] wanted where [MASK] stands", "is_intact = (x == y) & (x != mask_id)", "is_intact = x == y"),
    (WEIGHTS, "pk where [MASK] is the target", "is_masked = (x == mask_id) & (y != mask_id)", "is_masked = x == mask_id"),
    (ROW_STATISTICS, "nll from a rounded log-sum-exp", "LN2 * (tl.log2(total) - log2_p)", "(shift * LN2 + LN2 * tl.log2(total)) - target_logit"),
    (STREAMED_ROWS, "exponent rounded twice in the scan", "exps = tl.exp2(tl.fma(values, LOG2E, -shift[None, :, None]))", "exps = tl.exp2(values * LOG2E - shift[None, :, None])"),
    (ROW_STATISTICS, "exponent rounded twice in the gradient", "return tl.exp2(tl.fma(values, LOG2E, -shift)) * factor", "return tl.exp2(values * LOG2E - shift) * factor"),
    (STREAMED_ROWS, "gradient of the target as p - 1", "tl.store(gradient_ptr + target, (-rest * factor).to(dtype))", "tl.store(gradient_ptr + target, (tl.load(gradient_ptr + target).to(tl.float32) - upstream_like).to(dtype))".replace("upstream_like", "1.0")),
    (SMALL_ROWS, "small gradient of the target without its own", "(-rest * factor)[:, None], gradient)", "(rest * factor)[:, None], gradient)"),
    (STREAMED_ROWS, "target summed with the rest", "exps = tl.where(column == target, 0.0, exps)", "exps = tl.where(column == -9, 0.0, exps)"),
    (STREAMED_ROWS, "first head element lost", "mask=lane < head, other=float(\"-inf\")", "mask=(lane < head) & (lane > 0), other=float(\"-inf\")"),
    (STREAMED_ROWS, "gradient's head not written", "tl.store(gradient_ptr + lane, gradient_of(values, shift, factor).to(dtype), mask=lane < head)", "tl.store(gradient_ptr + lane, gradient_of(values, shift, factor).to(dtype), mask=lane < head - 1)"),
    (LOSS, "unwritten ignored row", "zero_row(gradient_row_ptr, vocab_size, REPEAT, LANES, VECTOR, ALIGNED)\n    else", "pass\n    else"),
    (STREAMED_ROWS, "ignored row's head keeps its garbage", "tl.store(gradient_ptr + lane, 0.0, mask=lane < head)", "tl.store(gradient_ptr + lane, 0.0, mask=lane < head - 1)"),
    (STREAMED_ROWS, "unwritten first block", "for block in range(n_full - 1, -1, -1):", "for block in range(n_full - 1, 0, -1):"),
    (SMALL_ROWS, "ignored small row keeps its gradient", "gradient = tl.where(is_counted[:, None], gradient, 0.0)", "gradient = gradient"),
    (STREAMED_ROWS, "NaN at the target goes unseen by the prediction", "(target_logit == target_logit) & ", ""),
    (STREAMED_ROWS, "NaN is no maximum", "if first_nan < vocab_size:", "if first_nan < 0:"),
    (ROW_STATISTICS, "maximum starts at -inf", "FLOOR = tl.constexpr(-2e38)", "FLOOR = tl.constexpr(float(\"-inf\"))"),
    (ROW_STATISTICS, "empty total passes for a number", "tl.where(total > 0, LN2", "tl.where(total >= 0, LN2"),
    (ROW_STATISTICS, "gap from [MASK] downwards", "top - mask_logit", "mask_logit - top"),
    (ROW_STATISTICS, "ignored rows in the case table's nll", "tl.store(base + NLL * n_rows, tl.where(is_counted, nll, 0.0), mask=inside)", "tl.store(base + NLL * n_rows, nll, mask=inside)"),
    (CASE_SUMS, "case table loses its last rows", "for start in range(0, n_rows, BLOCK):", "for start in range(0, n_rows - 1, BLOCK):"),
    (GRADIENT, "stated rows recomputed without need", "inside = (row < n_rows) & (upstream != stated)", "inside = row < n_rows"),
    (GRADIENT, "every row takes the first row's upstream", "upstream_stride=upstream.stride(0) if upstream.dim() else 0,\n            **tiles.tile", "upstream_stride=0,\n            **tiles.tile"),
    (GRADIENT, "gradient buffer ignores the logits' phase", "return buffer.as_strided((n, vocab_size), (stride, 1), phase)", "return buffer.as_strided((n, vocab_size), (vocab_size, 1), 0)"),
    (TILES, "unaligned rows treated as aligned", "aligned = row_phase(logits) == (0, 0)", "aligned = True"),
    (BLOCKS, "bulk accesses through 2-byte elements", "return tl.multiple_of(row_ptr + head + block * BLOCK, 16)", "return row_ptr + head + block * BLOCK"),
    (LOGITS_LOSS, "mean over counted positions", "ctx.divisor = max(1, len(rows))", "ctx.divisor = max(1, int((arguments[0] != -1).sum()))"),
    (LOGITS_LOSS, "sum's gradient divided by N", "if reduction == \"mean\" else 1\n", "if reduction != \"none\" else 1\n"),
    (LOGITS_LOSS, "buffer given away twice", "made, ctx.gradient = ctx.gradient, None", "made = ctx.gradient"),
    (LOGITS_LOSS, "statement trusted unseen", "stated=torch.nan if made is None else ctx.stated, gradient_out=made,", "stated=torch.nan if made is None else float(upstream.flatten()[0]), gradient_out=made,"),
    (LOGITS_LOSS, "version counter not bumped in forward", "                torch.autograd.graph.increment_version(logits)\n        ctx", "        ctx"),
    (LOGITS_LOSS, "version counter not bumped in backward", "            torch.autograd.graph.increment_version(logits)\n        else", "        else"),
    (LOGITS_LOSS, "logits overwritten unasked", "gradient_out=rows if overwrite else None,", "gradient_out=rows,"),
    (SLICES, "slice: a later maximum wins the tie", "is_higher = (slice_top > top)", "is_higher = (slice_top >= top)"),
    (SLICES, "slice: NaN is no maximum across slices", " | ((slice_top != slice_top) & (top == top))", ""),
    (SLICES, "slice: sums added on their own scales", "mask=inside, other=0.0) * scale", "mask=inside, other=0.0)"),
    (SLICES, "slice: [MASK] elsewhere passes for column 0", "tl.where(has_mask & (predicted == mask), 1.0, 0.0)", "tl.where(predicted == tl.maximum(mask, 0), 1.0, 0.0)"),
    (SLICES, "slice: a target elsewhere passes for the prediction not needed", "tl.where(has_target & (predicted == target), 2.0, 0.0)", "tl.where(predicted == target, 2.0, 0.0)"),
    (SLICES, "slice: label beyond the slice", "(token < start + vocab_size)", "(token <= start + vocab_size)"),
    (SLICES, "slice: target's logit from every slice", "tl.where(has_target, target_logit, 0.0)", "target_logit"),
    (REFERENCE, "last maximum wins", "first = tops.argmax(0, keepdim=True)", "first = len(tops) - 1 - tops.flip(0).argmax(0, keepdim=True)"),
    (REFERENCE, "sums added on their own scales", "(rests * torch.exp(_finite(tops) - shift)).sum(0)", "rests.sum(0)"),
    (REFERENCE, "-inf slice makes NaN", "return top.clamp(min=torch.finfo(top.dtype).min)", "return top"),
    (PARALLEL, "processes without columns take part", "        if 0 in self.sizes:", "        if False:"),
    (REFERENCE, "nll from a log-sum-exp", "torch.log(total) - log_p, gap", "shift + torch.log(total) - (log_p + shift), gap"),
    (REFERENCE, "gradient of the target as p - 1", "-(rest * factor)[:, None], gradient.gather(1, column))", "gradient.gather(1, column) - (upstream / divisor).reshape(-1, 1), gradient.gather(1, column))"),
    (REFERENCE, "target summed with the rest", "torch.where(has_target[:, None], 0.0, exps.gather(1, column))", "exps.gather(1, column)"),
    (REFERENCE, "[MASK] elsewhere passes for a column", "(predicted == mask) * has_mask", "(predicted == max(mask, 0))"),
    (REFERENCE, "ignored rows keep their gradient", "gradient.masked_fill_((case == cases.IGNORED)[:, None], 0.0)", "gradient"),
    (REFERENCE, "bad label has a loss", "poison = torch.where(is_label | ~is_counted, 1.0, torch.nan)", "poison = torch.where(is_label, 1.0, 1.0)"),
    (REFERENCE, "ignored rows make NaN on the way back", "torch.where(is_label | ~is_counted, 1.0, torch.nan)", "torch.where(is_label, 1.0, torch.nan)"),
    (PARALLEL, "sum's gradient divided by N", "divisor = max(1, len(y)) if self.reduction == \"mean\" else 1", "divisor = max(1, len(y))"),
    (PARALLEL, "slice starts one late", "sum(sizes[:rank]), group", "sum(sizes[:rank]) + 1, group"),
    (PARALLEL, "DTensor split evenly", "[max(0, min(widest, vocab_size - i * widest)) for i in range(len(ranks))]", "[vocab_size // len(ranks)] * len(ranks)"),
    *trainer_mutants.MUTANTS,
]  # fmt: skip


def survives(file: str, fault: str, text: str, replacement: str) -> str:
    """The test that killed the fault, or an empty string."""
    hinted = [["tests", "-k", hint] for start, hint in HINTS.items() if fault.startswith(start)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "difftrain", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = copy / file
        source.write_text(source.read_text().replace(text, replacement))
        for stage in [*hinted, *STAGES[file]]:
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *stage],
                cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
            if run.returncode in (3, 4):  # pytest itself did not run: that kills nothing
                raise RuntimeError(run.stdout[-500:] + run.stderr[-500:])
            if run.returncode not in (0, 5):  # 5: no test has that name
                failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return failed[0].split(" - ")[0].split("::")[-1] if failed else f"exit {run.returncode}"
    return ""


def main() -> int:
    chosen = [int(argument) for argument in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    alive = 0
    for number in chosen:
        file, fault, text, replacement = MUTANTS[number - 1]
        begin = time.monotonic()
        if text not in (ROOT / file).read_text():
            verdict = "GONE"
        else:
            killer = survives(file, fault, text, replacement)
            verdict = f"killed by {killer}" if killer else "SURVIVED"
        alive += not verdict.startswith("killed")
        print(f"{number:3} {fault}: {verdict} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    return alive > 0


if __name__ == "__main__":
    sys.exit(main())
