"""Faults for mutants.py in the trainer: checkpoints, resuming, data, corruption and schedules."""

CHECKPOINT, SAVER, RUN, TRAIN, RUNTIME, METRICS, SCHEDULE, DATA, CORRUPTION = (
    f"difftrain/{name}.py"
    for name in (
        "checkpoint", "saver", "run", "train", "runtime", "metrics", "schedule", "data", "corruption",
    )
)  # fmt: skip
RESUME = ["tests/difftrain/test_resume.py", "-k", "float32 or samples"]
LOOP = ["tests/difftrain/test_train.py", "-k", "not full_disk"]
# In this order; a fault is killed by the first stage that fails.
STAGES = {
    CHECKPOINT: (
        ["tests/difftrain/test_checkpoint.py"],
        ["tests/difftrain/test_train.py", "-k", "full_disk"],
        ["tests/difftrain/test_kills.py"],
        LOOP,
    ),
    SAVER: (["tests/difftrain/test_saver.py"], LOOP),
    RUN: (LOOP, RESUME, ["tests/difftrain/test_resume.py"], ["tests/difftrain/test_distributed.py"]),
    TRAIN: (LOOP, RESUME),
    RUNTIME: (LOOP, ["tests/difftrain/test_distributed.py"]),
    METRICS: (["tests/difftrain/test_metrics.py"], RESUME),
    SCHEDULE: (["tests/difftrain/test_schedule.py"],),
    DATA: (["tests/difftrain/test_data.py"], RESUME),
    CORRUPTION: (["tests/difftrain/test_corruption.py"],),
}
# (file, what is wrong, text, replacement); all occurrences are replaced.
MUTANTS = [
    (CHECKPOINT, "digests go unchecked", "if _digest(path) != stored[file]:", "if not stored[file]:"),
    (CHECKPOINT, "files are not flushed", "aside / DIGESTS, aside / OPTIMIZER, aside):", "aside / DIGESTS, aside / OPTIMIZER, aside)[:0]:"),
    (CHECKPOINT, "not read back before it appears", "    open_checkpoint(aside)\n", ""),
    (CHECKPOINT, "one too many deleted", "[: -config.keep_checkpoints]", "[: 1 - config.keep_checkpoints or None]"),
    (CHECKPOINT, "the best one deleted", 'kept = {read_pointer(home, "best"), read_pointer(home, "latest")}', 'kept = {read_pointer(home, "latest")}'),
    (CHECKPOINT, "the latest one deleted", 'kept = {read_pointer(home, "best"), read_pointer(home, "latest")}', 'kept = {read_pointer(home, "best")}'),
    (CHECKPOINT, "deleted under its name", '_remove(old.rename(home / f".removed-{old.name}"))', "_remove(old)"),
    (CHECKPOINT, "a pointer's digest goes unchecked", "text == _pointer_text(target) and ", ""),
    (CHECKPOINT, "leftovers stay", '[*home.glob(".writing-*"), ', "["),
    (CHECKPOINT, "a replaced checkpoint is not put back", "                old.rename(original)", "                pass"),
    (CHECKPOINT, "the oldest is resumed", "reversed(_step_folders(", "list(_step_folders("),
    (SAVER, "the state is not copied", '.to("cpu", copy=True)', '.to("cpu")'),
    (SAVER, "two saves at once", '        self.finish()\n        if is_sharded', "        if is_sharded"),
    (SAVER, "the last save is not waited for", "        if kind is None:\n            self.finish()", "        if kind is None:\n            pass"),
    (RUN, "fp16's scale is not restored", 'self.scaler.load_state_dict(state["scaler"])', "pass"),
    (RUN, "moments are not restored", "restore_optimizer(self.model, self.optimizer, checkpoint.read_optimizer)", "pass"),
    (RUN, "the best loss is not restored", 'self.best_loss, self.best_step = float(state["best_loss"]), state["best_step"]', "pass"),
    (RUN, "the usual norm is not restored", 'self.usual_norm, self.norms = float(state["usual_norm"]), int(state["norms"])', "pass"),
    (RUN, "dropout repeats in every step", 'f"dropout {seed} {step} {rank}"', 'f"dropout {seed} {rank}"'),
    (RUN, "dropout is not seeded by the step", "        if config.dropout > 0:\n", "        if config.dropout > 1:\n"),
    (RUN, "weights pass through fp32", "            checkpoint.load_weights(model)", "            checkpoint.load_weights(model.float())\n            model.to(runtime.device, torch.float64 if runtime.dtype == torch.float64 else None)"),
    (RUN, "a bad step is applied", "if not (is_bad or is_spike):", "if True:"),
    (RUN, "each process judges for itself", "is_bad, *flags = self.runtime.any_process(not math.isfinite(total), *flags)", "is_bad = not math.isfinite(total)"),
    (RUN, "bad steps need not be in a row", "            self.bad_steps = 0\n", "            pass\n"),
    (RUN, "accumulated gradients are not divided", "self.scaler.scale(loss / self.micro_steps)", "self.scaler.scale(loss)"),
    (TRAIN, "a resumed step is evaluated twice", "if is_due and not run.is_evaluated and not is_stopping:", "if is_due and not is_stopping:"),
    (TRAIN, "the best pointer is not put right", '    point_to_best(run.folder / "checkpoints", run.best_step)\n', ""),
    (CHECKPOINT, "the best pointer is never moved", "    point_to_best(home, best_step)\n", ""),
    (CHECKPOINT, "a stray file passes", "sorted({*stored, *_files(folder)} - {DIGESTS})", "sorted(stored)"),
    (CHECKPOINT, "a full disk hides in the writer's text", "if number and not isinstance(error, OSError):", "if False:"),
    (TRAIN, "one step more", "is_last = run.step == config.max_iters", "is_last = run.step > config.max_iters"),
    (TRAIN, "the best at the penalties of the moment", 'record["loss_final"]', 'record["loss"]'),
    (TRAIN, "a stop does not save", "if run.saved_step != run.step:", "if run.saved_step > run.step:"),
    (RUNTIME, "torchrun's echo of Ctrl-C counts as a second one", "> ONE_KEYSTROKE:", "> 0:"),
    (METRICS, "a resumed step's record stands twice", "< (step, is_evaluated)]", "<= (step, is_evaluated)]"),
    (SCHEDULE, "a warmup of 0 divides by it", "if step >= config.masking_warmup_iters:", "if step > config.masking_warmup_iters:"),
    (SCHEDULE, "pk grows from 0", "return 1.0 + ratio * (config.penalty_keep_mask - 1.0)", "return ratio * config.penalty_keep_mask"),
    (SCHEDULE, "the first step learns nothing", "(step + 1) / (config.warmup_iters + 1)", "step / (config.warmup_iters + 1)"),
    (DATA, "samples depend on the number of processes", "(rank * micro_steps + micro_step)", "(micro_step * world_size + rank)"),
    (DATA, "every step takes the same samples", "first = step * config.global_batch_size + ", "first = "),
    (DATA, "the last token is never seen", "(len(tokens) - length + 1)", "(len(tokens) - length)"),
    (CORRUPTION, "one more masked", "is_masked = rank < n_mask[:, None]", "is_masked = rank <= n_mask[:, None]"),
    (CORRUPTION, "a word replaced by itself", "other = other + (other >= tokens).long()", "other = other + 0"),
    (CORRUPTION, "a wrong word's target is the word", "y = torch.where(is_replaced, mask_id, tokens)", "y = tokens"),
    (CORRUPTION, "more is corrupted than allowed", "u_replace * (max_corruption - mask_rate)", "u_replace * max_corruption"),
]  # fmt: skip
