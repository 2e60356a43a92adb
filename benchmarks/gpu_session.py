"""Everything that only a CUDA GPU can show, into one results file, in steps of at most eight minutes.
Takes about 60 minutes for all of them on one GPU. Writes benchmarks/results/<gpu>-<date>.json, or the file that
--json names, after each step, so that a kill costs the step under way and the next call goes on.

    python benchmarks/gpu_session.py                 # every step that the file does not have
    python benchmarks/gpu_session.py --next 9        # of these, what fits into nine minutes
    python benchmarks/gpu_session.py --most 1.5      # a minute and a half for each at most, cut where it must be
    python benchmarks/gpu_session.py --steps loss    # these alone, if the file does not have them; --again: even then
    python benchmarks/gpu_session.py --list          # every step: what became of it, how long it may take
    python benchmarks/gpu_session.py --rehearse      # all of it on the CPU, tiny, killed now and then

What the file has counts only while the kernels are the same, by the digest of their sources. A step that
fails is recorded, and the next one runs. One that was cut twice comes after the others.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from measuring import device
from measuring.arguments import user_path
from measuring.environment import environment
from measuring.rehearsal import is_rehearsed, run_with_cuts, write_sanitizer
from measuring.supervision import run_alone
from reporting.result_files import (
    ResultError,
    current_stage,
    default_path,
    note_begun,
    read_result,
    save_stage,
    shown_stages,
)
from stages.suite import COMPILE_TESTS, KERNEL_TESTS, LINEAR_TESTS, TRAINER_TESTS

LONGEST = 8.0  # minutes of a step
GRACE = 30.0  # seconds after which a step that did not keep its time is given up
CUTS = 6  # kills of a rehearsal
REHEARSED_TESTS = ["tests/difftrain/test_philox.py"]
# In a rehearsal.
TINY_LOSS = [
    "--vocab", "66", "--rows", "8", "--linear", "16,8,40", "--only", "upstream stated", "1024 tokens", "eager",
]  # fmt: skip
TINY_TRAINING = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 4, "eval_interval": 4,
    "eval_batch_size": 4, "log_interval": 1, "warmup_iters": 2, "masking_warmup_iters": 4, "dtype": "float32",
    "device": "cpu",
}  # fmt: skip
TINY_TOKENS = {"n_words": 40, "n_tokens": 4000}


def _facts(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.device_facts import run_facts

    return run_alone(run_facts, seconds)


def _tests(paths: list[str], *, without: list[str] = ()) -> Callable:
    def run(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
        from stages.suite import run_suite

        chosen = [*paths, *(f"--ignore={path}" for path in without)]
        arguments = options.pytest.split() if options.pytest is not None else None
        return run_suite(seconds, arguments, REHEARSED_TESTS if is_rehearsed() else chosen)

    return run


def _graphs(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.graph_replay import run_graphs

    return run_alone(run_graphs, seconds)


def _sanitizer(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.sanitizer import run_sanitizer

    if not is_rehearsed():
        return run_sanitizer(seconds)
    with tempfile.TemporaryDirectory() as folder:
        return run_sanitizer(seconds, str(write_sanitizer(Path(folder))))


def _timings(stage: str, *words: str) -> Callable:
    """bench_loss.py, which writes its stage itself, job by job; here only what it comes to is added."""

    def run(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
        import bench_loss
        from reporting.goals import GOALS, MET, NOT_MEASURED, evaluate

        # Time to end in, and for the job that is under way.
        minutes = max(0.1, (seconds - GRACE) / 60)
        arguments = ["--json", str(options.json), "--minutes", f"{minutes:.3f}", "--resume", *words]
        arguments += (["--commit", options.commit] if options.commit else []) + (
            TINY_LOSS if is_rehearsed() else []
        )
        if bench_loss.main(arguments, stage):
            raise RuntimeError("bench_loss.py ended with an error")
        record = read_result(options.json)["stages"][stage]
        del record["environment"]
        states = Counter(v.state for v in evaluate(GOALS, record["entries"]))
        known = states.total() - states[NOT_MEASURED]
        wrong = [
            e["contender"]
            for e in record["entries"]
            if e["family"] == "ours" and e["outcome"].startswith("wrong")
        ]
        summary = f"{states[MET]} of {known} measured goals met, of {states.total()}"
        if wrong:
            summary += f"; wrong: {', '.join(dict.fromkeys(wrong))}"
        return {"ok": not wrong, "summary": summary, **record}

    return run


def _tiles(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    if is_rehearsed():  # a sweep asks for launches that a CPU would take hours for
        return {"ok": True, "summary": "not rehearsed"}
    from stages.tile_sweep import run_sweep

    return run_alone(run_sweep, seconds, seconds - GRACE)


def _training(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.training_runs import run_training

    if is_rehearsed():
        return run_training(seconds, TINY_TRAINING, **TINY_TOKENS)
    return run_training(seconds)


def _sizes(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.training_runs import run_sizes

    if is_rehearsed():
        return run_sizes(seconds, TINY_TRAINING, sizes=(2,), **TINY_TOKENS)
    return run_sizes(seconds)


def _memory(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.memory import run_memory

    return run_alone(run_memory, seconds)


def _host(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from stages.host_time import run_host

    return run_alone(run_host, seconds)


@dataclass(frozen=True)
class Step:
    """``run(options, seconds)`` gives the record; it should end within ``minutes``, and is given up soon after."""

    minutes: float
    run: Callable[[argparse.Namespace, float], dict[str, Any]]


STEPS = {
    "environment": Step(1.5, _facts),
    "kernels": Step(LONGEST, _tests(KERNEL_TESTS, without=COMPILE_TESTS + LINEAR_TESTS)),
    "compile": Step(6, _tests(COMPILE_TESTS)),
    "linear": Step(6, _tests(LINEAR_TESTS)),
    "trainer": Step(LONGEST, _tests(TRAINER_TESTS)),
    "graphs": Step(2, _graphs),
    "sanitizer": Step(LONGEST, _sanitizer),
    "quick": Step(2.5, _timings("quick", "--quick")),
    "tiles": Step(LONGEST, _tiles),
    "loss": Step(LONGEST, _timings("loss")),
    "training": Step(LONGEST, _training),
    "sizes": Step(LONGEST, _sizes),
    "memory": Step(3, _memory),
    "host": Step(1, _host),
}


def record_of(path: Path, name: str, facts: dict[str, str]) -> dict[str, Any] | None:
    """A step's record, of these kernels and come to its end; None where it is still to be done."""
    record = current_stage(path, name, facts)
    return record if record and "ok" in record else None


