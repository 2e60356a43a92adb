"""Each recipe of difftrain.recipes on a tiny model: one loop, and one line a recipe for what differs.

    python examples/recipes.py          # after make install, with .venv/bin/python; seconds on a CPU

A recipe is a way to corrupt and a way to weigh. All but the specification's mask words and replace none,
so they share the batches: the clean words are the targets, ``t`` is the probability with which those of a
sequence (of a block for BD3-LM) were masked, and the first quarter of each sequence is a prompt where a
recipe has one. Printed is each recipe's own loss on held-out sequences, before and after; the numbers of
two recipes do not compare.
"""

import torch
from torch import nn

from difftrain import fused_diffusion_loss, recipes

words, length, width, mask_id, block = 26, 16, 64, 26, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(words + 1, width), nn.Embedding(length, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words + 1)

    def forward(self, x):
        return self.head(self.block(self.tokens(x) + self.places(torch.arange(length))))


def get_tokens(generator, batch_size):
    """Sequences that count on with a stride from 1 to 3."""
    start = torch.randint(words, (batch_size, 1), generator=generator)
    stride = torch.randint(1, 4, (batch_size, 1), generator=generator)
    return (start + stride * torch.arange(length)) % words


def get_t(generator, batch_size, n=1):
    return 0.05 + 0.95 * torch.rand(batch_size, n, generator=generator)  # not near 0, where 1/t explodes


def mask(generator, tokens, t):
    """x, and which of its words are masked: each with its probability in t, (B, T) or (B, 1)."""
    is_masked = torch.rand(tokens.shape, generator=generator) < t
    return torch.where(is_masked, mask_id, tokens), is_masked


def specification(generator, tokens):
    """Some words masked, some replaced by others, whose target is [MASK]; weights by the answer."""
    x, _ = mask(generator, tokens, t := get_t(generator, len(tokens)))
    is_replaced = (torch.rand(tokens.shape, generator=generator) < 0.5 * (1 - t)) & (x != mask_id)
    other = (tokens + torch.randint(1, words, tokens.shape, generator=generator)) % words
    x, y = torch.where(is_replaced, other, x), torch.where(is_replaced, mask_id, tokens)
    return x, y, recipes.specification(pk=0.25, pm=0.5)


def masked_alone(options):
    """A recipe whose words are masked alone, from its options (is_masked, t) -> dict."""

    def recipe(generator, tokens):
        t = get_t(generator, len(tokens))
        x, is_masked = mask(generator, tokens, t)
        return x, tokens, options(is_masked, t)

    return recipe


def bd3lm(generator, tokens):
    """A probability for each block of words."""
    t = get_t(generator, len(tokens), length // block)
    x, is_masked = mask(generator, tokens, t.repeat_interleave(block, dim=1))
    return x, tokens, recipes.bd3lm(is_masked, t)


def dllm(is_masked, t):
    """dllm's trainer on a prompt and its answer, over the answer's length."""
    options = recipes.mdlm(is_masked, t, is_supervised=~is_prompt(is_masked), normalization="sequence")
    return options | {"forbid_mask": False}


def nemo(is_masked, t):
    is_answer = ~is_prompt(is_masked)
    return recipes.nemo(is_masked, t, is_answer.sum(), is_answer)


def is_prompt(like):
    return (torch.arange(length) < length // 4).expand_as(like)


# name -> recipe(generator, tokens), which gives x, y and options of the loss
RECIPES = {
    "specification": specification,
    "llada": masked_alone(recipes.llada),
    "llada_sft": masked_alone(lambda is_masked, t: recipes.llada_sft(is_masked, t, is_prompt(is_masked))),
    "mdlm": masked_alone(recipes.mdlm),
    "mdlm, cosine": masked_alone(lambda is_masked, t: recipes.mdlm(is_masked, t, schedule="cosine")),
    "dllm": masked_alone(dllm),
    "nemo": masked_alone(nemo),
    "bd3lm": bd3lm,
    "i_dlm": masked_alone(lambda is_masked, t: recipes.i_dlm(is_masked)),
}


def train(recipe, steps=100):
    """A recipe's loss on held-out sequences before the first step and after the last."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_on(batch):
        x, y, options = batch
        return fused_diffusion_loss(model(x), y, x, mask_id, **options)

    held_out = recipe(generator, get_tokens(generator, 256))
    with torch.no_grad():
        before = loss_on(held_out).item()
    for _ in range(steps):
        loss = loss_on(recipe(generator, get_tokens(generator, 64)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return before, loss_on(held_out).item()


if __name__ == "__main__":
    for name, recipe in RECIPES.items():
        before, after = train(recipe)
        print(f"{name:<14} {before:7.3f} -> {after:6.3f}")
