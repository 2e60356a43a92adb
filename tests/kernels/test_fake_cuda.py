"""What Python does on a CUDA device up to each launch, walked on fake CUDA tensors: no GPU is needed.

Launches are recorded and not made. torch without CUDA ends the process where autograd meets a fake CUDA
tensor, so the losses' autograd functions are called by hand: forward, then backward, as autograd would.
"""

import importlib.util
import inspect
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain_kernels import (
    fused_diffusion_loss,
    fused_linear_diffusion_loss,
    implementation,
    linear_loss,
    logits_loss,
    parallel_loss,
    upstream_prediction,
    vocab_parallel_diffusion_loss,
)

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is asked for its second device"),
]
HERE = torch.device("cuda", 1)  # not the current device, which is 0
N, D, MASK_ID = 20, 16, 4
SIZES = {"small": 66, "streamed": 5001}

# What each way of calling launches in forward and in backward; of the linear loss 20 positions in chunks of 8.
CHUNKS = 3
WAYS = {
    "logits, no gradient": ({}, ["loss"], None),
    "logits": ({}, ["loss_and_gradient"], ["gradient"]),
    "logits, not predicted": ({"upstream_prediction": False}, ["loss"], ["gradient"]),
    "logits, row losses": ({"reduction": "none"}, ["loss_and_gradient"], ["gradient"]),
    "logits, stated": ({"upstream_scale": 0.5}, ["loss_and_gradient"], ["gradient"]),
    "logits, overwritten": ({"overwrite_logits": True}, ["loss"], ["gradient"]),
    "logits, stated, overwritten": (
        {"upstream_scale": 0.5, "overwrite_logits": True}, ["loss_and_gradient"], ["rescale"],
    ),
    "logits, table": ({"return_cases": True}, ["loss_and_gradient", "case_sums"], ["gradient"]),
    "linear, no gradient": ({}, ["loss"] * CHUNKS, None),
    "linear": ({}, ["loss_and_gradient"] * CHUNKS, ["rescale"]),
    "linear, sum": ({"reduction": "sum"}, ["loss_and_gradient"] * CHUNKS, ["rescale"]),
    "linear, row losses": ({"reduction": "none"}, ["loss"] * CHUNKS, ["gradient"] * CHUNKS + ["rescale"]),
    "linear, table": ({"return_cases": True}, ["loss_and_gradient"] * CHUNKS + ["case_sums"], ["rescale"]),
    "parallel": ({}, ["slice", "combine"], ["gradient"]),
}  # fmt: skip
# Operations of which each would make the host wait for the device.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


@dataclass
class Walk:
    """What was launched, and what else was asked of the device."""

    launches: list = field(
        default_factory=list
    )  # (kernel's name, kernel, grid, arguments, device then current)
    operations: list = field(default_factory=list)  # (name, positional arguments, keywords)
    contexts: list = field(default_factory=list)  # (autograd function, its context)
    current: int = 0

    def names(self):
        """The launched kernels; those of small rows by the name of the others."""
        return [name.removeprefix("small_") for name, *_ in self.launches]

    def take(self):
        """The launches since the last time."""
        taken, self.launches = self.names(), []
        return taken


class Recorder(TorchDispatchMode):
    """Notes operations; products into a tensor that is given are only checked."""

    def __init__(self, walk):
        super().__init__()
        self.walk = walk

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, _, overload = function._schema.name.removeprefix("aten::"), ".", function._overloadname
        self.walk.operations.append((f"{name}.{overload}", args, kwargs))
        assert name not in WAITS, f"{name} would wait for the device"
        # What is written into a tensor that is given, torch without CUDA cannot do even for fake ones.
        if overload == "dtype_out":
            check_product(*args, **kwargs)
            return kwargs["out"]
        if name in ("mm", "addmm") and overload == "out":
            *_, a, b = args
            assert kwargs["out"].shape == (a.shape[0], b.shape[1])
            assert {t.dtype for t in args} == {kwargs["out"].dtype}
            return kwargs["out"]
        return function(*args, **kwargs)


def check_product(added, a, b, out_dtype, beta=1, alpha=1, *, out):
    """The conditions of CUDA's own addmm with out_dtype and out, torch 2.10 and later (Blas.cpp, pull request 167931)."""
    assert a.dtype == b.dtype
    assert out_dtype == torch.float32
    assert a.dtype in (torch.float16, torch.bfloat16)
    assert out_dtype == out.dtype
    assert added.dtype in (out_dtype, a.dtype)
    assert added is out, "summed in place, without a copy"
    assert out.shape == (a.shape[0], b.shape[1])
    assert out.is_contiguous()


class Context:
    """What autograd hands to forward and backward."""

    def __init__(self, needs):
        self.needs_input_grad, self.saved_tensors = needs, ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


