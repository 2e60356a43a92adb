"""The model: nanoGPT's GPT-2, without the causal mask in diffusion mode. It knows no loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftrain.config import Config
from difftrain.rotary import Rotation, rotated, rotation, rotation_table


class Kept:
    """Keys and values of one layer that stay from pass to pass; a pass over some columns alone renews their own.

    Attributes:
        columns: those that the passes after the first go over.
    """

    def __init__(self, columns: slice):
        self.columns = columns
        self._found: tuple[Tensor, Tensor] | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing is kept yet."""
        return self._found is None

    def with_own(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, n_head, T, head_size) of all columns, from those of all, or of these where they are kept."""
        if self._found is None:
            self._found = own[0].clone(), own[1].clone()
        else:
            for kept, new in zip(self._found, own, strict=True):
                kept[:, :, self.columns] = new
        return self._found


class Attention(nn.Module):
    """Multi-head self-attention, causal or not, with optional rotary positions."""

    def __init__(self, config: Config, **where: Any):
        super().__init__()
        self.n_head = config.n_head
        self.is_causal = config.mode == "gpt2"
        self.is_rotary = config.position == "rotary"
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias, **where)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias, **where)

    def forward(
        self,
        h: Tensor,
        rotation: Rotation | Tensor | None,
        visible: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        q, k, v = self.in_heads(h, rotation)
        if kept is not None:
            k, v = kept.with_own(k, v)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=self.is_causal
        )
        return F.dropout(self.merged(out), self.dropout, self.training)

    def in_heads(self, h: Tensor, rotation: Rotation | Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of h (B, T, D): (B, n_head, T, D / n_head) each, rotated by their positions."""
        if rotation is None:
            # Split before the heads: backward then puts three gradients together row by row.
            parts = self.qkv(h).chunk(3, dim=-1)
            return tuple(t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in parts)
        return rotated(h, self.qkv.weight, self.qkv.bias, rotation, self.n_head)

    def merged(self, out: Tensor) -> Tensor:
        """What the heads found (B, n_head, T, D / n_head), as (B, T, D)."""
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers, four times as wide between, with GELU."""

    def __init__(self, config: Config, **where: Any):
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias, **where)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias, **where)

    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(self.proj(F.gelu(self.up(h))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Config, **where: Any):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd, bias=config.bias, **where)
        self.attention = Attention(config, **where)
        self.norm_2 = nn.LayerNorm(config.n_embd, bias=config.bias, **where)
        self.mlp = MLP(config, **where)

    def forward(
        self,
        h: Tensor,
        rotation: Rotation | Tensor | None,
        visible: Tensor | None,
        kept: Kept | None = None,
    ) -> Tensor:
        h = h + self.attention(self.norm_1(h), rotation, visible, kept)
        return h + self.mlp(self.norm_2(h))


class Transformer(nn.Module):
    """Ids -> hidden states or logits; the head's weight is the token embedding's."""

    def __init__(self, config: Config, vocab_size: int, *, device: torch.device | str = "cpu"):
        """The weights in fp32, whatever torch's default dtype and device are.

        Args:
            config: of which the model's keys count.
            vocab_size: data words and [MASK].
            device: of the weights; "meta" for shapes alone.
        """
        super().__init__()
        where = {"device": device, "dtype": torch.float32}
        self.block_size, self.n_head = config.block_size, config.n_head
        self.dropout = config.dropout
        self.embedding = nn.Embedding(vocab_size, config.n_embd, **where)
        is_learned = config.position == "learned"
        self.positions = nn.Embedding(config.block_size, config.n_embd, **where) if is_learned else None
        self.blocks = nn.ModuleList(Block(config, **where) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias, **where)
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False, **where)
        self.head.weight = self.embedding.weight
        head_size = config.n_embd // config.n_head
        table = None if is_learned else rotation_table(config.block_size, head_size, device)
        self.register_buffer("rotation", table, persistent=False)
        self.visible: Tensor | None = None  # who sees whom, (T, T) bool, where it is not everybody
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):  # GPT-2: keep the residual stream's variance
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x: Tensor, *, return_hidden: bool = False, visible: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of ids x (B, T) int64, T <= block_size; or hidden states (B, T, D).

        ``head.weight`` (V, D) turns hidden states into logits.

        Args:
            visible: who sees whom, bool, of a shape that broadcasts to (B, n_head, T, T); None: as ``self.visible`` says.
        """
        T = x.shape[1]
        if self.block_size < T:
            raise ValueError(f"x must have at most block_size {self.block_size} columns, got {T}")
        visible = self.visible if visible is None else visible
        h = self._hidden(x, slice(0, T), visible, [None] * len(self.blocks))
        return h if return_hidden else self.head(h)

    def hidden_of_columns(self, x: Tensor, kept: list[Kept]) -> Tensor:
        """Hidden states of some columns of ids x (B, T), which see what was ``kept`` of the others: (B, columns, D).

        In a first pass, whose ``kept`` are new, those of all columns.

        Args:
            kept: one for each of ``blocks``, with the same columns; overwritten.
        """
        columns = slice(0, x.shape[1]) if kept[0].is_new else kept[0].columns
        return self._hidden(x, columns, None, kept)

    def _hidden(
        self, x: Tensor, columns: slice, visible: Tensor | None, kept: Sequence[Kept | None]
    ) -> Tensor:
        h = self.embedding(x[:, columns])
        if self.positions is not None:
            h = h + self.positions.weight[columns]
        h = F.dropout(h, self.dropout, self.training)
        turned = None if self.rotation is None else rotation(self.rotation[columns], self.n_head)
        for block, its in zip(self.blocks, kept, strict=True):
            h = block(h, turned, visible, its)
        return self.norm(h)

    def n_parameters(self) -> int:
        """Trainable numbers, the shared embedding counted once."""
        return sum(p.numel() for p in self.parameters())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, not vectors; fused where the device has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's state of every parameter as ``NAME.exp_avg``, ``NAME.exp_avg_sq`` and ``NAME.step``.

    The tensors themselves; zeros, which are the state before the first update, where there is none yet.
    """
    return {
        f"{name}.{key}": tensor
        for name, p in model.named_parameters()
        for key, tensor in (optimizer.state.get(p) or _fresh_state(p)).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.AdamW, read: Callable[[dict[str, Tensor]], None]
) -> None:
    """Give AdamW the state that ``read`` writes into tensors of :func:`optimizer_tensors`' names.

    Only what the steps have made is restored; rates, decay and betas are the configuration's.
    """
    states = {name: _fresh_state(p) for name, p in model.named_parameters()}
    read({f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()})
    for name, p in model.named_parameters():
        optimizer.state[p] = states[name]


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
