"""Tensors whose memory is not what they hold: read right, or refused in one line, the same for every loss."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

from every_loss import (
    EVERY_LOSS,
    IMPLS,
    REDUCTIONS,
    arguments_of,
    assert_equal,
    call,
    inputs_of,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter, about log2(0)
]


def trained(way, device, **changes):
    arguments = arguments_of(way, device) | changes
    for name in inputs_of(way):
        arguments[name] = arguments[name].clone().requires_grad_()
    return arguments


# Lazy bits -----------------------------------------------------------------------------------------


@EVERY_LOSS
@pytest.mark.parametrize("name", ["inputs", "y", "x", "pk", "pm"])
def test_a_pending_negation_is_carried_out(way, name, device):
    pk, pm = (torch.tensor(p, device=device) for p in (0.25, 0.5))
    arguments = trained(way, device, pk=pk, pm=pm)
    expected = value_and_gradients(way, arguments, reduction="none")
    names = inputs_of(way) if name == "inputs" else (name,)
    arguments |= {name: torch._neg_view(-arguments[name]) for name in names}
    assert all(arguments[name].is_neg() for name in names)
    assert_equal(value_and_gradients(way, arguments, reduction="none"), expected)


@EVERY_LOSS
def test_the_imaginary_part_of_a_conjugate_is_read_as_torch_reads_it(way, device):
    arguments = trained(way, device)
    expected = value_and_gradients(way, arguments)
    name = inputs_of(way)[0]
    plain = arguments[name].detach()
    arguments[name] = torch.complex(torch.zeros_like(plain), -plain).requires_grad_().conj().imag
    assert arguments[name].is_neg()
    assert_equal(value_and_gradients(way, arguments), expected)


@EVERY_LOSS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_upstream_gradient_may_be_lazily_negated_or_expanded(way, reduction, device):
    arguments = trained(way, device)
    plain = torch.full_like(call(way, arguments, reduction=reduction).detach(), 0.3)
    expected = value_and_gradients(way, arguments, plain, reduction=reduction)
    expanded = torch.tensor(0.3, device=device).expand(plain.shape)
    for upstream in (torch._neg_view(-plain), expanded, torch._neg_view(-expanded)):
        assert_equal(value_and_gradients(way, arguments, upstream, reduction=reduction), expected)


# Strides -------------------------------------------------------------------------------------------


@EVERY_LOSS
def test_expanded_tensors_are_read_through_their_strides(way, device):
    # One row for all, one column for all, and one label for all.
    for dims in ((0,), (1,), (0, 1)):
        arguments = arguments_of(way, device)
        name = inputs_of(way)[0]
        value = arguments[name].detach()
        for dim in dims:
            value = value.narrow(dim, 0, 1)
        value = value.expand(arguments[name].shape)
        labels = {label: arguments[label][3:4].expand(arguments[label].shape) for label in ("y", "x")}
        assert 0 in value.stride()
        results = []
        for expanded in (True, False):
            leaf = (value if expanded else value.contiguous()).requires_grad_()
            given = labels if expanded else {key: label.contiguous() for key, label in labels.items()}
            results.append(value_and_gradients(way, arguments | given | {name: leaf}))
        assert_equal(*results)


# Tensors without plain memory ----------------------------------------------------------------------


KINDS = {
    "sparse": (lambda v: v.to_sparse(), r"must be a dense tensor, got layout torch.sparse_coo"),
    "sparse rows": (lambda v: v.to_sparse_csr(), r"must be a dense tensor, got layout torch.sparse_csr"),
    "mkldnn": (lambda v: v.to_mkldnn(), r"must be a dense tensor, got layout torch._mkldnn"),
    "nested": (lambda v: torch.nested.nested_tensor([v, v[:1]]), r"must be a plain tensor, got a nested"),
    "jagged": (
        lambda v: torch.nested.nested_tensor([v, v[:1]], layout=torch.jagged),
        r"must be a plain tensor, got a NestedTensor",
    ),
    "quantized": (
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.quint8),
        r"must have dtype .*, got torch.quint8",
    ),
    "two tensors": (lambda v: TwoTensor(v, v), r"must be a plain tensor, got a TwoTensor"),
    "lazy": (lambda v: torch.nn.parameter.UninitializedParameter(), r"must be initialised, got an Unini"),
}
OF_LABELS = ("sparse", "nested", "two tensors")
OF_PENALTIES = ("sparse", "two tensors")


@EVERY_LOSS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse", "ignore:.*quantiz")
def test_a_tensor_without_plain_memory_is_refused_in_one_line(way, kind):
    make, message = KINDS[kind]
    arguments = arguments_of(way) | {"pk": torch.tensor(0.25), "pm": torch.tensor(0.5)}
    names = [name for name in inputs_of(way) if name != "bias" or kind != "sparse rows"]
    names += ["y", "x"] if kind in OF_LABELS else []
    names += ["pk", "pm"] if kind in OF_PENALTIES else []
    for name in names:
        with pytest.raises(ValueError, match=f"^{name} {message}") as caught:
            call(way, arguments | {name: make(arguments[name])})
        assert "\n" not in str(caught.value)


@EVERY_LOSS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_sparse_upstream_gradient_is_refused(way, reduction, device):
    loss = call(way, trained(way, device), reduction=reduction)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)sparse"):
        loss.backward(torch.ones_like(loss).to_sparse())


class Forgetful(torch.autograd.Function):
    """The same numbers, of which nothing comes back."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


