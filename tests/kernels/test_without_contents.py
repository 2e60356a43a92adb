"""Fake tensors and meta: results of the right shape, dtype and device, and nothing is launched."""

import pytest
import torch

from contents import KINDS, Contents
from every_loss import EVERY_LOSS, IMPLS, REDUCTIONS, arguments_of, call, inputs_of

pytestmark = pytest.mark.usefixtures("alone")
# Every reduction; and of the dtypes, which decide in one place, those whose loss and gradient differ in theirs.
PROBLEMS = [*((r, torch.float32) for r in REDUCTIONS), ("mean", torch.bfloat16), ("mean", torch.float64)]
LAUNCHERS = (
    "launch_loss",
    "launch_loss_and_gradient",
    "launch_gradient",
    "launch_case_sums",
    "launch_slice",
)


@pytest.fixture
def nothing_launched(monkeypatch):
    """A function after which a launch fails."""

    def refuse(*_, **__):
        raise AssertionError("a launch")

    def from_here_on():
        if "triton" in IMPLS:
            from difftrain_kernels import triton_kernels

            for name in LAUNCHERS:
                monkeypatch.setattr(triton_kernels, name, refuse)

    return from_here_on


@EVERY_LOSS
@pytest.mark.parametrize(("reduction", "dtype"), PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about log2(0)
def test_results_without_contents_are_of_the_right_kind(
    way, reduction, kind, dtype, device, nothing_launched
):
    if way[1] == "triton" and dtype == torch.float64:
        pytest.skip("the kernel does not take fp64")
    # torch without CUDA ends the process where a fake CUDA tensor wants a gradient, and cannot index it.
    trained = kind != "fake cuda" or torch.cuda.is_available()
    if way[0] == "reference" and (kind == "fake outside its mode" or not trained):
        pytest.skip("plain PyTorch, which cannot do so itself")
    arguments = arguments_of(way, device, dtype)
    for name in inputs_of(way):
        arguments[name].requires_grad_(trained)
    options = {"reduction": reduction, "return_cases": True}
    if way[0] != "reference":
        options["check_labels"] = True  # of which there are none to look at
    expected, table = call(way, arguments, **options)
    if trained:
        expected.sum().backward()

    nothing_launched()
    contents = Contents(kind, device)
    empty = contents.removed(arguments)
    with contents.within:
        found, cases = call(way, empty, **options)
        assert found.requires_grad == trained
        if trained:
            found.backward(torch.ones_like(found))
    contents.check(found, expected)
    for name in ("counts", "nll", "gap"):
        contents.check(getattr(cases, name), getattr(table, name))
    assert cases.n_positions == table.n_positions
    assert repr(cases) == f"CaseTable without contents on {contents.device}"
    for name in inputs_of(way) if trained else ():
        contents.check(empty[name].grad, arguments[name].grad)


@EVERY_LOSS
def test_penalties_in_tensors_and_leading_shapes_are_taken_without_contents_too(way, nothing_launched):
    arguments = arguments_of(way) | {"pk": torch.tensor(0.25), "pm": torch.tensor(0.5)}
    for name in (inputs_of(way)[0], "y", "x"):
        arguments[name] = arguments[name].unflatten(0, (2, -1))
    nothing_launched()
    empty = Contents("meta", None).removed(arguments)
    assert call(way, empty, reduction="none").shape == arguments["y"].shape
    for mixed in ({"pk": 0.25}, {"pm": 0.25}):
        assert call(way, empty | mixed).shape == ()


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
def test_without_contents_the_kernel_is_refused_where_it_would_be_with_them(monkeypatch):
    from difftrain_kernels import triton_kernels

    way = ("logits", "triton")
    contents = Contents("fake", torch.device("cpu"))
    monkeypatch.setattr(triton_kernels, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device \(or TRITON_INTERPRET=1 .*\), got cpu"):
        call(way, contents.removed(arguments_of(way)))
    with pytest.raises(ValueError, match=r"needs logits in fp32, bf16 or fp16, got torch.float64"):
        call(way, contents.removed(arguments_of(way, dtype=torch.float64)))
    # Of CUDA no device is asked: there need not be one.
    contents = Contents("fake cuda", None)
    with contents.within:
        assert call(way, contents.removed(arguments_of(way))).device == contents.device
