"""What PyTorch is asked of the device beside our kernels, and when: each such operation is a launch of its own."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain_kernels import (
    fused_diffusion_loss,
    fused_linear_diffusion_loss,
    vocab_parallel_diffusion_loss,
)

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")

N, D, V, MASK_ID = 16, 8, 24, 4
CHUNK = ["masked_fill", "mm", "addmm", "addmm"]  # states, logits, and the gradients of hidden and weight
BIASED_CHUNK = ["masked_fill", "addmm", "addmm", "addmm", "sum", "add_"]
# Options, and what is asked forward and backward.
LOGITS = {
    "plain": ({}, ["mean"], []),
    "not predicted": ({"upstream_prediction": False}, ["mean"], []),
    "stated": ({"upstream_scale": 1.0}, ["mean"], []),
    "table": ({"return_cases": True}, ["mean"], []),
    "sum": ({"reduction": "sum"}, ["sum"], []),
    "row losses": ({"reduction": "none"}, ["clone"], []),
}
LINEAR = {
    # Backward rounds the weight's fp32 sums to bf16.
    "one chunk": (torch.bfloat16, {}, ["eq", *CHUNK, "mean"], ["mul"]),
    "table": (torch.bfloat16, {"return_cases": True}, ["eq", *CHUNK, "mean"], ["mul"]),
    "two chunks": (torch.bfloat16, {"chunk_tokens": 8}, ["eq", *CHUNK, *CHUNK, "cat", "cat", "mean"], ["mul"]),
    "fp32": (torch.float32, {}, ["eq", *CHUNK, "mean"], []),
    "bias": (torch.bfloat16, {}, ["eq", "new_zeros", *BIASED_CHUNK, "mean"], ["mul", "mul"]),
}  # fmt: skip
# Views, buffers and answers of the host.
NO_LAUNCHES = {
    "alias", "as_strided", "detach", "empty", "empty_like", "new_empty", "promote_types", "select", "slice", "t",
    "unsqueeze", "view",
}  # fmt: skip


class Asked(TorchDispatchMode):
    """The names of the operations that launch something on a device."""

    def __init__(self, device):
        super().__init__()
        self._names = []
        # A CPU multiplies no bf16 into fp32, and copies.
        self._no_launches = NO_LAUNCHES | ({"_to_copy"} if device.type == "cpu" else set())

    def take(self):
        """Those since the last time."""
        taken, self._names = self._names, []
        return taken

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in self._no_launches:
            self._names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def asked(device, monkeypatch):
    if device.type != "cuda":  # the interpreter asks PyTorch for much
        from difftrain_kernels import triton_kernels

        kernel_type = type(triton_kernels.rescale._rescale_kernel)
        monkeypatch.setattr(kernel_type, "__getitem__", lambda kernel, grid: lambda **arguments: None)
    return Asked(device)


def check(asked, device, call, inputs, forward, backward):
    with asked:
        for _ in range(2):  # the first call of its kind begins a prediction
            asked.take()
            result = call()
            found = asked.take()
            loss = result[0] if isinstance(result, tuple) else result
            upstream = torch.ones(loss.shape, dtype=torch.float32, device=device)
            asked.take()
            torch.autograd.grad(loss, inputs, upstream)
        assert found == forward
        assert asked.take() == backward


@pytest.mark.parametrize("way", LOGITS)
def test_a_call_of_the_logits_loss_asks_pytorch_for_its_reduction_alone(way, device, asked):
    options, forward, backward = LOGITS[way]
    logits = torch.zeros(2, N // 2, V, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = torch.zeros(2, N // 2, dtype=torch.int64, device=device)

    def call():
        return fused_diffusion_loss(logits, y, y, MASK_ID, 0.25, 0.5, impl="triton", **options)

    check(asked, device, call, [logits], forward, backward)


@pytest.mark.parametrize("way", LINEAR)
def test_a_call_of_the_linear_loss_asks_pytorch_for_these_operations_alone(way, device, asked):
    dtype, options, forward, backward = LINEAR[way]
    shapes = [(N, D), (V, D), (V,)][: 3 if way == "bias" else 2]
    inputs = [torch.zeros(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
    y = torch.zeros(N, dtype=torch.int64, device=device)

    def call():
        hidden, weight, bias = (*inputs, None)[:3]
        labels = (y, y, MASK_ID, 0.25, 0.5)
        return fused_linear_diffusion_loss(hidden, weight, *labels, bias=bias, impl="triton", **options)

    check(asked, device, call, inputs, forward, backward)


@pytest.mark.usefixtures("alone")
def test_a_call_of_the_parallel_loss_asks_pytorch_for_these_operations_alone(device, asked):
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = torch.zeros(N, dtype=torch.int64, device=device)

    def call():
        labels = (y, y, MASK_ID, 0.25, 0.5)
        return vocab_parallel_diffusion_loss(logits, *labels, slice_sizes=[V], impl="triton")

    # Of one process the exchange is a copy; labels count from the slice's first column.
    check(asked, device, call, [logits], ["copy_", "mean"], ["sub"])
