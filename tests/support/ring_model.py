"""A model without training: its texts go round the alphabet, and a word that its neighbours contradict is answered [MASK]."""

import torch
from torch import nn

from difftrain.config import Config
from difftrain.data.vocabulary import Characters
from difftrain.sampling.loaded import Loaded

LETTERS = "abcde"


class Ring(nn.Module):
    """Each place is told by the four around it; what they do not tell is even. Counts its calls."""

    def __init__(self, vocabulary):
        super().__init__()
        self.n, self.calls = vocabulary.n_words, 0
        self.head = nn.Linear(self.n + 1, self.n + 1, bias=False)
        self.head.weight.data = torch.eye(self.n + 1)

    def forward(self, x, *, return_hidden=False, visible=None):
        self.calls += 1
        if visible is not None:  # what nobody sees tells nothing
            x = x.masked_fill(~visible[:, 0, 0], self.n)
        n = len(LETTERS)
        votes = torch.zeros(*x.shape, self.n + 1)
        for d in (-2, -1, 1, 2):
            there = torch.full_like(x, self.n)
            if d < 0:
                there[:, -d:] = x[:, :d]
            else:
                there[:, :-d] = x[:, d:]
            vote = torch.where(there < n, (there - d) % n, self.n)
            votes.scatter_add_(2, vote[..., None], torch.ones(*x.shape, 1))
        votes[..., n:] = 0
        logits = 2.0 * votes
        told, best = votes.max(-1)
        is_wrong = (x < n) & (told >= 2) & (x != best)
        logits[..., self.n] = torch.where(is_wrong, 6.0 + told / 2, -9.0)
        return logits


def ring(tmp_path=None, *, block_size=16, letters=LETTERS, **changes):
    """The model in hand."""
    vocabulary = Characters(tuple(letters))
    config = Config(data="none", block_size=block_size, device="cpu", **changes)
    return Loaded(Ring(vocabulary).eval(), vocabulary, config, 7)
