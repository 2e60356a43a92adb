"""The loss in Hugging Face's Trainer: a subclass with its own compute_loss. Needs transformers[torch].

    python examples/hf_trainer.py          # after make install, with .venv/bin/python

A tiny BERT with random weights learns counting sequences, in seconds on a CPU; nothing is downloaded.
"""

import tempfile

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from difftrain import fused_diffusion_loss

words, length, mask_id = 26, 16, 26


class Texts(torch.utils.data.Dataset):
    """Sequences that count on by 1 to 3 from anywhere, the first words of a text first."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        return {"tokens": (index + (1 + index % 3) * torch.arange(length)) % words}


def corrupt(examples):
    """The collator: clean tokens -> what the model sees, and as labels what it should answer."""
    clean = torch.stack([example["tokens"] for example in examples])
    chance = torch.rand(clean.shape)
    x = torch.where(chance < 0.4, mask_id, torch.where(chance < 0.5, (clean + 7) % words, clean))
    return {"input_ids": x, "labels": torch.where((x != mask_id) & (x != clean), mask_id, clean)}


class DiffusionTrainer(Trainer):
    loss_function = staticmethod(fused_diffusion_loss)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The loss is a mean over a micro-batch: the Trainer is to divide it by their number.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, y = inputs["input_ids"], inputs["labels"]
        outputs = model(input_ids=x)  # without labels: the model computes no loss of its own
        progress = min(1.0, self.state.global_step / 20)
        pk, pm = 1.0 - 0.75 * progress, 0.5 * progress
        # Where a collator pads, labels of padding are -100: add ignore_index=-100.
        loss = self.loss_function(outputs.logits, y, x, mask_id, pk, pm)
        return (loss, outputs) if return_outputs else loss


def train(trainer_class=DiffusionTrainer, steps=60, **options):
    """The losses that the Trainer logged, one a step."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words + 1, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=length, hidden_dropout_prob=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-2, logging_steps=1,
            use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            **options,
        )  # fmt: skip
        trainer = trainer_class(
            BertForMaskedLM(config), arguments, train_dataset=Texts(), data_collator=corrupt
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = train()
    print(
        *(
            f"step {step}: loss {loss:.4f}"
            for step, loss in enumerate(losses)
            if step % 10 == 0 or step == len(losses) - 1
        ),
        sep="\n",
    )
