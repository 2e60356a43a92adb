"""Training: the step loop. The only file that knows all the others."""

from __future__ import annotations

import dataclasses
import shlex
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from difftrain.checkpoints.reading import Checkpoint
from difftrain.checkpoints.saver import CheckpointSaver
from difftrain.checkpoints.writing import point_to_best
from difftrain.config import Config
from difftrain.data import Corpus, open_corpus
from difftrain.errors import FailedElsewhere, UserError
from difftrain.reporting.health import Health
from difftrain.reporting.lines import console_line, summary_line, summary_lines
from difftrain.reporting.log import MetricsLog, check_trackers, drop_records_after, read_metrics
from difftrain.reporting.records import configuration_text, loss_metrics
from difftrain.reporting.sessions import processor, session
from difftrain.runtime import Runtime, is_lost_peer, start_runtime, stop_requests
from difftrain.schedule import case_weights, learning_rate, masking_penalties, other_values
from difftrain.training.budget import fit_to_budget
from difftrain.training.console import Console, Listeners
from difftrain.training.run_folder import (
    check_run_dir,
    claim_run_dir,
    compare_data,
    find_resume_point,
    locked,
)
from difftrain.training.step import LiveRun
from difftrain.training.verdict import TrainingFailed
from difftrain_kernels import CaseTable


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    eval_only: bool = False,
    allow_changed_data: bool = False,
    listeners: Listeners | None = None,
) -> dict[str, Any]:
    """Train a model, or evaluate one, as the configuration says.

    Args:
        config: the run. ``max_iters`` optimiser steps are taken in all, those before a resume
            included.
        resume: go on from the newest unharmed checkpoint in ``out_dir``.
        overwrite: replace a run that ``out_dir`` holds.
        eval_only: evaluate once (with ``resume``: the checkpoint) and write nothing.
        allow_changed_data: with ``resume``, go on though the data is not what it was.
        listeners: who hears of the run; None: standard output.

    Returns:
        The last evaluation's record, as in ``metrics.jsonl``; empty where none was made before a stop.

    Raises:
        UserError: the configuration, the data or ``out_dir`` does not fit.
        TrainingFailed: ``max_bad_steps`` steps in a row could not be applied, or another process is gone.
        OSError: a checkpoint could not be written, such as on a full disk.
        OutputClosed: nobody reads standard output any longer; the run has stopped as at Ctrl-C, saved.
    """
    with start_runtime(config) as runtime:
        try:
            return _train(
                config,
                runtime,
                listeners,
                resume=resume,
                overwrite=overwrite,
                eval_only=eval_only,
                allow_changed_data=allow_changed_data,
            )
        except RuntimeError as error:
            if is_lost_peer(error):
                raise TrainingFailed(
                    f"process {runtime.rank} lost another process ({error}); the checkpoints in "
                    f"{config.out_dir} are as they were"
                ) from None
            raise


def _train(config: Config, runtime: Runtime, listeners: Listeners | None, **asked: bool) -> dict[str, Any]:
    say = Console(runtime.is_main, listeners)
    is_writing = runtime.is_main and not asked["eval_only"]
    checkpoint, corpus = runtime.main_first(lambda: _open(config, say, **asked))
    with ExitStack() as stack:
        runtime.main_first(lambda: is_writing and stack.enter_context(locked(Path(config.out_dir))))
        if config.budget_minutes and not asked["eval_only"]:
            config = fit_to_budget(config, runtime, corpus, say)
        run = LiveRun(config, runtime, corpus, checkpoint, say)
        runtime.main_first(lambda: is_writing and _claim(run, stack, resume=asked["resume"]))
        say(configuration_text(config))
        say(run.title)
        if asked["eval_only"]:
            record = run.evaluate()
            say(summary_line(record))
        else:
            record = _loop(run)
    say.check()
    return record


def _claim(run: LiveRun, stack: ExitStack, *, resume: bool) -> None:
    """Make the locked folder this run's, until the stack ends; from here on it is written to."""
    claim_run_dir(run.folder, run.config, resume=resume)
    drop_records_after(run.folder, run.step, is_evaluated=run.is_evaluated)
    point_to_best(run.folder / "checkpoints", run.best_step)
    if run.step < run.config.max_iters:  # a finished run stays as it is
        stack.enter_context(session(run.folder, _facts(run), lambda: run.step))


def _facts(run: LiveRun) -> dict[str, Any]:
    """What this run computes on and with, for who reads of it later."""
    device, corpus = run.runtime.device, run.corpus
    is_cuda = device.type == "cuda"
    return {
        "device": f"{device}: {torch.cuda.get_device_name(device) if is_cuda else processor()}",
        "dtype": run.runtime.dtype_name,
        "processes": run.runtime.world_size,
        "parameters": run.model.n_parameters(),
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
        "vocabulary": corpus.vocabulary.vocab_size,
        "data": corpus.record,
    }


