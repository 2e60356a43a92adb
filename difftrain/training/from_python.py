"""Training from a program: a run that prints nothing unless asked to, tells its steps to functions, and is given back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from difftrain.config import Config
from difftrain.config.paths import expand_path
from difftrain.errors import UserError
from difftrain.progress import quiet
from difftrain.run import Run
from difftrain.training import loop
from difftrain.training.console import Listener, Listeners, print_line


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    on_step: Listener | None = None,
    on_evaluation: Listener | None = None,
    progress: bool | Callable[[str], object] = False,
) -> Run:
    """Train a model as ``difftrain train`` does, and give the run.

    Nothing is printed unless ``progress`` says so. Ctrl-C, SIGTERM and SIGHUP finish the step and save a checkpoint,
    and the run comes back with the state "stopped"; a second one, a second later, raises KeyboardInterrupt. In a
    thread that is not the main one, which alone hears of signals, they do what the program says. Under torchrun
    every process calls this with the same configuration.

    Args:
        config: the run. ``~`` and variables in its paths are expanded.
        resume: go on from the newest unharmed checkpoint in ``out_dir``, mostly with ``Run(out_dir).config``.
        overwrite: replace a run that ``out_dir`` holds.
        allow_changed_data: with ``resume``, go on though the data is not what it was.
        on_step: is given a record of each step: "step", "pk", "pm", "lr", and every ``log_interval`` steps, when the
            device is waited for, all that ``metrics.jsonl`` has. Where it returns True the run stops after at most
            one more step, as at Ctrl-C. It is called on the main process alone.
        on_evaluation: the same for each evaluation, whose record it is given.
        progress: True: lines and a bar as on the command line; a function: is given each line.

    Raises:
        UserError: the configuration, the data or ``out_dir`` does not fit.
        TrainingFailed: ``max_bad_steps`` steps in a row could not be applied, or another process is gone.
        OSError: a checkpoint could not be written, such as on a full disk.
    """
    if not isinstance(config, Config):
        raise UserError(f"config must be a difftrain.Config, got {type(config).__name__}")
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other")
    for name, listener in {"on_step": on_step, "on_evaluation": on_evaluation}.items():
        if listener is not None and not callable(listener):
            raise UserError(f"{name} must be a function, got {type(listener).__name__}")
    if not callable(progress) and not isinstance(progress, bool):
        raise UserError(f"progress must be true, false or a function, got {type(progress).__name__}")
    on_line = progress if callable(progress) else print_line if progress else None
    config = dataclasses.replace(config, out_dir=expand_path(config.out_dir), data=expand_path(config.data))
    with quiet(progress is not True):
        loop.train(
            config,
            resume=resume,
            overwrite=overwrite,
            allow_changed_data=allow_changed_data,
            listeners=Listeners(on_line, on_step, on_evaluation),
        )
    return Run(config.out_dir)