def indexed(tensor, key):
    """``tensor[key]`` of numbers, slices and None, which torch without CUDA refuses a fake CUDA tensor."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            start, stop, step = part.indices(tensor.shape[dim])
            assert step == 1
            tensor, dim = tensor.narrow(dim, start, max(0, stop - start)), dim + 1
    return tensor


@pytest.fixture
def walk(monkeypatch):
    """Fake tensors pass for those of a CUDA device; launches are recorded."""
    from difftrain_kernels import triton_kernels

    found = Walk()
    kernel_type = type(inspect.getmodule(triton_kernels.launch_rescale)._rescale_kernel)

    def record(kernel, grid):
        def launch(**arguments):
            name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            found.launches.append((name, kernel, grid, arguments, found.current))

        return launch

    def exchange(index):
        before, found.current = found.current, index
        return before

    def apply(function):
        def applied(*arguments):
            needs = tuple(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
            context = Context(needs)
            found.contexts.append((function, context))
            with torch.no_grad():
                return function.forward(context, *arguments)

        return applied

    monkeypatch.setattr(kernel_type, "__getitem__", record)
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(triton_kernels.tiles, "machine_of", lambda device: triton_kernels.tiles.H100)
    monkeypatch.setattr(upstream_prediction, "_expectations", {})  # fake ones must not stay
    # At a 16-byte boundary, as CUDA's allocator gives memory.
    monkeypatch.setattr(
        FakeTensor,
        "data_ptr",
        lambda self: 2**20 + self.storage_offset() * self.dtype.itemsize,
        raising=False,
    )

    def copy(self, source):
        found.operations.append(("copy_", (self, source), {}))
        return self

    def contiguous(self):
        return (
            self if self.is_contiguous() else torch.empty_like(self, memory_format=torch.contiguous_format)
        )

    # What torch without CUDA refuses a fake CUDA tensor before it asks what kind of tensor it is.
    monkeypatch.setattr(FakeTensor, "copy_", copy, raising=False)
    monkeypatch.setattr(FakeTensor, "contiguous", contiguous, raising=False)
    monkeypatch.setattr(FakeTensor, "requires_grad", property(is_wanted), raising=False)
    monkeypatch.setattr(FakeTensor, "__getitem__", indexed, raising=False)
    for module in (implementation, logits_loss, linear_loss, parallel_loss):
        monkeypatch.setattr(module, "is_traced", lambda tensor: False)
        for thing in vars(module).copy().values():
            if inspect.isclass(thing) and issubclass(thing, torch.autograd.Function):
                monkeypatch.setattr(thing, "apply", apply(thing))
    with FakeTensorMode(), Recorder(found):
        yield found


def wanted(tensor):
    tensor.has_gradient = True
    return tensor


def is_wanted(tensor):
    """Whether it was marked, or is a view of one that was."""
    return hasattr(tensor._base if tensor._is_view() else tensor, "has_gradient")


def call(way, vocab_size, dtype=torch.bfloat16, penalties=(0.25, 0.5), **more):
    """(the result, the inputs) of one call in this way, on an impl that it chooses itself."""
    options, _, backward = WAYS[way]
    y, x = (torch.zeros(N, dtype=torch.int64, device=HERE) for _ in range(2))
    labels = (y, x, MASK_ID, *penalties)
    mark = wanted if backward is not None else lambda tensor: tensor
    options = options | more
    if way.startswith("linear"):
        shapes = ((N, D), (vocab_size, D), (vocab_size,))
        hidden, weight, bias = inputs = [mark(torch.empty(s, dtype=dtype, device=HERE)) for s in shapes]
        return fused_linear_diffusion_loss(
            hidden, weight, *labels, bias=bias, chunk_tokens=8, **options
        ), inputs
    logits = mark(torch.empty(N, vocab_size, dtype=dtype, device=HERE))
    if way == "parallel":
        return vocab_parallel_diffusion_loss(logits, *labels, slice_sizes=[vocab_size], **options), [logits]
    return fused_diffusion_loss(logits, *labels, **options), [logits]


def backward(walk, loss):
    """The gradients that the function of the call gives for a gradient of its loss."""
    ((function, context),) = walk.contexts
    with torch.no_grad():
        upstream = torch.ones_like(loss)
        takes_more = inspect.getfullargspec(function.backward).varargs  # for outputs beside the loss
        return function.backward(context, upstream, *[None] * (4 if takes_more else 0))


def loss_of(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_each_call_launches_these_kernels_and_waits_for_nothing(way, size, walk):
    _, forward, launched_backward = WAYS[way]
    result, inputs = call(way, SIZES[size])
    loss = loss_of(result)
    assert walk.take() == forward
    assert (loss.device, loss.dtype) == (HERE, torch.float32)
    assert loss.shape == ((N,) if "row losses" in way else ())
    if launched_backward is None:
        assert not walk.contexts
        return
    gradients = backward(walk, loss)
    assert walk.take() == launched_backward
    for gradient, given in zip(gradients, inputs, strict=False):
        assert (gradient.shape, gradient.dtype, gradient.device) == (given.shape, given.dtype, HERE)
    assert copies_from_the_host(walk) == []


def copies_from_the_host(walk):
    """Operations that take a tensor on the CPU to the device."""
    moved = []
    for name, args, kwargs in walk.operations:
        if name.split(".")[0] in ("copy_", "_to_copy", "lift_fresh"):
            devices = [t.device.type for t in args if isinstance(t, torch.Tensor)] + [
                str(kwargs.get("device", ""))
            ]
            if "cpu" in devices and len({d.split(":")[0] for d in devices if d}) > 1:
                moved.append(name)
    return moved


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("penalties", ["numbers", "tensors"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", [way for way, (*_, backward) in WAYS.items() if backward is not None])
def test_every_launch_is_on_the_tensors_device_with_arguments_that_fit(way, size, penalties, walk):
    pair = (0.25, 0.5) if penalties == "numbers" else [torch.ones((), device=HERE) for _ in range(2)]
    vocab_size = SIZES[size]
    result, _ = call(way, vocab_size, penalties=pair)
    backward(walk, loss_of(result))
    for name, kernel, grid, arguments, current in walk.launches:
        assert current == HERE.index, "launched on another device than the tensors'"
        assert walk.current == 0, "the device that was current is so again"
        tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        assert {t.device for t in tensors.values()} == {HERE}
        options = {"num_warps", "enable_fp_fusion", "maxnreg"}
        assert set(arguments) - options == set(kernel.arg_names), name
        assert arguments["enable_fp_fusion"] is False
        assert 1 <= arguments["num_warps"] <= 32
        assert len(grid) == 1
        assert 0 < grid[0] < 2**31
        for key in ("pk", "pm"):
            if key in arguments:
                assert isinstance(arguments[key], torch.Tensor) == (penalties == "tensors")
        for key in ("logits_ptr", "gradient_ptr"):
            if key in arguments:
                rows = arguments[key]
                assert (rows.shape[-1], rows.stride(-1)) == (vocab_size, 1) or name == "rescale"
                assert rows.dtype == torch.bfloat16 or name == "rescale"
        rows = arguments.get("n_rows")
        assert rows is not None
        if "statistics_ptr" in arguments:
            assert arguments["statistics_ptr"].shape[1] == rows
            assert arguments["statistics_ptr"].dtype == torch.float32
            assert arguments["case_ptr"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_linear_loss_multiplies_in_the_inputs_dtype_and_sums_in_fp32(dtype, walk):
    result, _ = call("linear", 5001, dtype)
    products = [(name, args, kwargs) for name, args, kwargs in walk.operations if name.startswith("addmm")]
    wide = [kwargs["out"] for name, _, kwargs in products if name == "addmm.dtype_out"]
    # The weight's gradient, once a chunk; where all is fp32 anyway the plain product does.
    assert len(wide) == (0 if dtype == torch.float32 else CHUNKS)
    assert all(out.shape == (5001, D) for out in wide)
    # Logits and the gradient of hidden, each in the inputs' dtype.
    plain = [kwargs["out"].dtype for name, _, kwargs in products if name == "addmm.out"]
    assert plain == [dtype] * len(plain)
    assert len(plain) == 2 * CHUNKS + (CHUNKS if dtype == torch.float32 else 0)
    gradients = backward(walk, loss_of(result))
    assert [g.dtype for g in gradients[:3]] == [dtype] * 3


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_auto_takes_the_kernel_from_compute_capability_8_0_on(capability, walk, monkeypatch):
    from difftrain_kernels import triton_kernels

    monkeypatch.setattr(triton_kernels, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    logits = torch.empty(N, 66, device=HERE)
    assert implementation.uses_triton("auto", logits, logits.dtype) == (capability >= (8, 0))


def test_what_waits_is_seen(walk):
    value = torch.ones((), device=HERE)
    for wait in (lambda: value.item(), lambda: bool(value > 0), lambda: value.nonzero()):
        with pytest.raises((AssertionError, RuntimeError), match="would wait for the device|not linked"):
            wait()
    value.copy_(torch.ones((), device="cpu"))
    assert copies_from_the_host(walk) == ["copy_"]


def test_streams_learn_apart(walk, monkeypatch):
    for stream in (0, 7, 7):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index, s=stream: s, raising=False)
        call("logits", 66)
    assert len(upstream_prediction._expectations) == 2
