"""Training runs that stop and go on, in this process or in several at once."""

from functools import partial

from difftrain.config import Config
from difftrain.training.loop import train
from difftrain.training.step import LiveRun
from processes import run_in_processes


def train_with_stop(config: Config, stop_at: int | None) -> None:
    """Train; with ``stop_at``, stop after that many steps by the path a signal takes, and go on."""
    if stop_at is None:
        train(config)
        return
    real = LiveRun.update

    def update(self, loss_sum, is_stopping, has_failed):
        return real(self, loss_sum, self.step + 1 == stop_at, has_failed)

    LiveRun.update = update
    try:
        train(config)
    finally:
        LiveRun.update = real
    train(config, resume=True)


def train_each(runs: list[tuple[Config, int | None]], rank: int) -> None:
    for config, stop_at in runs:
        train_with_stop(config, stop_at)


def train_all(runs: list[tuple[Config, int | None]], processes: int, folder) -> None:
    """Train (configuration, stop or None) pairs, one after the other, in one start of several processes."""
    run_in_processes(processes, partial(train_each, runs), folder)


def resume_each(configs: list[Config], rank: int) -> None:
    for config in configs:
        train(config, resume=True)


def resume_all(configs: list[Config], processes: int, folder) -> None:
    """Go on with each run in one start of several processes."""
    run_in_processes(processes, partial(resume_each, configs), folder)
