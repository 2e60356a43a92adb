"""nanoGPT's model and its checkpoints, written from nanoGPT's description; nothing of ours."""

import math

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 7}


class LayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, h):
        return F.layer_norm(h, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        width = args["n_embd"]
        self.c_attn = nn.Linear(width, 3 * width, bias=args["bias"])
        self.c_proj = nn.Linear(width, width, bias=args["bias"])
        self.n_head, self.is_causal = args["n_head"], args.get("model_type", "gpt2") == "gpt2"

    def forward(self, h):
        B, T, D = h.shape
        size = D // self.n_head
        q, k, v = (
            part.view(B, T, self.n_head, size).transpose(1, 2) for part in self.c_attn(h).split(D, 2)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(size)
        if self.is_causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, args):
        super().__init__()
        width = args["n_embd"]
        self.c_fc = nn.Linear(width, 4 * width, bias=args["bias"])
        self.c_proj = nn.Linear(4 * width, width, bias=args["bias"])

    def forward(self, h):
        h = self.c_fc(h)
        return self.c_proj(0.5 * h * (1 + torch.erf(h / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(args["n_embd"], args["bias"]), Attention(args)
        self.ln_2, self.mlp = LayerNorm(args["n_embd"], args["bias"]), MLP(args)

    def forward(self, h):
        h = h + self.attn(self.ln_1(h))
        return h + self.mlp(self.ln_2(h))


class GPT(nn.Module):
    """Learned positions, pre-norm blocks, and a head whose weight is the embedding's."""

    def __init__(self, args):
        super().__init__()
        width = args["n_embd"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], width),
                "wpe": nn.Embedding(args["block_size"], width),
                "h": nn.ModuleList(Block(args) for _ in range(args["n_layer"])),
                "ln_f": LayerNorm(width, args["bias"]),
            }
        )
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, x):
        h = self.transformer["wte"](x) + self.transformer["wpe"].weight[: x.shape[1]]
        for block in self.transformer["h"]:
            h = block(h)
        return self.lm_head(self.transformer["ln_f"](h))


def gpt(seed=0, **changes):
    """A model all of whose weights are random, biases and norms too, and its arguments."""
    args = SIZES | {"bias": True, "dropout": 0.0} | changes
    generator = torch.Generator().manual_seed(seed)
    model = GPT(args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread + (name.endswith("weight") and parameter.dim() == 1))
    return model.eval(), args


def checkpoint_of(model, args, prefix="", **more):
    """What train.py saves."""
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    return {
        "model": weights,
        "optimizer": optimizer_of(model).state_dict(),
        "model_args": args,
        "iter_num": 40,
        "best_val_loss": torch.tensor(1.5),
        "config": {"learning_rate": 6e-4, "dataset": "letters"},
        **more,
    }


def optimizer_of(model):
    """AdamW with decay on matrices alone, as configure_optimizers makes it."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def load(file):
    """The model of a checkpoint, as sample.py makes it, and the checkpoint."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    model = GPT(content["model_args"])
    model.load_state_dict(content["model"])
    return model.eval(), content
