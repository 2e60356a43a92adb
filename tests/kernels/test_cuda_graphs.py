"""Nothing waits for the device or copies from the host; CUDA graphs replay with new penalties."""

import importlib.util
import math
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from difftrain.config import Config
from difftrain.schedule import PenaltyTensors
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter, about inf and NaN
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")

MASK_ID = 4
# Loss, and its options. The reference of the linear loss is for the CPU, where it may look at values.
CALLS = {
    "logits": ("logits", {"impl": "triton"}),
    "logits, row losses": ("logits", {"impl": "triton", "reduction": "none"}),
    "logits, not predicted": ("logits", {"impl": "triton", "upstream_prediction": False}),
    "logits, stated": ("logits", {"impl": "triton", "upstream_scale": 0.5}),
    "logits, other than stated": ("logits", {"impl": "triton", "upstream_scale": 1.0}),
    "logits, overwritten": ("logits", {"impl": "triton", "overwrite_logits": True}),
    "logits, stated, overwritten": (
        "logits",
        {"impl": "triton", "upstream_scale": 1.0, "overwrite_logits": True},
    ),
    "logits, reference": ("logits", {"impl": "reference"}),
    "linear": ("linear", {"impl": "triton", "chunk_tokens": 8}),
    "linear, sum": ("linear", {"impl": "triton", "chunk_tokens": 8, "reduction": "sum"}),
    "linear, half counted": ("linear", {"impl": "triton", "counted": 100}),
    "linear, row losses": ("linear", {"impl": "triton", "chunk_tokens": 8, "reduction": "none"}),
}
EACH_CALL = pytest.mark.parametrize("call", CALLS)


class Step:
    """One loss, its gradients and its case table, from tensors that stay where they are."""

    def __init__(self, call, device, seed=0):
        self.name, self.options = CALLS[call]
        self.penalties = PenaltyTensors(device)
        # More rows than a tile has, where some are to be left out.
        n = self.n = 160 if "counted" in self.options else 20
        shapes = [(n, 66)] if self.name == "logits" else [(n, 16), (66, 16), (66,)]
        dtype = torch.bfloat16
        self.inputs = [torch.empty(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
        self.y, self.x = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
        self.upstream = torch.full((), 0.5, device=device)
        self.fill(seed)
        self.loss_of = self.loss_and_cases

    def fill(self, seed):
        """New values, from the host."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.inputs:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if self.name == "logits":
                self.inputs[0][::2, MASK_ID] += 4
            else:
                self.inputs[2][MASK_ID] += 3
        y = torch.randint(0, 66, (self.n,), generator=generator)
        x = torch.where(torch.rand(self.n, generator=generator) < 0.5, MASK_ID, y)
        y[seed % 20] = -1
        if "counted" in self.options:
            y[1::2] = -1
        self.y.copy_(y)
        self.x.copy_(x)

    def __call__(self, step):
        pk, pm = self.penalties.update(step, Config(masking_warmup_iters=4))
        return self.compute(pk, pm)

    def loss_and_cases(self, inputs, y, x, pk, pm):
        first = inputs[0] * 1  # what may be overwritten
        arguments = (y, x, MASK_ID, pk, pm)
        if self.name == "logits":
            return fused_diffusion_loss(first, *arguments, return_cases=True, **self.options)
        weight, bias = inputs[1:]
        return fused_linear_diffusion_loss(
            first, weight, *arguments, bias=bias, return_cases=True, **self.options
        )

    def compute(self, pk, pm):
        loss, cases = self.loss_of(self.inputs, self.y, self.x, pk, pm)
        gradients = torch.autograd.grad(loss, self.inputs, self.upstream.expand(loss.shape))
        table = (cases.counts, cases.nll, cases.gap, cases.loss_at(pk, pm), cases.loss_at(1.0, 0.0))
        return loss, *gradients, *table, cases.rates(), cases.mean_nll(), cases.mean_gap()


# What on a GPU reads a value back, or makes a tensor from host memory.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "_unique2"}


class _NoWaiting(TorchDispatchMode):
    """On the CPU: an error for each operation that would wait on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in WAITS:
            raise AssertionError(f"{name} would wait for the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def nothing_waits(device, monkeypatch):
    """A context in which it is an error to wait for the device."""
    if device.type != "cuda":
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def unseen(*args, **kwargs):  # what the interpreter does inside a kernel
            with _disable_current_modes():
                return run(*args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", unseen)
        return _NoWaiting

    @contextmanager
    def errors():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return errors


@EACH_CALL
def test_forward_backward_table_and_penalties_wait_for_nothing(call, device, nothing_waits):
    step = Step(call, device)
    step(0)  # compiled and warm
    step.compute(0.3, 0.7)
    with nothing_waits():
        step(1)
        step.compute(0.2, 0.8)


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.item(),
        lambda t: bool(t > 0),
        lambda t: torch.tensor(0.5, device=t.device),
        lambda t: t.nonzero(),
    ],
    ids=["item", "bool", "tensor from a number", "nonzero"],
)
def test_what_waits_is_seen(wait, device, nothing_waits):
    value = torch.ones((), device=device)
    with (
        pytest.raises((AssertionError, RuntimeError), match="wait for the device|synchroniz"),
        nothing_waits(),
    ):
        wait(value)


@NEEDS_CUDA
@EACH_CALL
def test_a_captured_step_replays_with_the_bits_of_eager(call, device):
    step, eager = Step(call, device), Step(call, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            step(i)  # kernels compiled, workspaces there
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.compute(step.penalties.pk, step.penalties.pm)
    losses = set()
    for i in range(6):
        for both in (step, eager):
            both.fill(seed=i // 2)
            both.penalties.update(i, Config(masking_warmup_iters=4))
            both.upstream.fill_(0.5 if i % 2 else 0.25)
        graph.replay()
        expected = eager.compute(eager.penalties.pk, eager.penalties.pm)
        for found, wanted in zip(captured, expected, strict=True):
            assert torch.equal(found.nan_to_num(math.pi), wanted.nan_to_num(math.pi))
        losses.add(captured[0].sum().item())
    assert len(losses) == 5  # the last two have one seed, and penalties that no longer change


@NEEDS_CUDA
@pytest.mark.parametrize("call", ["logits", "linear"])
def test_a_compiled_step_waits_for_nothing_and_is_captured(call, device, nothing_waits):
    torch._dynamo.reset()
    step, eager = Step(call, device), Step(call, device)
    # The loss alone: not every torch compiles a call of torch.autograd.grad.
    step.loss_of = torch.compile(step.loss_and_cases, fullgraph=True, backend="aot_eager")
    pk, pm = step.penalties.update(0, Config(masking_warmup_iters=4))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.compute(pk, pm)
    torch.cuda.current_stream().wait_stream(stream)
    with nothing_waits():
        step.compute(pk, pm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.compute(pk, pm)
    for i in range(1, 5):
        step.penalties.update(i, Config(masking_warmup_iters=4))
        graph.replay()
        for found, wanted in zip(captured, eager.compute(pk, pm), strict=True):
            assert torch.equal(found.nan_to_num(math.pi), wanted.nan_to_num(math.pi))
