"""Every public loss, in every implementation, on one small problem: for rules that hold for all of them."""

import importlib.util

import pytest
import torch

from difftrain_kernels import (
    diffusion_loss_reference,
    fused_diffusion_loss,
    fused_linear_diffusion_loss,
    vocab_parallel_diffusion_loss,
)

N, V, D, MASK_ID = 24, 9, 4, 8
FUNCTIONS = {
    "reference": diffusion_loss_reference,
    "logits": fused_diffusion_loss,
    "linear": fused_linear_diffusion_loss,
    "parallel": vocab_parallel_diffusion_loss,  # of the fixture ``alone``, one process
}
# On the CPU, where kernels are interpreted unless there is a GPU.
HAS_KERNELS = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
IMPLS = ["reference", "triton"] if HAS_KERNELS else ["reference"]
WAYS = [("reference", None), *((name, impl) for name in list(FUNCTIONS)[1:] for impl in IMPLS)]
EVERY_LOSS = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(filter(None, way)))
REDUCTIONS = ("mean", "sum", "none")


def arguments_of(way, device="cpu", dtype=torch.float32):
    """Keyword arguments, of which every kind of position, both penalties and ignored rows make the loss."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, V - 1, (N,), generator=generator)
    x = torch.where(torch.arange(N) % 3 == 0, MASK_ID, y)
    x = torch.where(torch.arange(N) % 3 == 2, (y + 1) % (V - 1), x)
    y = torch.where(torch.arange(N) % 3 == 2, MASK_ID, y)
    x[1::6] = y[1::6]
    y[5::7] = -1
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    bias = torch.zeros(V)
    bias[MASK_ID] = 2.0  # more than half of the positions answer [MASK]
    inputs = {"logits": torch.addmm(bias, hidden, weight.t())}
    if way[0] == "linear":
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    tensors = {name: t.to(device, dtype) for name, t in inputs.items()}
    tensors |= {"y": y.to(device), "x": x.to(device)}
    extra = {"linear": {"chunk_tokens": 10}, "parallel": {"slice_sizes": [V]}}.get(way[0], {})
    return {**tensors, "mask_id": MASK_ID, "pk": 0.25, "pm": 0.5, **extra}


def inputs_of(way):
    """The arguments that get a gradient."""
    return ("hidden", "weight", "bias") if way[0] == "linear" else ("logits",)


def call(way, arguments, **options):
    name, impl = way
    return FUNCTIONS[name](**arguments, **options, **({} if impl is None else {"impl": impl}))


def value_and_gradients(way, arguments, upstream=None, **options):
    """The loss, the table, and the gradients of whatever inputs want one, for a random upstream gradient."""
    loss, cases = call(way, arguments, return_cases=True, **options)
    wanted = [arguments[name] for name in inputs_of(way) if arguments[name].requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.rand(loss.shape, generator=generator, dtype=loss.dtype).to(loss.device)
    return loss.detach(), cases, torch.autograd.grad(loss, wanted, upstream) if wanted else ()


def assert_equal(found, expected):
    """Loss, table and gradients to the bit, and in the same dtypes."""
    for ours, theirs in zip((found[0], *found[2]), (expected[0], *expected[2]), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert found[1] == expected[1]
    assert found[1].nll.dtype == expected[1].nll.dtype
