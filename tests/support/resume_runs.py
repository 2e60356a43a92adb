"""Many short runs in one process, or in each of torchrun's: python tests/resume_runs.py LIST.json

The list holds [configuration, steps until a stop or null] pairs. A run with a stop is trained to that
step as if it were told to stop there, then resumed to its end.
"""

import gc
import json
import os
import sys

import torch

from difftrain.config import Config
from difftrain.training.loop import train
from difftrain.training.step import Run


def train_with_stop(config: Config, stop_at: int | None) -> None:
    """Train; with ``stop_at``, stop after that many steps by the path a signal takes, and go on."""
    if stop_at is None:
        train(config)
        return
    real = Run.update

    def update(self, loss_sum, is_stopping, has_failed):
        return real(self, loss_sum, self.step + 1 == stop_at, has_failed)

    Run.update = update
    try:
        train(config)
    finally:
        Run.update = real
    train(config, resume=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    with open(sys.argv[1], encoding="utf-8") as file:
        for values, stop_at in json.load(file):
            train_with_stop(Config(**values), stop_at)
    if torch.distributed.is_initialized():
        gc.collect()  # replicas go before their group
        torch.distributed.destroy_process_group()
