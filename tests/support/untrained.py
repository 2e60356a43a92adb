"""A small model that learnt nothing, with weights of a size at which one position tells on another."""

import torch

from difftrain.config import Config
from difftrain.model import Transformer


def untrained(vocab_size, **changes):
    """A model in eval mode and its configuration."""
    config = Config(**{"data": "none", "device": "cpu", "n_layer": 2, "n_head": 2, "n_embd": 16} | changes)
    model = Transformer(config, vocab_size).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model, config
