"""The batches that the losses are compared on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -1


@dataclass(frozen=True)
class Problem:
    """One batch. ``inputs`` want gradients: (logits (N, V),) or (hidden (N, D), weight (V, D))."""

    inputs: tuple[Tensor, ...]
    y: Tensor
    x: Tensor
    mask_id: int
    pk: float | Tensor = 0.25
    pm: float | Tensor = 0.5

    @property
    def kind(self) -> str:
        return "logits" if len(self.inputs) == 1 else "linear"

    @property
    def labels(self) -> tuple:
        return self.y, self.x, self.mask_id, self.pk, self.pm

    def copy(self) -> Problem:
        return replace(self, inputs=tuple(t.detach().clone().requires_grad_() for t in self.inputs))

    def without_gradient(self) -> Problem:
        """The same memory; some losses make gradients for inputs that want one even under no_grad."""
        return replace(self, inputs=tuple(t.detach() for t in self.inputs))

    def restore(self, source: Problem) -> None:
        """Take over the values of a copy."""
        with torch.no_grad():
            for mine, theirs in zip(self.inputs, source.inputs, strict=True):
                mine.copy_(theirs)


def make_problem(
    n: int, vocab_size: int, dtype: torch.dtype, device, width: int = 0, seed: int = 0
) -> Problem:
    """Random logits, or with ``width`` hidden states and weight; half the rows answer [MASK].

    4 to 8 % of bf16 rows with V >= 50k have a tied maximum, which the tie rule decides. With hidden
    states, where the order of summation would decide, [MASK] is far above or below the rest.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    mask_id = vocab_size - 1
    says_mask = torch.rand(n, generator=generator, device=device) < 0.5
    if width:
        hidden, weight = normal(n, width), normal(vocab_size, width) / math.sqrt(width)
        hidden[:, 0] = torch.where(says_mask, 8.0, -8.0)
        weight[:, 0], weight[mask_id] = 0.0, 0.0
        weight[mask_id, 0] = 2.0
        inputs = (hidden, weight)
    else:
        logits = normal(n, vocab_size)
        logits[says_mask, mask_id] = logits[says_mask].amax(1)  # tied, and the first wins
        logits[says_mask.logical_and(torch.arange(n, device=device) % 2 == 0), mask_id] += 1.0
        inputs = (logits,)
    y = torch.randint(0, vocab_size, (n,), generator=generator, device=device)
    draw = torch.rand(n, generator=generator, device=device)
    x = torch.where(draw < 0.4, mask_id, y)
    y = torch.where(draw > 0.8, mask_id, y)
    y = torch.where(draw > 0.95, IGNORE_INDEX, y)
    return Problem(tuple(t.to(dtype).requires_grad_() for t in inputs), y, x, mask_id)
