"""Terms over processes: uneven counts in DDP and FSDP2, and rows whose vocabulary is split, to 1e-12 in fp64."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from difftrain_kernels import (
    fused_diffusion_loss,
    fused_linear_diffusion_loss,
    recipes,
    vocab_parallel_diffusion_loss,
)
from processes import run_in_processes
from term_problems import ALL, SINGLES, batch, options_of

pytestmark = pytest.mark.xdist_group("processes")

VOCAB, MASK_ID, WIDTH = 7, 6, 4
SIZES = [3, 4]
NAMES = [*SINGLES, *ALL]
# Sequences of each of two processes; in the third nothing counts on the second process.
SHARES = {"uneven": [(0, 2), (2, 3)], "nothing on one": [(0, 3), (3, 3)]}
RUNS = [
    (wrapper, how, share) for wrapper in ("ddp", "fsdp") for how in ("logits", "linear") for share in SHARES
]


class Model(nn.Module):
    """An embedding and a head; the loss is made in forward, as FSDP2 needs it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(VOCAB, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)

    def forward(self, x, y, how, **options):
        hidden = self.tokens(x)
        if how == "logits":
            return fused_diffusion_loss(self.head(hidden), y, x, MASK_ID, **options)
        return fused_linear_diffusion_loss(hidden, self.head.weight, y, x, MASK_ID, **options)


def masked_batch():
    """x, y and what LLaDA's and NeMo's recipes know of it."""
    _, y, _ = batch()
    generator = torch.Generator().manual_seed(5)
    y = torch.where((y < 0) | (y == MASK_ID), 0, y)
    p_mask = torch.rand(len(y), 1, generator=generator, dtype=torch.float64) * 0.8 + 0.2
    is_masked = torch.rand(y.shape, generator=generator) < p_mask
    return torch.where(is_masked, MASK_ID, y), y, is_masked, p_mask


def gradients_of(model):
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def train(rank, wrapper, how, share):
    first, last = SHARES[share][rank]
    x, y, is_masked, p_mask = (t[first:last] for t in masked_batch())
    if share == "nothing on one" and rank == 1:
        x, y, is_masked, p_mask = (t[:1] for t in masked_batch())
        is_masked = torch.zeros_like(is_masked)
    n = is_masked.sum()
    dist.all_reduce(n)
    model = Model()
    if wrapper == "ddp":
        network = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    # Gradients are averaged over processes: what is divided by the count of all is multiplied by their number.
    recipe = recipes.nemo(is_masked, p_mask, n / dist.get_world_size())
    loss = network(x, y, how, **recipe)
    loss.backward()
    return loss.detach(), gradients_of(model)


def split(rank, names):
    names = tuple(n for n in names)
    logits, y, x = batch()
    options, y = options_of(names, y, MASK_ID)
    start = sum(SIZES[:rank])
    part = logits[..., start : start + SIZES[rank]].clone().requires_grad_()
    loss, cases, rows = vocab_parallel_diffusion_loss(
        part, y, x, MASK_ID, slice_sizes=SIZES, return_cases=True, return_rows=True, entropy=True, **options
    )
    (gradient,) = torch.autograd.grad(loss, [part])
    shown = [rows.nll, rows.lse, rows.p_mask, rows.confidence, rows.entropy, rows.case]
    return loss.detach(), gradient, cases.to_vector(), shown


def work(rank):
    trained = {run: train(rank, *run) for run in RUNS}
    return trained, {names: split(rank, names) for names in NAMES}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_in_processes(2, work, tmp_path_factory.mktemp("processes"))


@functools.cache
def alone(how):
    x, y, is_masked, p_mask = masked_batch()
    model = Model()
    loss = model(x, y, how, **recipes.nemo(is_masked, p_mask, is_masked.sum()))
    loss.backward()
    return loss.detach(), gradients_of(model)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(run))
def test_a_divisor_counted_over_processes_trains_as_one(run, found):
    """Also where nothing counts on one of them; and a head sharded by fully_shard gets its whole gradient."""
    loss, gradients = alone(run[1])
    mean = sum(trained[run][0] for trained, _ in found) / 2
    torch.testing.assert_close(mean, loss, rtol=1e-12, atol=0)
    for trained, _ in found:
        for ours, expected in zip(trained[run][1], gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_a_split_vocabulary_has_the_terms_of_whole_rows(names, found):
    logits, y, x = batch()
    options, y = options_of(names, y, MASK_ID)
    logits.requires_grad_()
    loss, cases, rows = fused_diffusion_loss(
        logits, y, x, MASK_ID, return_cases=True, return_rows=True, entropy=True, **options
    )
    (gradient,) = torch.autograd.grad(loss, [logits])
    shown = [rows.nll, rows.lse, rows.p_mask, rows.confidence, rows.entropy, rows.case]
    for _, splits in found:
        ours, _, vector, theirs = splits[names]
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(vector, cases.to_vector(), rtol=1e-11, atol=1e-12)
        for a, b in zip(theirs, shown, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    joined = torch.cat([splits[names][1] for _, splits in found], dim=-1)
    torch.testing.assert_close(joined, gradient, rtol=1e-11, atol=1e-13)
