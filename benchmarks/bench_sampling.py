"""Which sampling policy is good for what: texts written, gaps filled and errors repaired by trained models, by passes.
Takes about ten minutes on two CPU cores for three models of curriculum.py's size. Prints tables, and writes the figures
to the file that --json names.

    python benchmarks/bench_sampling.py RUN [RUN ...] --judge RUN [--passes N ...] [--ways NAME ...] [--texts N]
        [--parts PART ...] [--share S] [--temperature T] [--sure S ...] [--json FILE] [--plot FILE.png]

Each RUN is one training of the same model, such as with another seed; figures are means over them with their standard
deviation. The judge is a run in gpt2 mode with the same vocabulary and data. All texts are of block_size, and what is
filled and repaired is held-out text of the first run's data. Seconds are CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain.data import mask_share
from difftrain.errors import UserError
from difftrain.progress import progress
from difftrain.sampling.choosing import Choice
from difftrain.sampling.loaded import Loaded, load
from difftrain.sampling.policies import POLICIES
from difftrain.sampling.writing import How, Writer
from measuring.arguments import count, user_path
from measuring.environment import environment
from text_quality.errors import KINDS, plant
from text_quality.gap_lengths import measure_lengths
from text_quality.held_out import HeldOut
from text_quality.repaired import found_at, outcome, rewritten
from text_quality.sampling_tables import draw, tables
from text_quality.written import nll_under, quality

PARTS = ("writing", "repair", "lengths")
PASSES = (4, 8, 16, 32, 64)
ERRORS = (1.0, 5.0, 15.0)  # per cent of the words
SURE = (0.9, 0.5)
BLOCKS = 4  # of a text
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} for name in POLICIES},
    **{f"remask, suspect {p:g}": {"policy": "remask", "suspect": p} for p in (0.5, 0.2, 0.05)},
    "ancestral, blocks": {"policy": "ancestral", "blocks": BLOCKS},
    "ancestral, blocks, approximate": {"policy": "ancestral", "blocks": BLOCKS, "approximate": True},
    "remask, blocks": {"policy": "remask", "blocks": BLOCKS},
    "remask, blocks, approximate": {"policy": "remask", "blocks": BLOCKS, "approximate": True},
}


def written(
    model: Loaded, x: Tensor, way: str, passes: int, temperature: float
) -> tuple[Tensor, float, int]:
    """x (B, T) with every [MASK] written, the CPU seconds that took, and the passes of the model."""
    options = dict(WAYS[way])
    if parts := options.pop("blocks", 0):
        options["block_length"] = max(1, model.config.block_size // parts)
    how = How(steps=passes, choice=Choice(temperature=temperature), seed=0, **options)
    writer = Writer(model.module, model.tokenizer, model.config)
    seen = []
    began = time.process_time()
    filled = writer.fill(x, how, lambda _: seen.append(None))
    return filled, time.process_time() - began, len(seen) - 1


def measure_policies(
    model: Loaded, judge: Loaded, clean: Tensor, known: set[str], number: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """An entry for each task, way and number of passes: "free", texts from nothing, and "gaps", held-out text of
    which a share is masked."""
    words, mask_id = model.tokenizer, model.tokenizer.mask_id
    samples = torch.arange(len(clean), dtype=torch.int64, device="cpu")
    masked, _ = mask_share(
        clean, samples, seed=number, split="val", vocab_size=words.vocab_size, share=options.share
    )
    tasks = {"free": torch.full_like(clean, mask_id), "gaps": masked}
    entries = []
    cases = [(t, w, n) for t in tasks for w in options.ways for n in options.passes]
    for task, way, passes in progress(cases, what=f"writing, model {number + 1}", unit="way"):
        if WAYS[way]["policy"] in ("fill", "remask") and not model.config.has_penalties:
            continue
        filled, seconds, calls = written(model, tasks[task], way, passes, options.temperature)
        figures = quality(filled, words.decode, judge, known)
        was_masked = tasks[task] == mask_id
        figures["tokens_per_cpu_second"] = int(was_masked.sum()) / max(seconds, 1e-9)
        if task == "gaps":
            figures["restored"] = (filled == clean)[was_masked].double().mean().item()
        entries.append(
            {"task": task, "way": way, "passes": passes, "model": number, "calls": calls}
            | {"figures": figures}
        )
    return entries


def measure_repair(
    model: Loaded, judge: Loaded, clean: Tensor, number: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """An entry for each kind and share of errors and each --sure."""
    entries = []
    cases = [(kind, share) for kind in KINDS for share in ERRORS]
    for kind, share in progress(cases, what=f"repairing, model {number + 1}", unit="text"):
        wrong = plant(kind, model, clean, share / 100, seed=number)
        before = {"found_at_1": found_at(model, clean, wrong), "nll_before": nll_under(judge, wrong)}
        for sure in options.sure:
            after = rewritten(model, wrong, sure=sure)
            figures = outcome(clean, wrong, after) | before | {"nll_after": nll_under(judge, after)}
            entries.append(
                {"kind": kind, "errors": share, "sure": sure, "model": number, "figures": figures}
            )
    return entries


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folders of trained runs")
    parser.add_argument("--judge", type=user_path, required=True, metavar="RUN", help="a run in gpt2 mode")
    parser.add_argument(
        "--passes", type=count, nargs="+", default=list(PASSES), help="of the model, a text"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="of writing [all]"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured [all]"
    )
    parser.add_argument("--texts", type=count, default=64, help="of each kind [64]")
    parser.add_argument("--share", type=float, default=0.5, help="of held-out text that is masked [0.5]")
    parser.add_argument("--temperature", type=float, default=1.0, help="[1.0]")
    parser.add_argument("--sure", type=float, nargs="+", default=list(SURE), help="of repair")
    parser.add_argument("--threads", type=count, default=1, help="of torch [1]")
    parser.add_argument("--json", type=user_path, help="write the figures here")
    parser.add_argument("--plot", type=user_path, help="draw them here, as PNG")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        models = [load(run, "latest") for run in options.runs]
        judge = load(options.judge, "latest")
        for run, model in zip([*options.runs, options.judge], [*models, judge], strict=True):
            if model.tokenizer.to_meta() != judge.tokenizer.to_meta():
                raise UserError(f"{run} has another vocabulary than the judge {options.judge}")
            if (model.config.mode == "gpt2") != (model is judge):
                raise UserError(
                    f"{run} is in {model.config.mode} mode; the judge alone is to be in gpt2 mode"
                )
        held_out = HeldOut.of(options.runs[0], options.texts)
        clean, known = held_out.tokens, held_out.known
        if len(clean) < options.texts:
            raise UserError(
                f"--texts must be at most what the held-out text has, {held_out.n_windows}, got {options.texts}"
            )
        result: dict[str, Any] = {
            "environment": environment(),
            "setting": {"texts": options.texts, "share": options.share, "temperature": options.temperature},
            "held_out": quality(clean, judge.tokenizer.decode, judge, known),
            "writing": [],
            "repair": [],
            "lengths": [],
        }
        for number, model in enumerate(models):
            if "writing" in options.parts:
                result["writing"] += measure_policies(model, judge, clean, known, number, options)
            if "lengths" in options.parts:
                result["lengths"] += measure_lengths(model, clean, number)
            if model.config.has_penalties and "repair" in options.parts:
                result["repair"] += measure_repair(model, judge, clean, number, options)
    except UserError as error:
        print(f"bench_sampling: {error}", file=sys.stderr)
        return 2
    print(tables(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot and result["writing"]:
        draw(result, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
