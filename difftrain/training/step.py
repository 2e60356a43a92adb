"""A run between two steps: its model, optimiser and bookkeeping, and what one step does to them."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from difftrain.checkpoints.reading import Checkpoint
from difftrain.config import Config
from difftrain.config.schedules import CORRUPTION
from difftrain.data import Corpus, corrupt_by_recipe, count_masked, sample_indices
from difftrain.data.self_errors import choose_errors, draw_errors
from difftrain.errors import UserError
from difftrain.evaluation import FIXED, LEVELS, TRAINING, evaluate, make_validation_set
from difftrain.exchange.warm_start import warm_start
from difftrain.loss import bent_logits, choose_loss, loss_terms, model_loss, token_weights, wants_count
from difftrain.model import Transformer, make_optimizer, restore_optimizer
from difftrain.parallel import gradient_sync, replicate, reshard, shard, whole
from difftrain.reporting.lines import console_line
from difftrain.reporting.records import loss_metrics
from difftrain.runtime import Runtime
from difftrain.schedule import (
    PenaltyTensors,
    advanced,
    case_weights,
    learning_rate,
    masking_penalties,
    other_values,
    reached_of,
)
from difftrain.training.annealing import visible
from difftrain.training.verdict import Judge, Verdict
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import MASKED


class LiveRun:
    """Everything that a step changes or needs; what must survive a stop is in :meth:`state`."""

    def __init__(
        self, config: Config, runtime: Runtime, corpus: Corpus, checkpoint: Checkpoint | None, say: Any
    ):
        self.config, self.runtime, self.corpus, self.say = config, runtime, corpus, say
        self.folder = Path(config.out_dir)
        self.mask_id = corpus.vocabulary.mask_id
        torch.manual_seed(config.seed)
        model = Transformer(config, corpus.vocabulary.vocab_size)
        model.to(runtime.device, torch.float64 if runtime.dtype == torch.float64 else None)
        if checkpoint:
            checkpoint.load_weights(model)
        elif config.init_from:
            for line in warm_start(model, config, corpus.vocabulary):
                say(f"init_from: {line}")
        shard(model, config, runtime)
        self.model = model
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
        self.compiled = torch.compile(model) if config.compile == "model" else model
        self.network = replicate(self.compiled, runtime)
        # A number that changes would be compiled again, so a compiled step reads its penalties from tensors.
        is_one_graph = config.compile == "step"
        self.penalties = PenaltyTensors(runtime.device) if is_one_graph else None
        self.loss = torch.compile(model_loss) if is_one_graph else model_loss
        self.loss_impl = choose_loss(config, corpus.vocabulary.vocab_size, runtime)
        self.terms = loss_terms(config)
        self.tells_count = wants_count(config, self.loss_impl, runtime)
        self.micro_steps, _ = config.micro_batches(runtime.world_size)

        self.validation_set = make_validation_set(corpus, config)
        self.unigram_entropy = corpus.unigram_entropy()
        # What the best loss is measured by: a best of another measure says nothing.
        self.measure = [self.validation_set.id, config.penalty_keep_mask, config.penalty_mask_correct]
        self.measure += [self.terms] if self.terms else []
        self.step = self.saved_step = 0
        self.best_loss, self.best_step, self.is_evaluated = math.inf, None, False
        self.reached: dict[str, list[int]] = {}  # of the schedules that wait for a metric
        self.judge = Judge(config, runtime, say)
        if checkpoint:
            self._restore(checkpoint)
        else:
            self.saved_step = -1
        self.title = (
            f"{model.n_parameters():,} parameters on {runtime.device} in {runtime.dtype_name}, "
            f"{len(corpus.train):,} training tokens, vocabulary {corpus.vocabulary.vocab_size}, "
            f"{runtime.world_size} process(es), steps {self.step} to {config.max_iters}"
        )

    def state(self) -> dict[str, Any]:
        """What the steps have made beside weights and moments, and what data they were made with.

        The rest is a function of these and the step: learning rate, penalties, data order, corruption, and
        the random numbers of dropout, which are seeded anew in each step.
        """
        return {
            "scaler": self.scaler.state_dict(),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "measure": self.measure,
            "data": self.corpus.record,
            "is_evaluated": self.is_evaluated,
            "schedules": self.reached,
            **self.judge.state(),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        restore_optimizer(self.model, self.optimizer, checkpoint.read_optimizer)
        self.step = self.saved_step = checkpoint.step
        try:
            state = checkpoint.state
            if state["scaler"]:  # empty where the run was not in fp16
                self.scaler.load_state_dict(state["scaler"])
            self.judge.restore(state)
            self.reached = reached_of(state, self.config)
            if state["measure"] == self.measure:
                self.best_loss, self.best_step = float(state["best_loss"]), state["best_step"]
                self.is_evaluated = bool(state["is_evaluated"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{checkpoint.folder} does not fit this version of difftrain: {error!r}"
            ) from None

    def evaluate(self) -> dict[str, Any]:
        """One pass over the validation set, as a metrics record."""
        pk, pm = masking_penalties(self.step, self.config, self.reached)
        weights = case_weights(self.step, self.config, self.reached)
        tables = evaluate(
            self.compiled, self.validation_set, self.mask_id, self.runtime, self.loss_impl, **self.terms
        )
        reshard(self.model)
        record = {
            "kind": "eval",
            "step": self.step,
            **loss_metrics(tables[FIXED], pk, pm, self.config, weights),
        }
        record |= {"pk": pk, "pm": pm, "lr": learning_rate(self.step, self.config, self.reached)}
        record |= {"validation_id": self.validation_set.id, "unigram_entropy": self.unigram_entropy}
        if self.config.mode == "diffusion":
            levels = [*LEVELS, TRAINING]
            record["masked_nll"] = {level: tables[level].mean_nll()[MASKED].item() for level in levels}
        self.say(console_line(record))
        before, self.reached = self.reached, advanced(self.reached, record, self.config)
        for name, (stage, _) in self.reached.items():
            if self.reached[name] != before.get(name):
                value = self.config.scheduled[name]["values"][stage]
                self.say(f"schedule: {name} moves on to {value:g}")
        return record

    def gradients(self, lr: float, *, is_logged: bool) -> tuple[Tensor, list[CaseTable]]:
        """Forward and backward over the step's micro-batches: the sum of their losses, and their tables if logged."""
        config, runtime = self.config, self.runtime
        values = other_values(self.step, config, self.reached)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if "weight_decay" in values:
            self.optimizer.param_groups[0]["weight_decay"] = values["weight_decay"]  # of matrices
        corruption = {name: value for name, value in values.items() if name in CORRUPTION}
        share = values.get("self_errors", config.self_errors)
        own_errors = functools.partial(self._own_errors, share=share) if share else None
        terms = self.terms | {name: value for name, value in values.items() if name == "label_smoothing"}
        if config.dropout > 0:
            _seed_dropout(config.seed, self.step, runtime.rank)
        pk, pm = (self.penalties.update if self.penalties else masking_penalties)(
            self.step, config, self.reached
        )
        by_case = case_weights(self.step, config, self.reached)
        if by_case is not None:  # which holds the penalties too
            pk = pm = None
            terms["case_weights"] = self.penalties.update_cases(by_case) if self.penalties else by_case
        # What backward will pass to each loss, told beforehand; fp16's scale is known on the device alone.
        upstream_scale = None if self.scaler.is_enabled() else 1 / self.micro_steps
        wants_tables = is_logged or bool(
            self.penalties
        )  # always, where asking now and then would compile twice
        loss_sum, tables = torch.zeros((), dtype=torch.float32, device=runtime.device), []
        self.model.visible = visible(self.step, config.block_size, config, runtime.device)
        for micro_step in range(self.micro_steps):
            samples = sample_indices(self.step, micro_step, runtime.rank, runtime.world_size, config)
            x, y, weights = _make_batch(self.corpus, samples, config, runtime, corruption, own_errors)
            count = {}
            if self.tells_count:
                count["counted"] = count_masked(samples, config, split="train")
            with gradient_sync(self.network, micro_step == self.micro_steps - 1):
                loss = self.loss(
                    self.network, x, y, self.mask_id, pk, pm,
                    runtime=runtime, impl=self.loss_impl, return_cases=wants_tables, upstream_scale=upstream_scale,
                    **count, token_weights=weights, **terms,
                )  # fmt: skip
                if wants_tables:
                    loss, table = loss
                    tables.append(table)
                self.scaler.scale(loss / self.micro_steps).backward()
            loss_sum += loss.detach()
        self.model.visible = None
        self.scaler.unscale_(self.optimizer)
        return loss_sum, tables

    def _own_errors(self, tokens: Tensor, x: Tensor, samples: Tensor, *, share: float) -> Tensor:
        """x with a share of its wrong words drawn from what the model says in their place; without gradient."""
        is_own, u = choose_errors(
            tokens, x, samples, seed=self.config.seed, mask_id=self.mask_id, share=share
        )
        self.compiled.eval()
        with torch.no_grad(), self.runtime.autocast():
            logits = bent_logits(self.compiled, self.mask_id, self.config)(
                torch.where(is_own, self.mask_id, x)
            )
        self.compiled.train()
        return torch.where(is_own, draw_errors(logits, tokens, u, self.mask_id), x)

    def update(self, loss_sum: Tensor, is_stopping: bool = False, has_failed: bool = False) -> None:
        """Apply the gradients unless they are no good, and count the step; :meth:`settle` tells what became of it.

        Nothing waits for the device. The step before must have been settled. The flags are the process's own,
        those of :class:`Verdict` any process's.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        # What GradScaler gives a fused optimiser: it divides the gradients by the one as it reads them, and where
        # the other is 1 leaves everything as it was.
        if self.config.grad_clip:
            self.optimizer.grad_scale = ((norm + 1e-6) / self.config.grad_clip).clamp(min=1.0).float()
        self.optimizer.found_inf = self.judge.rules_out(self.step, norm, loss_sum, is_stopping, has_failed)
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.is_evaluated = self.step + 1, False

    def settle(self) -> Verdict:
        """What became of the last update, if that is not known yet; raises TrainingFailed after too many bad steps.

        It waits for that update and no longer: called when the next step's passes are under way, it
        leaves the device with work.
        """
        return self.judge.settle()


def _make_batch(
    corpus: Corpus,
    samples: Tensor,
    config: Config,
    runtime: Runtime,
    corruption: Mapping[str, float] = MappingProxyType({}),
    own_errors: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, y and token weights, if any, of the given training samples, on the device.

    ``corruption`` holds the step's own values of options that say how much is corrupted; ``own_errors``
    makes x of (tokens, x, samples).
    """
    if config.mode == "gpt2":
        tokens = corpus.windows("train", samples, seed=config.seed, length=config.block_size + 1)
        tokens = runtime.to_device(tokens)
        return tokens[:, :-1], tokens[:, 1:], None
    tokens = corpus.windows("train", samples, seed=config.seed, length=config.block_size)
    tokens, samples = runtime.to_device(tokens), runtime.to_device(samples)
    x, y, p_mask = corrupt_by_recipe(
        tokens,
        samples,
        config,
        split="train",
        vocab_size=corpus.vocabulary.vocab_size,
        counts=corpus.unigram_counts if config.replacement == "unigram" else None,
        changes=corruption,
    )
    if own_errors:
        x = own_errors(tokens, x, samples)
    return x, y, token_weights(x, p_mask, corpus.vocabulary.mask_id, config)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that a resumed run drops the same units."""
    digest = hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
