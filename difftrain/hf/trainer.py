"""DiffusionLossTrainer: transformers' Trainer with the curriculum's penalties and a divisor counted over the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.hf.collating import DataCollatorForDiffusion, checked_config
from difftrain.hf.patching import NAME, OPTIONS, Patched
from difftrain.loss import loss_terms
from difftrain.schedule import final_penalties, masking_penalties

Curriculum = Config | Callable[[int], Mapping[str, Any]] | None


class DiffusionLossTrainer(Trainer):
    """transformers' Trainer for a model that :func:`difftrain.hf.patch` has patched.

    - The penalties follow ``state.global_step``, also after a resume.
    - The loss is divided by the labels that count in all micro-batches and processes of the step, so that
      accumulation trains as one large batch. Where batches hold ``normalizer``, or the patch does, the sum
      of theirs is the divisor.
    - A :class:`DataCollatorForDiffusion` corrupts otherwise in each epoch. Evaluation sees the same corruption
      each time, at the final penalties of a configuration; it makes no logits, and gives the loss alone.

    Args:
        curriculum: a configuration, whose penalties, their warmup and schedules, and terms are taken; or a function
            from the step, counted from 0, to options of the loss, which evaluation is given too; None: those of
            the patch, and where it has none the configuration of a :class:`DataCollatorForDiffusion`.
        args, kwargs: the Trainer's own.

    Raises:
        UserError: a model that is not patched; options of the Trainer that ask for logits or another loss.
    """

    def __init__(self, *args: Any, curriculum: Curriculum = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(curriculum, Config):
            checked_config(curriculum)
        elif curriculum is not None and not callable(curriculum):
            what = type(curriculum).__name__
            raise UserError(f"curriculum must be a Config or a function of the step, got {what}")
        self.patched = _patch_of(self.model)
        collator = self.data_collator
        if (
            curriculum is None
            and not self.patched.options
            and isinstance(collator, DataCollatorForDiffusion)
        ):
            curriculum = collator.config
        self.curriculum = curriculum
        unwanted = {
            "compute_metrics": self.compute_metrics is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.label_smoother is not None,
        }
        if asked := [name for name, is_set in unwanted.items() if is_set]:
            raise UserError(f"{asked[0]} must not be given: there are no logits (see difftrain.hf.patch)")
        if self.args.n_gpu > 1:
            raise UserError(f"one process must have one GPU, got {self.args.n_gpu}: launch with torchrun")
        self.args.prediction_loss_only = True
        self.label_names = ["labels"]  # whatever was asked for: without them no evaluation has a loss
        # Whatever the Trainer thinks of the model: the loss that it gets is divided for the whole step.
        self.model_accepts_loss_kwargs = True
        if isinstance(collator, DataCollatorForDiffusion):
            self._check_collator(collator)
            self.args.remove_unused_columns = False  # it takes what it needs
            self.add_callback(_Epochs(collator))

    def _check_collator(self, collator: DataCollatorForDiffusion) -> None:
        """That the batches are meant as the loss reads them."""
        pairs = {
            "mask_id": (collator.mask_id, self.patched.mask_id),
            "ignore_index": (collator.ignore_index, self.patched.ignore_index),
        }
        if isinstance(self.curriculum, Config):
            pairs["recipe"] = (collator.config.recipe, self.curriculum.recipe)
        for name, (theirs, ours) in pairs.items():
            if theirs != ours:
                where = "curriculum" if name == "recipe" else "patch"
                raise UserError(f"{name} of the collator must be the {where}'s, {ours}, got {theirs}")

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the Trainer keeps: also options of the loss, whatever model is wrapped around the patched."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in OPTIONS if name not in self._signature_columns]

    def loss_options(self, is_training: bool) -> dict[str, Any]:
        """The options of the loss at the present step, or of an evaluation."""
        if self.curriculum is None:
            return {}
        step = self.state.global_step
        if not isinstance(self.curriculum, Config):
            options = dict(self.curriculum(step))
            if unwanted := [name for name in ("shift", "normalizer") if name in options]:
                raise UserError(
                    f"{unwanted[0]} must be an option of patch or in batches: it sets the divisor"
                )
            return options
        config = self.curriculum
        pk, pm = masking_penalties(step, config) if is_training else final_penalties(config)
        return loss_terms(config) | {"pk": pk, "pm": pm}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step and their divisor, each process's share of that of all."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = sum(self._share(batch, device) for batch in batches)
        if batches and self.args.average_tokens_across_devices and self.args.world_size > 1:
            # DDP and FSDP take the mean of the processes' gradients.
            total = self.accelerator.gather(total).sum() / self.accelerator.num_processes
        return batches, total if batches else None

    def _share(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        share = batch.get("normalizer", self.patched.options.get("normalizer"))
        if share is None:
            _check_labels(batch)
            given = {"shift": batch["shift"]} if "shift" in batch else {}
            return self.patched.count(batch["labels"], given).to(device)
        return torch.as_tensor(share, dtype=torch.float32, device=device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch over the divisor of its step; in evaluation over its own."""
        _check_labels(inputs)
        options = self.loss_options(model.training)
        if model.training and num_items_in_batch is not None:
            options["normalizer"] = num_items_in_batch
        outputs = model(**{**inputs, **options})
        if outputs.get("logits") is not None:
            raise UserError("the model must stay patched while it trains, got one that makes logits")
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, which without labels would make logits and give no loss."""
        _check_labels(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's own, with the collator's evaluation."""
        with self._evaluating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's own, with the collator's evaluation."""
        with self._evaluating():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        collator = self.data_collator
        if isinstance(collator, DataCollatorForDiffusion):
            self.data_collator = collator.for_evaluation()
        try:
            yield
        finally:
            self.data_collator = collator


class _Epochs(TrainerCallback):
    """Tells the collator each epoch's number."""

    def __init__(self, collator: DataCollatorForDiffusion) -> None:
        self.collator, self.next = collator, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.next = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.set_epoch(self.next)
        self.next += 1


def _check_labels(batch: Mapping[str, Any]) -> None:
    if "labels" not in batch:
        raise UserError("batches must have labels, as those of DataCollatorForDiffusion do")


def _patch_of(model: nn.Module) -> Patched:
    for module in model.modules():
        if NAME in vars(module):
            return vars(module)[NAME]
    raise UserError(
        f"model must be patched first: difftrain.hf.patch(model, mask_id), got {type(model).__name__}"
    )
