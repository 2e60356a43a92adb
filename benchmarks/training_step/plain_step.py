"""A plain GPT-2 step: what a reader of nanoGPT's description would write. Nothing of ours, and nothing clever.

Learned positions, layer norm and linear layers without bias, GELU, causal attention, tied weights, PyTorch's
cross-entropy, clipping at 1, AdamW with decay on matrices, fused on CUDA alone; a batch is drawn at random places
of a file of uint16 that is mapped anew for it. Source: nanoGPT's README and configuration for characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("data", "forward", "loss", "backward", "optimizer")


class PlainBlock(nn.Module):
    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, h: Tensor) -> Tensor:
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm_1(h)).split(D, dim=2)
        q, k, v = (t.view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.attention_out(out.transpose(1, 2).contiguous().view(B, T, D))
        return h + self.down(F.gelu(self.up(self.norm_2(h))))


class PlainGPT(nn.Module):
    """Ids (B, T) -> logits (B, T, V)."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(PlainBlock(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.words.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if is_residual else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=torch.long, device=x.device)
        h = self.words(x) + self.places(places)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class PlainStep:
    """Its model, optimiser and data; a call takes one step and names each part's end to ``lap``."""

    def __init__(self, model: PlainGPT, file: Path, batch_size: int, device: torch.device):
        self.model, self.file, self.batch_size, self.device = model.to(device), file, batch_size, device
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        how = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), **how)

    def batch(self) -> tuple[Tensor, Tensor]:
        data, length = np.memmap(self.file, dtype=np.uint16, mode="r"), self.model.places.num_embeddings
        starts = torch.randint(len(data) - length, (self.batch_size,))
        x, y = (
            torch.stack([torch.from_numpy(data[s + i : s + i + length].astype(np.int64)) for s in starts])
            for i in (0, 1)
        )
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def __call__(self, lap: Callable[[str], None]) -> None:
        x, y = self.batch()
        lap("data")
        logits = self.model(x)
        lap("forward")
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), ignore_index=-1)
        lap("loss")
        loss.backward()
        lap("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lap("optimizer")