def cuts_of(path: Path, name: str) -> int:
    """How often a step was begun since it last came to its end."""
    return read_result(path).get("begun", {}).get(name, 0) if path.exists() else 0


def to_do(options: argparse.Namespace, facts: dict[str, str], steps: dict[str, Step]) -> list[str]:
    """The steps without a record, in their order; those that were cut twice come last."""
    chosen = [name for name in steps if name in options.steps]
    left = [name for name in chosen if options.again or not record_of(options.json, name, facts)]
    return sorted(left, key=lambda name: cuts_of(options.json, name) >= 2)


def run_steps(options: argparse.Namespace, facts: dict[str, str], steps: dict[str, Step] = STEPS) -> bool:
    """Do what is to be done and fits into the time; whether all of it is recorded, and as it should be."""
    end = time.monotonic() + 60 * options.next
    for name in to_do(options, facts, steps):
        left, most = end - time.monotonic(), _most(steps[name], options)
        if left < most:
            print(f"{name}: not begun: it may take {most / 60:g} minutes, {max(0, left) / 60:.1f} are left")
            continue
        note_begun(options.json, name, facts)
        print(f"{name} ...", flush=True)
        record = _run(name, steps[name], options, facts)
        save_stage(options.json, name, record, facts)
        print(f"{name}: {_outcome(record)}", flush=True)
    records = [record_of(options.json, name, facts) for name in steps if name in options.steps]
    return all(record and record["ok"] for record in records)


