"""Training: the step loop. The only file that knows all the others."""

from __future__ import annotations

import hashlib
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from difftrain.checkpoint import save_checkpoint
from difftrain.config import Config
from difftrain.corruption import corrupt
from difftrain.data import Corpus, open_corpus, sample_indices
from difftrain.evaluate import FIXED, LEVELS, TRAINING, evaluate, make_validation_set
from difftrain.loss import choose_loss, model_loss
from difftrain.metrics import (
    MetricsLog,
    check_trackers,
    console_line,
    drop_records_after,
    health_warnings,
    loss_metrics,
    summary_line,
)
from difftrain.model import Transformer, make_optimizer, restore_optimizer
from difftrain.run_folder import check_run_dir, claim_run_dir, find_resume_point
from difftrain.runtime import Runtime, start_runtime, stop_requests, stop_runtime
from difftrain.schedule import learning_rate, masking_penalties
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import MASKED


class TrainingFailed(RuntimeError):
    """The run ended because its loss or gradient stayed non-finite."""


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, eval_only: bool = False
) -> dict[str, Any]:
    """Train a model, or evaluate one, as the configuration says.

    Args:
        config: the run. ``max_iters`` optimiser steps are taken in all, those before a resume
            included.
        resume: go on from the newest unharmed checkpoint in ``out_dir``.
        overwrite: replace a run that ``out_dir`` holds.
        eval_only: evaluate once (with ``resume``: the checkpoint) and write nothing.

    Returns:
        The last evaluation's record, as in ``metrics.jsonl``; empty where none was made before a stop.

    Raises:
        UserError: the configuration, the data or ``out_dir`` does not fit.
        TrainingFailed: ``max_bad_steps`` steps in a row had a non-finite loss or gradient.
    """
    runtime = start_runtime(config)
    try:
        return _train(config, runtime, resume, overwrite, eval_only)
    finally:
        stop_runtime(runtime)


