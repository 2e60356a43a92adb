"""The loss in a training script as nanoGPT has it: one function is replaced, the loop stays.

    python examples/nanogpt_loop.py          # after make install, with .venv/bin/python

A character model reads its own source text, in seconds on a CPU.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from difftrain import fused_diffusion_loss

batch_size, block_size, width, learning_rate, max_iters = 16, 32, 64, 3e-3, 60

text = Path(__file__).read_text(encoding="utf-8")
characters = sorted(set(text))
data = torch.tensor([characters.index(c) for c in text])
mask_id, vocab_size = len(characters), len(characters) + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, x):  # no causal mask: every position sees the whole block
        return self.head(self.block(self.tokens(x) + self.places(torch.arange(x.shape[1]))))


def get_batch(generator):
    """Clean text -> x, what the model sees, and y, what it should answer."""
    starts = torch.randint(len(data) - block_size, (batch_size, 1), generator=generator)
    clean = data[starts + torch.arange(block_size)]
    chance = torch.rand(clean.shape, generator=generator)
    wrong = torch.randint(mask_id, clean.shape, generator=generator)
    x = torch.where(chance < 0.4, mask_id, torch.where(chance < 0.5, wrong, clean))
    y = torch.where((x != mask_id) & (x != clean), mask_id, clean)  # a wrong character is to be flagged
    return x, y


def eager_loss(logits, y, x, mask_id, pk, pm):
    """Before: what is replaced."""
    nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    says_mask = logits.argmax(-1) == mask_id
    weight = torch.ones_like(nll)
    weight[(x == mask_id) & (y != mask_id) & says_mask] = pk
    weight[(x == y) & (x != mask_id) & says_mask] = pm
    return (weight * nll).mean()


def train(loss_function=fused_diffusion_loss, steps=max_iters):
    """The losses of all steps."""
    torch.manual_seed(1337)
    generator, model = torch.Generator().manual_seed(1337), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        x, y = get_batch(generator)
        progress = min(1.0, step / 30)  # from "dare to guess" to "be precise"
        pk, pm = 1.0 - 0.75 * progress, 0.5 * progress
        loss = loss_function(model(x), y, x, mask_id, pk, pm)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    train()