def _most(step: Step, options: argparse.Namespace) -> float:
    """Seconds that a step may take."""
    return 60 * min(step.minutes, options.most)


def _run(name: str, step: Step, options: argparse.Namespace, facts: dict[str, str]) -> dict[str, Any]:
    """A step's record, whatever happens in it."""
    # A rehearsal's machine may be many times slower than one with a GPU.
    began, seconds = time.perf_counter(), _most(step, options) * (20 if is_rehearsed() else 1)

    def give_up() -> None:
        late = {"ok": False, "summary": f"hung: given up after {seconds + GRACE:.0f} s"}
        save_stage(options.json, name, late, facts)
        print(f"{name}: {late['summary']}; the next call goes on", flush=True)
        os._exit(1)  # what it started ends with it

    watch = threading.Timer(seconds + GRACE, give_up)
    watch.daemon = True
    watch.start()
    try:
        record = step.run(options, seconds)
    except ResultError:
        raise
    except Exception as error:
        record = {"ok": False, "summary": f"failed: {type(error).__name__}: {error}"}
    finally:
        watch.cancel()
    return record | {"seconds_in_all": time.perf_counter() - began}


def _outcome(record: dict[str, Any]) -> str:
    return f"{'ok' if record['ok'] else 'NOT OK'}, {record['seconds_in_all']:.0f} s: {record['summary']}"


def listing(options: argparse.Namespace, facts: dict[str, str], steps: dict[str, Step] = STEPS) -> str:
    """One line a step: its time at most, and what became of it."""
    lines = []
    for name, step in steps.items():
        record, cuts = record_of(options.json, name, facts), cuts_of(options.json, name)
        state = _outcome(record) if record else f"begun {cuts} times" if cuts else "to do"
        lines.append(f"{name:12} {step.minutes:4g} min  {state}")
    return "\n".join(lines)


def rehearse(options: argparse.Namespace) -> bool:
    """The whole session in processes of its own on the CPU, killed at random moments; whether all was as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        file = options.json or Path(folder) / "rehearsal.json"
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--json",
            str(file),
            "--steps",
            *options.steps,
        ]
        command += ["--pytest", options.pytest or ""]
        seed = random.randrange(2**32)
        print(f"rehearsal with {options.cuts} cuts, seed {seed}", flush=True)
        wrong = run_with_cuts(command, file, options.cuts, longest=60.0, seed=seed)
        try:
            shown_stages(read_result(file), file.name)
            wrong.append("the file passes for a result")
        except ResultError as refused:
            print(f"refused, as it must be: {refused}")
    print("\n".join(wrong) or "nothing was lost, and nothing ran on")
    return not wrong


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="these alone")
    parser.add_argument("--next", type=float, default=600.0, metavar="MINUTES", help="what fits into these")
    parser.add_argument(
        "--most", type=float, default=LONGEST, metavar="MINUTES", help="of each step, for a short session"
    )
    parser.add_argument("--again", action="store_true", help="steps that have a record too")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="results file [benchmarks/results/<gpu>-<date>.json]"
    )
    parser.add_argument(
        "--pytest", metavar="ARGUMENTS", help="for pytest, in place of -n CORES - 2 where xdist is"
    )
    parser.add_argument("--commit", help="what to record where git cannot tell")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes and kills")
    parser.add_argument("--cuts", type=int, default=CUTS, help=f"kills of a rehearsal [{CUTS}]")
    options = parser.parse_args(arguments)
    for name in ("next", "most"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(options, name):g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.rehearse:
        return 0 if rehearse(options) else 1
    if not device.is_there() and not options.list:
        print("gpu_session.py needs a CUDA GPU, and torch finds none.", file=sys.stderr)
        return 1
    facts = environment(options.commit)
    options.json = options.json or default_path(facts)
    try:
        if options.list:
            print(listing(options, facts))
            return 0
        for name, value in {**facts, "results": options.json}.items():
            print(f"{name}: {value}")
        is_good = run_steps(options, facts)
        print(listing(options, facts))
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
