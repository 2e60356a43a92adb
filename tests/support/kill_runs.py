"""Kill a training run again and again: python tests/support/kill_runs.py CONFIG.toml KILLS [SEED]

Each child is a fork that goes on with the run, saving after every step, until SIGKILL reaches it: the
n-th before its n-th change to the checkpoints' folder or, with a seed, at a random moment. After each
kill every checkpoint under its name must be whole, and at most one interval may be lost. Prints one JSON
object: kills, how many of them left a half-written checkpoint behind, the last step.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from difftrain.checkpoints.reading import find_newest_good, open_checkpoint
from difftrain.config import Config
from difftrain.config.sources import read_toml
from difftrain.training import step as step_module
from difftrain.training.loop import train
from waiting import PATIENCE

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}


def kill_before_change(n: int, home: Path) -> None:
    """Let this process be killed before its n-th change to what lies below a folder."""
    changes = []

    def count(event: str, arguments: tuple) -> None:
        is_change = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        # What is removed with its folder is named from that folder's descriptor.
        if is_change and (str(home) in str(arguments[0]) or (event == "os.remove" and arguments[1] != -1)):
            changes.append(event)
            if len(changes) == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def start(config: Config, progress: Path, n: int | None) -> int:
    """A child that goes on with the run; it notes each step it begins in the file ``progress``."""
    child = os.fork()
    if child:
        return child
    real = step_module._make_batch

    def make_batch(corpus, samples, *rest):
        progress.write_text(str(int(samples[0]) // config.global_batch_size))
        return real(corpus, samples, *rest)

    step_module._make_batch = make_batch
    if n is not None:
        kill_before_change(n, Path(config.out_dir) / "checkpoints")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(config, resume=True)
    os._exit(0)


def kill_at_random(child: int, progress: Path, dice: random.Random) -> None:
    """Kill the child up to a tenth of a second after its first step."""
    until = time.monotonic() + PATIENCE
    while not progress.read_text():
        assert time.monotonic() < until, "the run does not begin"
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)


def main(config: Config, kills: int, seed: int | None) -> dict[str, int]:
    run_dir, progress = Path(config.out_dir), Path(config.out_dir + "-step")
    home = run_dir / "checkpoints"
    dice = random.Random(seed)
    half_written = saved = 0
    for n in range(1, kills + 1):
        progress.write_text("")
        child = start(config, progress, n if seed is None else None)
        if seed is not None:
            kill_at_random(child, progress, dice)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run ended by itself"
        begun = int(progress.read_text() or 0)
        half_written += any(home.glob(".writing-step-*"))
        for folder in home.glob("step-*"):
            open_checkpoint(folder)
        newest, problems = find_newest_good(run_dir)
        assert not problems, problems
        # Begun is step s, so that of s - 1 was being saved, and that of s - 2 must be there.
        assert newest.step >= max(saved, begun - 1), (newest.step, saved, begun)
        saved = newest.step
    return {"kills": kills, "half_written": half_written, "step": saved}


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else None
    print(json.dumps(main(Config(**read_toml(sys.argv[1])), int(sys.argv[2]), seed)))
