"""Faults for mutants.py in the trainer: checkpoints, resuming, data, corruption, schedules and commands."""

FOLDER, READING, WRITING, SAVER, STEP, LOOP, RUNTIME, LOG, SCHEDULE, CORPUS, CORRUPTION = (
    f"difftrain/{name}.py"
    for name in (
        "checkpoints/folder", "checkpoints/reading", "checkpoints/writing", "checkpoints/saver",
        "training/step", "training/loop", "runtime", "reporting/log", "schedule", "data/corpus", "data/corruption",
    )
)  # fmt: skip
BUDGET, CONSOLE, SOURCES, ERRORS, FILL, TEXTS, CLI, CLI_SAMPLE, QUESTIONS = (
    f"difftrain/{name}.py"
    for name in (
        "training/budget", "training/console", "config/sources", "errors", "sampling/fill", "sampling/texts",
        "cli/__init__", "cli/sample", "cli/questions",
    )
)  # fmt: skip
CLOSED_TESTS = ["tests/difftrain/test_closed_output.py"]
BUDGET_TESTS = ["tests/difftrain/test_budget.py"]
RESUME_TESTS = ["tests/difftrain/test_resume.py", "-k", "float32 or samples"]
TRAIN_TESTS = ["tests/difftrain/test_train.py", "-k", "not full_disk"]
# In this order; a fault is killed by the first stage that fails.
CHECKPOINT_STAGES = (
    ["tests/difftrain/test_checkpoint.py"],
    ["tests/difftrain/test_train.py", "-k", "full_disk"],
    ["tests/difftrain/test_kills.py"],
    TRAIN_TESTS,
)
STAGES = {
    FOLDER: CHECKPOINT_STAGES,
    READING: CHECKPOINT_STAGES,
    WRITING: CHECKPOINT_STAGES,
    SAVER: (["tests/difftrain/test_saver.py"], TRAIN_TESTS),
    STEP: (
        TRAIN_TESTS,
        RESUME_TESTS,
        ["tests/difftrain/test_resume.py"],
        ["tests/difftrain/test_distributed.py"],
    ),
    LOOP: (TRAIN_TESTS, RESUME_TESTS, CLOSED_TESTS, BUDGET_TESTS, ["tests/difftrain/test_cli.py"]),
    RUNTIME: (TRAIN_TESTS, ["tests/difftrain/test_distributed.py"]),
    LOG: (["tests/difftrain/test_metrics.py"], RESUME_TESTS),
    SCHEDULE: (["tests/difftrain/test_schedule.py"],),
    CORPUS: (["tests/difftrain/test_data.py"], RESUME_TESTS),
    CORRUPTION: (["tests/difftrain/test_corruption.py"],),
    BUDGET: (BUDGET_TESTS,),
    SOURCES: (["tests/difftrain/test_config.py"], BUDGET_TESTS),
    CONSOLE: (CLOSED_TESTS,),
    CLI: (CLOSED_TESTS,),
    CLI_SAMPLE: (CLOSED_TESTS,),
    ERRORS: (["tests/difftrain/test_errors.py"],),
    FILL: (["tests/difftrain/test_sample.py"],),
    TEXTS: (["tests/difftrain/test_sample.py"],),
    QUESTIONS: (["tests/difftrain/test_questions.py"],),
}
# (file, what is wrong, text, replacement); all occurrences are replaced.
MUTANTS = [
    (READING, "digests go unchecked", "if digest_of(path) != stored[file]:", "if not stored[file]:"),
    (WRITING, "files are not flushed", "aside / DIGESTS, aside / OPTIMIZER, aside):", "aside / DIGESTS, aside / OPTIMIZER, aside)[:0]:"),
    (WRITING, "not read back before it appears", "    open_checkpoint(aside)\n", ""),
    (WRITING, "one too many deleted", "[: -config.keep_checkpoints]", "[: 1 - config.keep_checkpoints or None]"),
    (WRITING, "the best one deleted", 'kept = {read_pointer(home, "best"), read_pointer(home, "latest")}', 'kept = {read_pointer(home, "latest")}'),
    (WRITING, "the latest one deleted", 'kept = {read_pointer(home, "best"), read_pointer(home, "latest")}', 'kept = {read_pointer(home, "best")}'),
    (WRITING, "deleted under its name", '_remove(old.rename(home / f".removed-{old.name}"))', "_remove(old)"),
    (FOLDER, "a pointer's digest goes unchecked", "text == pointer_text(target) and ", ""),
    (WRITING, "leftovers stay", '[*home.glob(".writing-*"), ', "["),
    (FOLDER, "a replaced checkpoint is not put back", "                old.rename(original)", "                pass"),
    (READING, "the oldest is resumed", "reversed(step_folders(", "list(step_folders("),
    (SAVER, "the state is not copied", '.to("cpu", copy=True)', '.to("cpu")'),
    (SAVER, "two saves at once", '        self.finish()\n        if is_sharded', "        if is_sharded"),
    (SAVER, "the last save is not waited for", "        if kind is None:\n            self.finish()", "        if kind is None:\n            pass"),
    (STEP, "fp16's scale is not restored", 'self.scaler.load_state_dict(state["scaler"])', "pass"),
    (STEP, "moments are not restored", "restore_optimizer(self.model, self.optimizer, checkpoint.read_optimizer)", "pass"),
    (STEP, "the best loss is not restored", 'self.best_loss, self.best_step = float(state["best_loss"]), state["best_step"]', "pass"),
    (STEP, "the usual norm is not restored", 'self.usual_norm, self.norms = float(state["usual_norm"]), int(state["norms"])', "pass"),
    (STEP, "dropout repeats in every step", 'f"dropout {seed} {step} {rank}"', 'f"dropout {seed} {rank}"'),
    (STEP, "dropout is not seeded by the step", "        if config.dropout > 0:\n", "        if config.dropout > 1:\n"),
    (STEP, "weights pass through fp32", "            checkpoint.load_weights(model)", "            checkpoint.load_weights(model.float())\n            model.to(runtime.device, torch.float64 if runtime.dtype == torch.float64 else None)"),
    (STEP, "a bad step is applied", "if not (is_bad or is_spike):", "if True:"),
    (STEP, "each process judges for itself", "is_bad, *flags = self.runtime.any_process(not math.isfinite(total), *flags)", "is_bad = not math.isfinite(total)"),
    (STEP, "bad steps need not be in a row", "            self.bad_steps = 0\n", "            pass\n"),
    (STEP, "accumulated gradients are not divided", "self.scaler.scale(loss / self.micro_steps)", "self.scaler.scale(loss)"),
    (LOOP, "a resumed step is evaluated twice", "if is_due and not run.is_evaluated and not is_stopping:", "if is_due and not is_stopping:"),
    (LOOP, "the best pointer is not put right", '    point_to_best(run.folder / "checkpoints", run.best_step)\n', ""),
    (WRITING, "the best pointer is never moved", "    point_to_best(home, best_step)\n", ""),
    (READING, "a stray file passes", "sorted({*stored, *files_below(folder)} - {DIGESTS})", "sorted(stored)"),
    (WRITING, "a full disk hides in the writer's text", "if number and not isinstance(error, OSError):", "if False:"),
    (LOOP, "one step more", "is_last = run.step == config.max_iters", "is_last = run.step > config.max_iters"),
    (LOOP, "the best at the penalties of the moment", 'record["loss_final"]', 'record["loss"]'),
    (LOOP, "a stop does not save", "if run.saved_step != run.step:", "if run.saved_step > run.step:"),
    (RUNTIME, "torchrun's echo of Ctrl-C counts as a second one", "> ONE_KEYSTROKE:", "> 0:"),
    (LOG, "a resumed step's record stands twice", "< (step, is_evaluated)]", "<= (step, is_evaluated)]"),
    (SCHEDULE, "a warmup of 0 divides by it", "if step >= config.masking_warmup_iters:", "if step > config.masking_warmup_iters:"),
    (SCHEDULE, "pk grows from 0", "return 1.0 + ratio * (config.penalty_keep_mask - 1.0)", "return ratio * config.penalty_keep_mask"),
    (SCHEDULE, "the first step learns nothing", "(step + 1) / (config.warmup_iters + 1)", "step / (config.warmup_iters + 1)"),
    (CORPUS, "samples depend on the number of processes", "(rank * micro_steps + micro_step)", "(micro_step * world_size + rank)"),
    (CORPUS, "every step takes the same samples", "first = step * config.global_batch_size + ", "first = "),
    (CORPUS, "the last token is never seen", "(len(tokens) - length + 1)", "(len(tokens) - length)"),
    (CORRUPTION, "one more masked", "is_masked = rank < n_mask[:, None]", "is_masked = rank <= n_mask[:, None]"),
    (CORRUPTION, "a word replaced by itself", "other = other + (other >= tokens).long()", "other = other + 0"),
    (CORRUPTION, "a wrong word's target is the word", "y = torch.where(is_replaced, mask_id, tokens)", "y = tokens"),
    (CORRUPTION, "more is corrupted than allowed", "u_replace * (max_corruption - mask_rate)", "u_replace * max_corruption"),
    (BUDGET, "every process goes by its own clock", "runtime.sum_over_processes(seconds * runtime.is_main)", "seconds"),
    (BUDGET, "evaluations cost nothing", " - evaluations * evaluation_seconds\n", "\n"),
    (BUDGET, "one slow step is taken for all", "statistics.median", "statistics.mean"),
    (BUDGET, "too few steps on a slow machine", "config.min_iters), config.max_iters)", "1), config.max_iters)"),
    (BUDGET, "the curriculum keeps its length", '"masking_warmup_iters", ', ""),
    (BUDGET, "evaluations move in the run", "SHARES = 40", "SHARES = 800"),
    (SOURCES, "a preset's budget cuts the steps asked for", 'if "max_iters" in explicit:', "if False:"),
    (LOOP, "a resumed run gets another end", "if resume and config.budget_minutes:", "if False:"),
    (LOOP, "a run that nobody reads goes on", "stop.requested or say.is_closed, saver.has_failed", "stop.requested, saver.has_failed"),
    (LOOP, "the last figures wait for the last save", "        say(summary_line(record))  # before the last save is waited for, which can fail\n", "    say(summary_line(record))\n"),
    (LOOP, "a configuration is shown, then checked", "    checkpoint, corpus = runtime", "    say(configuration_text(config))\n    checkpoint, corpus = runtime"),
    (CONSOLE, "a closed pipe ends a run in the middle", "except BrokenPipeError:", "except ZeroDivisionError:"),
    (CONSOLE, "a run that nobody reads ends as if read", "        if self.is_closed:\n", "        if False:\n"),
    (CLI, "the interpreter's end meets the closed pipe", "os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())", "pass"),
    (CLI, "a closed pipe fails like a full disk", "    except BrokenPipeError:\n        return _leave(PIPE_CLOSED)\n", ""),
    (CLI, "a help hides that nobody reads it", "    def print_help(", "    def _print_help("),
    (CLI_SAMPLE, "a text is lost that cannot be kept", "except OSError as error:", "except ZeroDivisionError as error:"),
    (CLI_SAMPLE, "a text that nobody reads is not kept", "    finally:", "    except ZeroDivisionError:"),
    (ERRORS, "a missing extra is an accident", "except ImportError:", "except ZeroDivisionError:"),
    (FILL, "the context outgrows block_size", "x[:, -block_size:]", "x"),
    (FILL, "the context stays at the beginning", "x[:, -block_size:]", "x[:, :block_size]"),
    (TEXTS, "a text's name may be taken", '.txt").exists():', '.txt").exists() and False:'),
    (TEXTS, "gpt2 stops at block_size", "if length > block_size and not is_causal:", "if length > block_size:"),
    (QUESTIONS, "a driver that hangs ends the question", "except (OSError, subprocess.TimeoutExpired):", "except OSError:"),
]  # fmt: skip
