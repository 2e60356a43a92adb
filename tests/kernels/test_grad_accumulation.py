"""accumulate_into_grad: the weight's gradient added to .grad inside backward, so that it never exists beside it."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from head_problems import error, head_problem, linear_loss, oracle_values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN
IMPLS = ["reference", "triton"] if importlib.util.find_spec("triton") else ["reference"]
BOTH = pytest.mark.parametrize("impl", IMPLS)
N, V = 24, 20


def fresh(problem):
    """The same problem with parameters of its own."""
    return *(t.detach().clone().requires_grad_() for t in problem[:3]), *problem[3:]


def accumulated(problem, steps, **options):
    """What .grad of hidden, weight and bias holds after so many micro-batches, each scaled."""
    problem = fresh(problem)
    for step in range(steps):
        (linear_loss(*problem, **options) * (step + 0.3)).sum().backward()
    return [t.grad for t in problem[:3]]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_gives_what_autograd_adds(impl, dtype, reduction, device):
    problem = head_problem(N, V, dtype, device)
    options = {"impl": impl, "reduction": reduction, "chunk_tokens": 12}
    plain = accumulated(problem, 2, **options)
    direct = accumulated(problem, 2, accumulate_into_grad=True, **options)
    upstream = torch.tensor(1.6) if reduction == "mean" else torch.full((N,), 1.6)
    expected = oracle_values(problem, reduction, upstream)[1:]
    for ours, theirs, exact in zip(direct, plain, expected, strict=True):
        assert ours.dtype == dtype
        floor = torch.finfo(dtype).eps * exact.abs().max().item()
        assert error(ours, exact) <= 2 * error(theirs, exact) + floor


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
def test_a_narrow_gradient_is_added_to_in_rounds(device):
    # 4 KiB hold the sums of 128 words, the least: three rounds.
    problem = head_problem(30, 300, torch.bfloat16, device)
    options = {"impl": "triton", "workspace_mib": 1 / 256, "chunk_tokens": 20}
    direct = accumulated(problem, 2, accumulate_into_grad=True, **options)
    expected = oracle_values(problem, "mean", torch.tensor(1.6))[1:]
    for ours, exact in zip(direct, expected, strict=True):
        assert error(ours, exact) <= 3 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()


class _LargestTensor(TorchDispatchMode):
    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


@BOTH
def test_the_gradient_never_exists_beside_grad(impl, device):
    hidden, weight, bias, y, x = head_problem(N, 40, torch.float32, device, width=64)
    weight.grad = torch.zeros_like(weight)
    for accumulates in (True, False):
        with _LargestTensor() as largest:
            largest.known = {t.untyped_storage().data_ptr() for t in (weight, weight.grad)}
            linear_loss(
                hidden, weight, bias, y, x, impl=impl, accumulate_into_grad=accumulates, chunk_tokens=12
            ).backward()
        assert (largest.nbytes >= weight.nbytes) != accumulates


@BOTH
def test_each_backward_of_a_kept_graph_adds_once(impl, device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.float32, device)
    weight.grad = torch.ones_like(weight)
    loss = linear_loss(hidden, weight, bias, y, x, impl=impl, accumulate_into_grad=True)
    loss.backward(retain_graph=True)
    once = weight.grad.clone() - 1
    loss.backward()
    torch.testing.assert_close(weight.grad, 1 + 2 * once, rtol=1e-6, atol=1e-6)


@BOTH
def test_whoever_asks_for_the_gradient_gets_it_and_grad_stays(impl, device):
    problem = head_problem(N, V, torch.float32, device)
    expected = torch.autograd.grad(linear_loss(*problem, impl=impl), problem[:3])
    problem[1].grad = torch.ones_like(problem[1])
    loss = linear_loss(*problem, impl=impl, accumulate_into_grad=True)
    found = torch.autograd.grad(loss, problem[:3], retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.autograd.grad(loss, problem[:1], retain_graph=True)
    loss.backward(inputs=problem[:1], retain_graph=True)
    assert problem[1].grad.eq(1).all()
    graph = torch.autograd.grad(loss, problem[:3], create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        graph[1].sum().backward()


@BOTH
def test_a_tied_weight_gets_both_gradients(impl, device):
    weight = head_problem(1, 30, torch.float32, device)[1]
    y, x = head_problem(N, 30, device=device)[3:]
    grads = []
    for accumulates in (False, True):
        weight.grad = torch.ones_like(weight)
        hidden = torch.tanh(torch.nn.functional.embedding(x, weight))
        linear_loss(hidden, weight, None, y, x, impl=impl, accumulate_into_grad=accumulates).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_hooks_are_refused_and_those_that_come_later_are_called(device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.float32, device)
    weight.grad = torch.zeros_like(weight)
    loss = linear_loss(hidden, weight, bias, y, x, accumulate_into_grad=True)
    seen = []
    weight.register_hook(seen.append)
    weight.register_post_accumulate_grad_hook(seen.append)
    loss.backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], weight.grad)
    with pytest.raises(ValueError, match="accumulate_into_grad needs a weight without hooks") as caught:
        linear_loss(hidden, weight, bias, y, x, accumulate_into_grad=True)
    assert "\n" not in str(caught.value)


def test_what_other_tensors_made_and_what_is_no_flag_is_refused(device):
    hidden, weight, bias, y, x = head_problem(N, V, torch.float32, device)
    with pytest.raises(ValueError, match="accumulate_into_grad needs a leaf, got a weight that other"):
        linear_loss(hidden, weight * 1, bias, y, x, accumulate_into_grad=True)
    with pytest.raises(TypeError, match="accumulate_into_grad must be True or False, got 1"):
        linear_loss(hidden, weight, bias, y, x, accumulate_into_grad=1)
    frozen = linear_loss(hidden, weight.detach() * 1, bias, y, x, accumulate_into_grad=True)
    frozen.backward()


def test_a_graph_ignores_it(device):
    torch._dynamo.reset()
    problem = head_problem(N, V, torch.float32, device)
    problem[1].grad = torch.zeros_like(problem[1])
    compiled = torch.compile(linear_loss, fullgraph=True, backend="eager")
    compiled(*problem, accumulate_into_grad=True).backward()
    found = problem[1].grad
    problem[1].grad = None
    linear_loss(*problem).backward()
    torch.testing.assert_close(found, problem[1].grad, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("alone")  # the last test: the group lives as long as this module
def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="accumulate_into_grad needs one process: DDP and FSDP average"):
        linear_loss(*head_problem(N, V, torch.float32), accumulate_into_grad=True)