def _train(
    config: Config, runtime: Runtime, resume: bool, overwrite: bool, eval_only: bool
) -> dict[str, Any]:
    run_dir = Path(config.out_dir)
    say = _say if runtime.is_main else _say_nothing
    if not eval_only:
        check_run_dir(run_dir, resume=resume, overwrite=overwrite)
        check_trackers(config)
    corpus = _open_data(config, runtime)
    vocabulary, mask_id = corpus.vocabulary, corpus.vocabulary.mask_id
    checkpoint, problems = find_resume_point(run_dir, config, corpus) if resume else (None, [])
    for problem in problems:
        say(f"warning: {problem}; going on from {checkpoint.folder.name}")

    torch.manual_seed(config.seed)
    model = Transformer(config, vocabulary.vocab_size)
    if checkpoint:
        checkpoint.load_weights(model)
    model.to(runtime.device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    validation_set = make_validation_set(corpus, config)
    # What the best loss is measured by: a best of another measure says nothing.
    measure = [validation_set.id, config.penalty_keep_mask, config.penalty_mask_correct]
    start, best_loss, is_evaluated = 0, float("inf"), False
    if checkpoint:
        state = checkpoint.load_state()
        restore_optimizer(optimizer, state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16
            scaler.load_state_dict(state["scaler"])
        start = checkpoint.step
        if state["measure"] == measure:
            best_loss, is_evaluated = state["best_loss"], state["is_evaluated"]
    compiled = torch.compile(model) if config.compile else model
    network = DistributedDataParallel(compiled) if runtime.world_size > 1 else compiled

    unigram_entropy = corpus.unigram_entropy()
    loss_impl = choose_loss(config, vocabulary.vocab_size, runtime)
    micro_steps = config.gradient_accumulation_steps // runtime.world_size
    step_tokens = config.global_batch_size * config.block_size
    # What backward will pass to each loss, told beforehand; fp16's scale is known on the device alone.
    upstream_scale = None if scaler.is_enabled() else 1 / micro_steps
    say(
        f"{model.n_parameters():,} parameters on {runtime.device} in {runtime.dtype_name}, "
        f"{len(corpus.train):,} training tokens, vocabulary {vocabulary.vocab_size}, "
        f"{runtime.world_size} process(es), steps {start} to {config.max_iters}"
    )

    def evaluation(step: int) -> dict[str, Any]:
        """One pass over the validation set, as a metrics record."""
        pk, pm = masking_penalties(step, config)
        tables = evaluate(compiled, validation_set, mask_id, runtime, loss_impl)
        record = {"kind": "eval", "step": step, **loss_metrics(tables[FIXED], pk, pm, config)}
        record |= {"pk": pk, "pm": pm, "lr": learning_rate(step, config)}
        record |= {"validation_id": validation_set.id, "unigram_entropy": unigram_entropy}
        if config.mode == "diffusion":
            levels = [*LEVELS, TRAINING]
            record["masked_nll"] = {level: tables[level].mean_nll()[MASKED].item() for level in levels}
        say(console_line(record))
        return record

    if eval_only:
        record = evaluation(start)
        say(summary_line(record))
        return record

    def save(step: int, *, is_best: bool, is_evaluated: bool) -> None:
        """Write a checkpoint; the other processes wait until it is there."""
        if runtime.is_main:
            state = {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "best_loss": best_loss,
                "measure": measure,
                "is_evaluated": is_evaluated,
            }
            save_checkpoint(run_dir, step, model, state, config, vocabulary, is_best=is_best)
        runtime.wait_for_all()

    if runtime.is_main:
        claim_run_dir(run_dir, config, resume=resume)
        drop_records_after(run_dir, start, is_evaluated=is_evaluated)
    log = MetricsLog(run_dir, config, is_writing=runtime.is_main)
    progress = tqdm(
        total=config.max_iters, initial=start, disable=not runtime.shows_progress(), unit="step"
    )
    warned: set[str] = set()
    bad_steps, seconds, timed_from, saved_step = 0, 0.0, start, start if checkpoint else -1
    record: dict[str, Any] = {}
    with log, progress, stop_requests() as stop:
        for step in range(start, config.max_iters + 1):
            is_last = step == config.max_iters
            if (step % config.eval_interval == 0 or is_last) and not is_evaluated:
                record = evaluation(step)
                is_best = record["loss_final"] < best_loss
                best_loss = min(best_loss, record["loss_final"])
                for key, message in health_warnings(record, config):
                    if key not in warned:
                        say(f"warning: {message}")
                    warned.add(key)
                log.write(record)
                if config.always_save_checkpoint or is_best or is_last:
                    save(step, is_best=is_best, is_evaluated=True)
                    saved_step = step
                is_evaluated = True
            if is_last:
                break
            if runtime.any_process(stop.requested):
                if saved_step != step:
                    save(step, is_best=False, is_evaluated=is_evaluated)
                say(f"stopped after {step} steps; go on with: difftrain train --resume --out_dir {run_dir}")
                return record
            is_evaluated = False

            began = time.perf_counter()
            lr = learning_rate(step, config)
            pk, pm = masking_penalties(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if config.dropout > 0:
                _seed_dropout(config.seed, step, runtime.rank)
            is_logged = step % config.log_interval == 0
            loss_sum, step_cases = torch.zeros((), device=runtime.device), []
            for micro_step in range(micro_steps):
                samples = sample_indices(step, micro_step, runtime.rank, runtime.world_size, config)
                x, y = _make_batch(corpus, samples, config, runtime)
                is_synchronised = micro_step == micro_steps - 1 or runtime.world_size == 1
                with nullcontext() if is_synchronised else network.no_sync():
                    loss = model_loss(
                        network, x, y, mask_id, pk, pm,
                        runtime=runtime, impl=loss_impl, return_cases=is_logged, upstream_scale=upstream_scale,
                    )  # fmt: skip
                    if is_logged:
                        loss, cases = loss
                        step_cases.append(cases)
                    scaler.scale(loss / micro_steps).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
            is_finite = not runtime.any_process(not (grad_norm + loss_sum).isfinite().item())
            if is_finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.perf_counter() - began
            progress.update()

            bad_steps = 0 if is_finite else bad_steps + 1
            if not is_finite:
                say(f"warning: step {step} is not applied: its loss or gradient is not finite")
            if bad_steps >= config.max_bad_steps:
                raise TrainingFailed(
                    f"{bad_steps} steps in a row had a non-finite loss or gradient, the last was {step}; "
                    f"the checkpoints in {run_dir} are as they were"
                )
            if is_logged:
                table = CaseTable.from_vector(
                    runtime.sum_over_processes(sum(c.to_vector() for c in step_cases))
                )
                train_record = {"kind": "train", "step": step, **loss_metrics(table, pk, pm, config)}
                train_record |= {"pk": pk, "pm": pm, "lr": lr, "grad_norm": grad_norm.item()}
                train_record["tokens_per_second"] = (step + 1 - timed_from) * step_tokens / seconds
                train_record["peak_memory_mib"] = runtime.peak_memory_mib()
                train_record["validation_id"] = validation_set.id
                seconds, timed_from = 0.0, step + 1
                say(console_line(train_record))
                progress.set_postfix_str(
                    f"loss {train_record['loss']:.3f} pk {pk:.2f} pm {pm:.2f} lr {lr:.1e} "
                    f"{train_record['tokens_per_second']:,.0f} tok/s"
                )
                log.write(train_record)
    if not record:  # a finished run, resumed
        record = evaluation(start)
    say(summary_line(record))
    return record


def _say(message: str) -> None:
    """Print above the progress bar, at once even into a pipe."""
    tqdm.write(message)
    sys.stdout.flush()


def _say_nothing(message: str) -> None:
    """What every process but the main one says."""


def _open_data(config: Config, runtime: Runtime) -> Corpus:
    """The corpus; the main process prepares it, the others wait for that."""
    if not runtime.is_main:
        runtime.wait_for_all()
    corpus = open_corpus(config.data)
    if runtime.is_main:
        runtime.wait_for_all()
    corpus.check_length(config.block_size + (config.mode == "gpt2"))
    return corpus


def _make_batch(corpus: Corpus, samples: Tensor, config: Config, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """x and y of the given training samples, on the device."""
    if config.mode == "gpt2":
        tokens = corpus.windows("train", samples, seed=config.seed, length=config.block_size + 1)
        tokens = tokens.to(runtime.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]
    tokens = corpus.windows("train", samples, seed=config.seed, length=config.block_size)
    return corrupt(
        tokens.to(runtime.device, non_blocking=True),
        samples.to(runtime.device),
        seed=config.seed,
        split="train",
        vocab_size=corpus.vocabulary.vocab_size,
        max_corruption=config.max_corruption,
    )


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that a resumed run drops the same units."""
    digest = hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