def _open(
    config: Config,
    say: Any,
    *,
    resume: bool,
    overwrite: bool,
    eval_only: bool,
    allow_changed_data: bool,
) -> tuple[Checkpoint | None, Corpus]:
    """The checkpoint to go on from, if any, and the data; raises UserError before anything is touched."""
    run_dir = Path(config.out_dir)
    if not eval_only:
        check_run_dir(run_dir, resume=resume, overwrite=overwrite)
        check_trackers(config)
    if resume and config.budget_minutes:
        raise UserError("budget_minutes must be 0 to resume a run, whose steps are fixed: give max_iters")
    corpus = open_corpus(config.data, say)
    corpus.check_length(config.block_size + (config.mode == "gpt2"))
    if not resume:
        return None, corpus
    checkpoint, problems = find_resume_point(run_dir, config, corpus)
    for problem in problems:
        say(f"warning: {problem}; going on from {checkpoint.folder.name}")
    if note := compare_data(checkpoint, config, corpus, is_change_allowed=allow_changed_data):
        say(f"note: {note}")
    for key, was in dataclasses.asdict(checkpoint.config).items():
        if key != "out_dir" and (now := getattr(config, key)) != was:
            say(f"note: {key} was {was} in {checkpoint.folder.name} and is {now} from here on")
    return checkpoint, corpus


def _loop(run: LiveRun) -> dict[str, Any]:
    """All steps, with evaluations, log lines and checkpoints between them: the last evaluation's record."""
    config, runtime, say = run.config, run.runtime, run.say
    step_tokens = config.global_batch_size * config.block_size
    saver = CheckpointSaver(run.folder, config, run.corpus.vocabulary, runtime)
    log = MetricsLog(run.folder, config, is_writing=runtime.is_main)
    progress = tqdm(
        total=config.max_iters, initial=run.step, disable=not runtime.shows_progress(), unit="step"
    )

    def is_due() -> bool:
        return run.step % config.eval_interval == 0 or run.step == config.max_iters

    def save() -> None:
        saver.save(run.step, run.model, run.optimizer, run.state(), best_step=run.best_step)
        run.saved_step = run.step

    record: dict[str, Any] = {}
    health, warnings = Health(config), []
    if run.step:  # what a run that goes on was warned of before is not told again
        with suppress(UserError):  # a log that is gone
            for earlier in read_metrics(run.folder):
                health.see(earlier)

    def watch(record: dict[str, Any]) -> None:
        for warning in health.see(record):
            warnings.append(warning)
            say(f"warning: {warning}")

    seconds, timed_from, is_stopping = 0.0, run.step, False
    with stop_requests() as stop, log, progress, saver:
        while True:
            is_last = run.step == config.max_iters
            if is_due() and not run.is_evaluated and not is_stopping:
                record = run.evaluate()
                is_best = record["loss_final"] < run.best_loss
                if is_best:
                    run.best_loss, run.best_step = record["loss_final"], run.step
                run.is_evaluated = True
                watch(record)
                log.write(record)
                if config.always_save_checkpoint or is_best or is_last:
                    save()
                say.evaluation(record)
                (is_stopping,) = runtime.any_process(stop.requested or say.asks_to_stop)
            if is_stopping and not (is_last and run.is_evaluated):
                if run.saved_step != run.step:
                    save()
                saver.finish()
                say(
                    f"stopped after {run.step} steps; go on with: "
                    f"difftrain train --resume --out_dir {shlex.quote(str(run.folder))}"
                )
                return record
            if is_last:
                break

            began = time.perf_counter()
            step, lr = run.step, learning_rate(run.step, config, run.reached)
            pk, pm = masking_penalties(step, config, run.reached)
            is_logged = step % config.log_interval == 0
            loss_sum, tables = run.gradients(lr, is_logged=is_logged)
            verdict = (
                run.settle()
            )  # on the step before, while the device has this one's passes to go on with
            if not (verdict.is_stopping or verdict.has_failed):  # else the run ends after that step
                run.update(loss_sum, stop.requested or say.asks_to_stop, saver.has_failed)
                if is_logged or is_due():
                    verdict = run.settle()
            seconds += time.perf_counter() - began
            is_stopping = verdict.is_stopping
            if verdict.has_failed:
                saver.finish()
                raise FailedElsewhere("the main process could not save")
            if run.step == step:
                continue
            progress.update()
            told = {"pk": pk, "pm": pm, "lr": lr, **other_values(step, config, run.reached)}
            if is_logged:
                table = CaseTable.from_vector(
                    runtime.sum_over_processes(sum(table.to_vector() for table in tables))
                )
                weights = case_weights(step, config, run.reached)
                told = loss_metrics(table, pk, pm, config, weights) | told
                told["grad_norm"] = verdict.norm
                told["tokens_per_second"] = (run.step - timed_from) * step_tokens / seconds
                told["peak_memory_mib"] = runtime.peak_memory_mib()
                told["skipped_steps"] = run.judge.skipped_steps
                told["validation_id"] = run.validation_set.id
                seconds, timed_from = 0.0, run.step
            step_record = {"kind": "train", "step": step, **told}
            if is_logged:
                say.progress(console_line(step_record))
                watch(step_record)
                progress.set_postfix_str(
                    f"loss {told['loss']:.3f} pk {pk:.2f} pm {pm:.2f} lr {lr:.1e} "
                    f"{told['tokens_per_second']:,.0f} tok/s"
                )
                log.write(step_record)
            say.step(step_record)
        if not record:  # a finished run, resumed
            record = run.evaluate()
        for line in summary_lines(run.folder, record, (run.best_loss, run.best_step), warnings):
            say(line)  # before the last save is waited for, which can fail
    return record
