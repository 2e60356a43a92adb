"""Hugging Face's Trainer without logits: a tiny Qwen learns a tongue twister and fills a gap in it.

python examples/hf_trainer.py          # needs difftrain[hf]; seconds on a CPU, nothing is downloaded
"""

import tempfile

import torch

from difftrain import Config
from difftrain.errors import UserError
from difftrain.hf import DataCollatorForDiffusion, patch

text = "she sells sea shells by the sea shore. " * 8
words = sorted(set(text))
length, mask_id = 24, len(words)
GAP = "sells sea ______ by the "


class Windows(torch.utils.data.Dataset):
    """Every window of the text, clean: the collator corrupts it, and in each epoch otherwise."""

    def __len__(self):
        return len(text) - length

    def __getitem__(self, index):
        return {"input_ids": [words.index(c) for c in text[index : index + length]], "index": index}


def make_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=length,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    model.resize_token_embeddings(mask_id + 1, mean_resizing=False)  # a row for [MASK]
    return patch(model, mask_id)


def train(model, steps=120, **options):
    """The losses that the Trainer logged, and that of an evaluation at the end."""
    from transformers import TrainingArguments

    from difftrain.hf import DiffusionLossTrainer

    curriculum = Config(seed=1, masking_warmup_iters=steps // 4, guaranteed_correct_factor=0.6)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "logging_steps": 20,
            "use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        }  # fmt: skip
        trainer = DiffusionLossTrainer(
            model, TrainingArguments(folder, **arguments | options), train_dataset=Windows(),
            data_collator=DataCollatorForDiffusion(mask_id, mask_id + 1, config=curriculum, index="index"),
            eval_dataset=torch.utils.data.Subset(Windows(), range(39)), curriculum=curriculum,
        )  # fmt: skip
        trainer.train()
        evaluation = trainer.evaluate()["eval_loss"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], evaluation


def fill(model, gap):
    """The text with a word for each _, all at once."""
    ids = torch.tensor([[mask_id if c == "_" else words.index(c) for c in gap]])
    with torch.no_grad():
        answers = model(input_ids=ids).logits[..., :mask_id].argmax(-1)
    return "".join(words[i] for i in torch.where(ids == mask_id, answers, ids)[0])


def main():
    model = make_model()
    train(model)
    print(f"{GAP!r} -> {fill(model.eval(), GAP)!r}")


if __name__ == "__main__":
    try:
        import difftrain.hf

        difftrain.hf.DiffusionLossTrainer  # noqa: B018
        main()
    except UserError as error:  # where transformers or accelerate is missing
        raise SystemExit(str(error)) from None
