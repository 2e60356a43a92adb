"""Does the curriculum pay? Trains the same model in several ways, measures what each learnt, and compares them.
Takes about 100 minutes on two quiet CPU cores: one command on each, with --part 1/2 and --part 2/2. Prints tables, and
writes the figures to the file that --json names.

    python benchmarks/curriculum.py [--out DIR] [--arms NAME ...] [--seeds N] [--steps N] [--options FILE.toml]
        [--part K/N] [--most MINUTES] [--json FILE] [--plot FILE.png]

Every run is a piece of its own in a folder of --out: a command that is cut or ended by --most goes on where it was when
it is given again, in the middle of a run too. What was measured of a run stands in its measured.json. When all runs
are there, --json writes every figure to one file, and --plot draws four of them. Arms are those of
experiment/arms.py; equal seeds share initial weights and text. --options gives options of the trainer in place of the
experiment's, for all arms alike, such as another model or device.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from difftrain.appearing import write_whole
from difftrain.config.sources import is_run_folder, read_toml
from difftrain.errors import UserError
from difftrain.progress import quiet
from difftrain.reporting.log import read_metrics
from difftrain.run import Run
from difftrain.sampling.loaded import Loaded, load
from difftrain.training.loop import train
from experiment.arms import ARMS, BASE, JUDGE, JUDGE_SEED, options_of, run_config, run_folder
from experiment.measures import Effort, measure, references
from experiment.tables import TABLES, draw, table
from measuring.arguments import count, user_path
from measuring.environment import environment
from text_quality.held_out import HeldOut

MEASURED = "measured.json"
FLUENT = "masked only"  # whose first run draws the fluent errors
Piece = tuple[str, int]  # an arm, or the judge, and a seed


def train_piece(piece: Piece, out: Path, changes: dict[str, Any]) -> None:
    """Train a run to its end, from where it was left; one that is at its end stays as it is."""
    config = run_config(*piece, out, changes)
    has_begun = (Path(config.out_dir) / "checkpoints").exists()
    with quiet():
        train(config, resume=has_begun)


def measure_piece(piece: Piece, out: Path, changes: dict[str, Any], effort: Effort) -> dict[str, Any]:
    """What was measured of a run, now or before."""
    file = run_folder(out, *piece) / MEASURED
    of = {"options": options_of(run_config(*piece, out, changes)), "effort": vars(effort)}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in of} == of:
            return found
    judge, fluent, held_out = _shared(out, effort)
    with quiet():
        figures = measure(file.parent, judge, fluent, held_out, effort)
    record = {"arm": piece[0], "seed": piece[1], **of, "figures": figures}
    write_whole(file, json.dumps(record, indent=1))
    return record


@functools.cache
def _shared(out: Path, effort: Effort) -> tuple[Loaded, Loaded, HeldOut]:
    """The judge, the model that draws fluent errors, and the held-out text, opened once."""
    judge, fluent = run_folder(out, JUDGE, JUDGE_SEED), run_folder(out, FLUENT, 1)
    models = (load(run, "latest", device="cpu") for run in (judge, fluent))
    return *models, HeldOut.of(fluent, effort.windows)


def curve_of(run: Path) -> list[list[float]]:
    """Of each evaluation of a run the step, and the nll with 15 % masked on the run's own validation set."""
    evaluations = (record for record in read_metrics(run) if record["kind"] == "eval")
    return [[r["step"], r["masked_nll"]["15"]] for r in evaluations]


def is_trained(piece: Piece, out: Path, changes: dict[str, Any]) -> bool:
    """Whether a run is at its end; raises UserError where its folder holds a run of other options."""
    config = run_config(*piece, out, changes)
    folder = Path(config.out_dir)
    if not is_run_folder(folder):
        return False
    was, now = options_of(Run(folder).config), options_of(config)
    if differing := [name for name in now if was[name] != now[name]]:
        raise UserError(
            f"{folder} holds a run of other options ({', '.join(differing)}); give another --out"
        )
    return (folder / "checkpoints" / f"step-{config.max_iters:08d}").is_dir()


def report(records: list[dict[str, Any]], setting: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables, and write what was asked for."""
    for record in records:
        record["base"] = ARMS[record["arm"]].base
        record["curve"] = curve_of(run_folder(options.out, record["arm"], record["seed"]))
        if len(record["curve"]) > 1:
            record["figures"]["early_nll_15"] = record["curve"][1][1]
    records = sorted(records, key=lambda record: (list(ARMS).index(record["arm"]), record["seed"]))
    for name, columns in TABLES.items():
        print(f"\n{name}\n\n{table(records, columns)}")
    if options.json:
        judge, _, held_out = _shared(options.out, Effort())
        result = {
            "environment": environment(), "setting": setting, "references": references(judge, held_out, Effort()),
            "runs": records,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(records, options.plot)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=user_path, default=Path("runs/curriculum"), help="folder of all runs")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which; [all]")
    parser.add_argument("--seeds", type=count, help="runs of each arm, at most [3; of some 5]")
    parser.add_argument("--steps", type=count, help=f"of each run [{BASE['max_iters']}]")
    parser.add_argument("--options", type=user_path, metavar="FILE", help="options of the trainer, as TOML")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N shares of the runs")
    parser.add_argument(
        "--most", type=float, default=float("inf"), help="begin no run after so many minutes"
    )
    parser.add_argument("--threads", type=count, default=1, help="of torch [1]")
    parser.add_argument("--json", type=user_path, help="write the figures here")
    parser.add_argument("--plot", type=user_path, help="draw four of them here, as PNG")
    options = parser.parse_args(arguments)
    try:
        part, parts = map(int, options.part.split("/"))
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError:
        parser.error(f"--part must be K/N with 1 <= K <= N, got {options.part!r}")
    torch.set_num_threads(options.threads)
    end = time.monotonic() + 60 * options.most
    try:
        changes = read_toml(options.options) if options.options else {}
        changes |= {"max_iters": options.steps} if options.steps else {}
        most = options.seeds or max(arm.seeds for arm in ARMS.values())
        arms = [(n, seed) for seed in range(1, most + 1) for n in options.arms if seed <= ARMS[n].seeds]
        trained = list(dict.fromkeys([(JUDGE, JUDGE_SEED), (FLUENT, 1), *arms]))
        for number, piece in enumerate(trained):
            if number % parts == part - 1 and not is_trained(piece, options.out, changes):
                if time.monotonic() > end:
                    return 0
                train_piece(piece, options.out, changes)
                if not is_trained(piece, options.out, changes):
                    return 130  # Ctrl-C: the run has saved where it is
        if missing := [piece for piece in trained if not is_trained(piece, options.out, changes)]:
            print(
                f"{len(missing)} runs are still to be trained by other parts; then give the command again"
            )
            return 0
        records = []
        for number, piece in enumerate(arms):
            is_mine = number % parts == part - 1
            if is_mine or (run_folder(options.out, *piece) / MEASURED).exists():
                if time.monotonic() > end:
                    return 0
                records.append(measure_piece(piece, options.out, changes, Effort()))
        if len(records) < len(arms):
            print(f"{len(arms) - len(records)} runs are still to be measured by other parts")
            return 0
        setting = {"options": BASE | changes, "arms": {arm: ARMS[arm].what for arm in options.arms}}
        report(records, setting, options)
    except UserError as error:
        print(f"curriculum: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
