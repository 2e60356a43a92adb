"""The plain step is the same work: its model is ours in gpt2 mode with learned positions, weight for weight."""

import numpy as np
import torch

from difftrain.config import Config
from difftrain.model import Transformer
from training_step.plain_step import PARTS, PlainGPT, PlainStep

SHAPE = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}


def test_with_the_same_weights_it_computes_the_same_logits():
    ours = Transformer(Config(mode="gpt2", position="learned", **SHAPE), 11)
    plain = PlainGPT(11, **SHAPE)
    names = {
        "words": "embedding",
        "places": "positions",
        "attention_out": "attention.proj",
        "qkv": "attention.qkv",
    }
    names |= {"up": "mlp.up", "down": "mlp.proj"}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            *path, last, kind = name.split(".")
            parameter.copy_(ours.get_parameter(".".join((*path, names.get(last, last), kind))))
    x = torch.randint(0, 11, (3, 8))
    torch.testing.assert_close(plain(x), ours(x))
    assert sum(p.numel() for p in plain.parameters()) == ours.n_parameters()


def test_a_step_learns_from_windows_of_the_file_and_names_its_parts(tmp_path):
    file = tmp_path / "train.bin"
    (np.arange(300) % 10).astype(np.uint16).tofile(file)
    step = PlainStep(PlainGPT(10, **SHAPE), file, 4, torch.device("cpu"))
    x, y = step.batch()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal((x + 1) % 10, y)
    before = step.model.head.weight.clone()
    parts = []
    step(parts.append)
    assert tuple(parts) == PARTS
    assert not torch.equal(step.model.head.weight, before)
