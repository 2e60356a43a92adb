"""Kill a training run again and again at random moments: python tests/kill_runs.py CONFIG.toml KILLS SEED

Each child is a fork that trains on, saving after every step, until SIGKILL reaches it. After each kill
every checkpoint under its name must be whole, and at most one interval may be lost. Prints one JSON
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


def start(config: Config, resume: bool, progress: Path) -> int:
    """A child that trains; it notes each step it begins in the file ``progress``."""
    child = os.fork()
    if child:
        return child
    real = step_module._make_batch

    def make_batch(corpus, samples, *rest):
        progress.write_text(str(int(samples[0]) // config.global_batch_size))
        return real(corpus, samples, *rest)

    step_module._make_batch = make_batch
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(config, resume=resume, overwrite=not resume)
    os._exit(0)


def main(config: Config, kills: int, seed: int) -> dict[str, int]:
    dice = random.Random(seed)
    run_dir, progress = Path(config.out_dir), Path(config.out_dir + "-step")
    home = run_dir / "checkpoints"
    half_written = saved = done = 0
    while done < kills:
        progress.write_text("")
        child = start(config, done > 0, progress)
        while not progress.read_text():  # it is under way
            time.sleep(0.001)
            if os.waitpid(child, os.WNOHANG)[0]:
                raise AssertionError("the run ended by itself")
        time.sleep(dice.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun = int(progress.read_text() or 0)
        if not home.is_dir() or not any(home.glob("step-*")):
            continue  # killed before the first checkpoint was there: nothing to lose yet
        done += 1
        half_written += any(home.glob(".writing-step-*"))
        for folder in home.glob("step-*"):
            open_checkpoint(folder)
        newest, problems = find_newest_good(run_dir)
        assert not problems, problems
        # Begun is step s, so that of s - 1 was being saved, and that of s - 2 must be there.
        assert newest.step >= max(saved, begun - 1), (newest.step, saved, begun)
        saved = newest.step
    return {"kills": done, "half_written": half_written, "step": saved}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Config(**read_toml(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))))
