"""Data x vocabulary on a 2-D mesh: FSDP2 over one dimension, the head's columns over the other, our loss between them.

    torchrun --nproc_per_node=4 examples/mesh_training.py [STEPS]

Half of the processes hold other sequences, and each pair of them halves of the head. torch does all of it but the loss:
DeviceMesh, fully_shard, and ColwiseParallel, which leaves the logits sharded over the vocabulary; the loss takes them as
they are and joins the slices by one all-gather of a few numbers a row. With one process it trains the same model.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from difftrain import vocab_parallel_diffusion_loss

VOCAB, MASK_ID, WIDTH, LENGTH, SEQUENCES = 66, 65, 32, 24, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """A network of two blocks, and the head whose columns are shared out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def make_model(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> Model:
    """The model, shared out: columns of the head over "vocab", then all parameters over "data"."""
    torch.manual_seed(0)
    model = Model().to(mesh.device_type, dtype)
    parallelize_module(model, mesh["vocab"], {"head": ColwiseParallel(use_local_output=False)})
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def batch(samples: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of samples, each a function of its index alone, (B, LENGTH) int64."""
    rows = []
    for sample in samples.tolist():
        generator = torch.Generator().manual_seed(sample)
        rows.append(torch.stack([
            torch.randint(0, MASK_ID, (LENGTH,), generator=generator).sort().values,
            (torch.rand(LENGTH, generator=generator) < 0.4).long(),
        ]))  # fmt: skip
    y, is_masked = torch.stack(rows).unbind(1)
    return torch.where(is_masked.bool(), MASK_ID, y), y


def train(
    steps: int, n_data: int, n_vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, and the weights after them, whole; every process of the mesh must call.

    A step takes SEQUENCES samples by their indices, those of one "data" rank in a row: with another mesh the
    same ones.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (n_data, n_vocab), mesh_dim_names=("data", "vocab"))
    model = make_model(mesh, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    share, losses = SEQUENCES // n_data, []
    for step in range(steps):
        first = step * SEQUENCES + mesh["data"].get_local_rank() * share
        x, y = (t.to(device) for t in batch(torch.arange(first, first + share)))
        logits = model(x)  # a DTensor: each process of a "vocab" group holds some columns
        loss = vocab_parallel_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)
        optimizer.zero_grad()
        loss.backward()  # fully_shard takes the mean over "data"
        optimizer.step()
        mean = loss.detach() / n_data
        dist.all_reduce(mean, group=mesh["data"].get_group())
        losses.append(mean.item())
    return losses, {name: p.full_tensor().detach().cpu() for name, p in model.named_parameters()}


def main() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    n_vocab = 2 if world_size % 2 == 0 else 1
    losses, _ = train(int(sys.argv[1]) if len(sys.argv) > 1 else 50, world_size // n_vocab, n_vocab)
    if dist.get_rank() == 0:
        print(f"{world_size // n_vocab} x {n_vocab} processes: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