@EVERY_LOSS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_upstream_gradient_that_is_undefined_counts_as_zeros(way, reduction, device):
    arguments = trained(way, device)
    inputs = [arguments[name] for name in inputs_of(way)]
    loss = Forgetful.apply(call(way, arguments, reduction=reduction))
    (loss.sum() + sum(t.sum() for t in inputs)).backward()
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in inputs)


@EVERY_LOSS
def test_a_subclass_with_plain_memory_and_a_result_still_on_its_way_are_taken(way):
    class Tagged(torch.Tensor):
        pass

    arguments = arguments_of(way)
    expected = call(way, arguments, reduction="none")
    name = inputs_of(way)[0]
    for value in (
        arguments[name].as_subclass(Tagged),
        torch.nn.Parameter(arguments[name]),
        torch.nn.Parameter(arguments[name].as_subclass(Tagged)),
    ):
        assert torch.equal(call(way, arguments | {name: value}, reduction="none"), expected)
    on_its_way = AsyncCollectiveTensor(arguments[name])
    assert torch.equal(call(way, arguments | {name: on_its_way}, reduction="none"), expected)


@EVERY_LOSS
def test_labels_and_penalties_made_in_inference_mode_serve_in_training(way, device):
    arguments = trained(way, device)
    expected = value_and_gradients(way, arguments)
    with torch.inference_mode():
        made = {"y": arguments["y"].clone(), "x": arguments["x"].clone()}
        made |= {name: torch.tensor(arguments[name], device=device) for name in ("pk", "pm")}
    assert_equal(value_and_gradients(way, arguments | made), expected)


# Transforms ----------------------------------------------------------------------------------------


def in_vmap(loss_of, logits):
    return torch.vmap(loss_of)(torch.stack([logits, 2 * logits]))


def in_grad(loss_of, logits):
    return torch.func.grad(loss_of)(logits)


def in_jvp(loss_of, logits):
    return torch.func.jvp(loss_of, (logits,), (logits,))[1]


def in_dual_level(loss_of, logits):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss_of(forward_ad.make_dual(logits, logits))).tangent


@EVERY_LOSS
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is dep")  # torch's own, where it first needs jvp
@pytest.mark.parametrize("transform", [in_vmap, in_grad, in_jvp, in_dual_level], ids=lambda f: f.__name__)
def test_inside_a_transform_the_reference_is_right_and_every_kernel_is_refused(way, transform, device):
    arguments = arguments_of(way, device)
    name, impl = way
    first = inputs_of(way)[0]

    def loss_of(value):
        return call(way, arguments | {first: value})

    if name in ("linear", "parallel") or impl == "triton":
        place = "forward-mode differ" if transform is in_dual_level else r"torch.func's transforms"
        with pytest.raises(ValueError, match=f"(must be called|needs a call) outside {place}") as caught:
            transform(loss_of, arguments[first])
        assert "\n" not in str(caught.value)
        return
    logits = arguments[first].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(logits), logits)
    expected = {
        in_vmap: lambda: torch.stack([loss_of(arguments[first]), loss_of(2 * arguments[first])]),
        in_grad: lambda: gradient,
        in_jvp: lambda: (gradient * arguments[first]).sum(),
        in_dual_level: lambda: (gradient * arguments[first]).sum(),
    }[transform]()
    torch.testing.assert_close(transform(loss_of, arguments[first]), expected)


@EVERY_LOSS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_upstream_gradients_is_right_in_the_reference_and_refused_by_kernels(
    way, reduction, device
):
    arguments = trained(way, device)
    loss = call(way, arguments, reduction=reduction)
    first = arguments[inputs_of(way)[0]]
    upstream = torch.rand(3, *loss.shape, device=device)
    if way not in (("reference", None), ("logits", "reference")):
        with pytest.raises(RuntimeError, match="take one upstream gradient at a time, got a batch"):
            torch.autograd.grad(loss, first, upstream, is_grads_batched=True)
        return
    (found,) = torch.autograd.grad(loss, first, upstream, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(loss, first, u, retain_graph=True)[0] for u in upstream]
    torch.testing.assert_close(found, torch.stack(rows))


def test_the_automatic_choice_goes_around_a_transform(monkeypatch, device):
    from difftrain_kernels import implementation

    def choose(like):
        return implementation.uses_triton("auto", like, like.dtype)

    # As on a GPU: "auto" wants the kernel.
    monkeypatch.setattr(implementation, "_obstacle_to_triton", lambda *_, **__: "")
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "is_meta": False, "dtype": torch.float32})
    assert choose(on_gpu)
    assert torch.vmap(lambda v: v + choose(on_gpu))(torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("way", [(name, impl) for name in ("logits", "linear") for impl in IMPLS])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's, of an input that is no leaf
def test_a_compiled_call_reads_pending_negations_too(way, device):
    torch._dynamo.reset()
    pk, pm = (torch.tensor(p, device=device) for p in (0.25, 0.5))
    arguments = trained(way, device, pk=pk, pm=pm)
    loss_of = torch.compile(
        lambda given: call(way, given, reduction="none"), backend="aot_eager", fullgraph=True
    )
    results = []
    for negated in (False, True):
        given = {
            n: torch._neg_view(-v) if negated and torch.is_tensor(v) else v for n, v in arguments.items()
        }
        loss = loss_of(given)
        upstream = torch.full_like(loss.detach(), 0.3)
        upstream = torch._neg_view(-upstream) if negated else upstream
        inputs = [arguments[name] for name in inputs_of(way)]
        results.append((loss.detach(), torch.autograd.grad(loss, inputs, upstream)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
