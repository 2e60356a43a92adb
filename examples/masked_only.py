"""Masked-only training, as LLaDA and MDLM do it: only [MASK] positions count, and nothing is replaced.

    python examples/masked_only.py          # after make install, with .venv/bin/python

Each sequence has its own share t of masked positions. Intact positions carry ``ignore_index``;
both penalties are 1, so that every weight is 1. With N all positions of the batch, intact ones too:

- ``row_loss.sum() / N`` of ``reduction="none"``, each row divided by its t, is LLaDA's pre-training
  loss (arXiv:2502.09992, equation 3), in which a position's weight is 1/t and nothing else.
- The same, with the logit of [MASK] set to -inf, is MDLM's bound for its log-linear schedule
  (arXiv:2406.07524), in continuous time. Its copying of intact tokens changes no masked position's loss.
- ``reduction="mean"`` leaves 1/t out and equals neither: sequences with much masked weigh more.

What is not theirs: weights that depend on the answer (pk, pm), replaced words, and a target [MASK].
"""

import torch
from torch import nn

from difftrain import fused_diffusion_loss

words, length, width, mask_id = 26, 16, 64, 26


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(words + 1, width), nn.Embedding(length, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words + 1)

    def forward(self, x):
        return self.head(self.block(self.tokens(x) + self.places(torch.arange(length))))


def get_batch(generator, batch_size=64):
    """x with a share t (B, 1) of each sequence masked, and y, which is -1 where nothing is masked."""
    start = torch.randint(words, (batch_size, 1), generator=generator)
    stride = torch.randint(1, 4, (batch_size, 1), generator=generator)
    tokens = (start + stride * torch.arange(length)) % words
    t = 0.05 + 0.95 * torch.rand(batch_size, 1, generator=generator)  # not near 0, where 1/t explodes
    is_masked = torch.rand(tokens.shape, generator=generator) < t
    return torch.where(is_masked, mask_id, tokens), torch.where(is_masked, tokens, -1), t


def masked_loss(logits, x, y, t, mdlm=False):
    """The loss of LLaDA, or of MDLM."""
    if mdlm:  # [MASK] is never an answer
        logits = logits.index_fill(-1, torch.tensor(mask_id), -torch.inf)
    row_loss = fused_diffusion_loss(logits, y, x, mask_id, 1.0, 1.0, ignore_index=-1, reduction="none")
    return (row_loss / t).mean()


def train(steps=80, mdlm=False):
    """The losses of all steps."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        x, y, t = get_batch(generator)
        loss = masked_loss(model(x), x, y, t, mdlm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step}: loss {sum(losses[-20:]) / 20:.4f}")
    return losses


if __name__ == "__main__":
    train()
