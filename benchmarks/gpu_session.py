"""Everything that only a CUDA GPU can show, into one results file.
Takes 60 minutes at most; --minutes sets another end. Writes benchmarks/results/<gpu>-<date>.json, or the
file that --json names.

    python benchmarks/gpu_session.py [--stages suite sanitizer graphs training loss] [--minutes M]
                                     [--json FILE] [--quick] [--commit TEXT]

Stages, in order: the whole test suite; compute-sanitizer's memcheck and racecheck over small
launches; CUDA graph replay with new penalties; 500 steps of GPT-2 small with each implementation of
the loss; bench_loss.py. Each is written into the file as soon as it ends and replaces its earlier
record, so that a session can be done in parts. A stage that fails is recorded, and the next one runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from measuring.arguments import user_path
from measuring.environment import environment
from reporting.result_files import ResultError, default_path, read_result, save_stage

QUICK_STEPS = 50


def _suite(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.suite import run_suite

    return run_suite(seconds, options.pytest.split() if options.pytest is not None else None)


def _sanitizer(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.sanitizer import run_sanitizer

    return run_sanitizer(seconds)


def _graphs(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.graph_replay import run_graphs

    return run_graphs()


def _training(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.training_runs import run_training

    return run_training(seconds, {"max_iters": QUICK_STEPS} if options.quick else None)


def _loss(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """bench_loss.py writes its stage itself, job by job; here only what it comes to is added."""
    import bench_loss
    from reporting.goals import GOALS, MET, NOT_MEASURED, evaluate

    minutes = min(seconds / 60, 1.0 if options.quick else 8.0)
    arguments = ["--json", str(options.json), "--minutes", f"{minutes:.3f}"]
    arguments += (["--quick"] if options.quick else []) + (
        ["--commit", options.commit] if options.commit else []
    )
    if bench_loss.main(arguments):
        raise RuntimeError("bench_loss.py ended with an error")
    record = read_result(options.json)["stages"]["loss"]
    del record["environment"]
    states = Counter(v.state for v in evaluate(GOALS, record["entries"]))
    known = states.total() - states[NOT_MEASURED]
    wrong = [
        e["contender"]
        for e in record["entries"]
        if e["family"] == "ours" and e["outcome"].startswith("wrong")
    ]
    return {
        "ok": not wrong,
        "summary": f"{states[MET]} of {known} measured goals met, of {states.total()}",
        **record,
    }


STAGES: dict[str, Callable[[argparse.Namespace, float], dict[str, Any]]] = {
    "suite": _suite,
    "sanitizer": _sanitizer,
    "graphs": _graphs,
    "training": _training,
    "loss": _loss,
}


def run_stages(
    options: argparse.Namespace, facts: dict[str, str], stages: dict[str, Callable] = STAGES
) -> bool:
    """Run the chosen stages in their order, recording each; whether all of them were as they should be."""
    end = time.monotonic() + 60 * options.minutes
    all_ok = True
    for name in (name for name in stages if name in options.stages):
        began = time.perf_counter()
        if end - time.monotonic() < 1:
            print(f"{name}: not run: the session's {options.minutes:g} minutes are over", flush=True)
            all_ok = False
            continue  # an earlier record of the stage stays
        print(f"{name} ...", flush=True)
        try:
            record = stages[name](options, end - time.monotonic())
        except ResultError:
            raise
        except Exception as error:
            record = {"ok": False, "summary": f"failed: {type(error).__name__}: {error}"}
        record["seconds_in_all"] = time.perf_counter() - began
        save_stage(options.json, name, record, facts)
        print(f"{name}: {'ok' if record['ok'] else 'NOT OK'}: {record['summary']}", flush=True)
        all_ok &= record["ok"]
    return all_ok


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="these alone")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all stages together [60]")
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="results file [benchmarks/results/<gpu>-<date>.json]"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} training steps, bench_loss.py --quick"
    )
    parser.add_argument("--pytest", metavar="ARGUMENTS", help="for pytest, in place of -n 8 where xdist is")
    parser.add_argument("--commit", help="what to record where git cannot tell")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("gpu_session.py needs a CUDA GPU, and torch finds none.", file=sys.stderr)
        return 1
    facts = environment(options.commit)
    options.json = options.json or default_path(facts)
    for name, value in {**facts, "results": options.json}.items():
        print(f"{name}: {value}")
    try:
        return 0 if run_stages(options, facts) else 1
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
