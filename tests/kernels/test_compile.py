"""The losses under torch.compile: as operators, compiled once whatever the penalties do."""

import importlib.util
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from difftrain.config import Config
from difftrain.schedule import masking_penalties
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss, linear_operators, operators

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN

MASK_ID = 4
IMPLS = ["reference", "triton"] if importlib.util.find_spec("triton") else ["reference"]
IMPL = pytest.mark.parametrize("impl", IMPLS)
LOSS = pytest.mark.parametrize("name", ["logits", "linear"])
PLAN = (None, 1 << 12, None)  # chunk_tokens, workspace_bytes, counted


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def problem_of(name, device, n=10, vocab_size=18, dtype=torch.float32, seed=0):
    """(logits,) or (hidden, weight, bias) that want gradients, and y and x with every kind of position."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, vocab_size, (n,), generator=generator)
    x = torch.where(torch.rand(n, generator=generator) < 0.4, MASK_ID, y)
    is_corrupted = torch.rand(n, generator=generator) < 0.25
    x = torch.where(is_corrupted, torch.randint(0, vocab_size, (n,), generator=generator), x)
    y = torch.where(is_corrupted, MASK_ID, y)
    y[3::7] = -1
    shapes = [(n, vocab_size)] if name == "logits" else [(n, 6), (vocab_size, 6), (vocab_size,)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    if name == "logits":
        inputs[0][::2, MASK_ID] += 4
    else:
        inputs[2][MASK_ID] += 2  # half of the positions answer [MASK]
    return [t.requires_grad_() for t in inputs], y.to(device), x.to(device)


def loss_of(name, inputs, y, x, pk, pm, **options):
    if name == "logits":
        return fused_diffusion_loss(*inputs, y, x, MASK_ID, pk, pm, **options)
    hidden, weight, bias = inputs
    options = {"chunk_tokens": 5} | options
    return fused_linear_diffusion_loss(hidden, weight, y, x, MASK_ID, pk, pm, bias=bias, **options)


def compiled(function, backend="aot_eager", **options):
    """The compiled function, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def scalars(device, *values):
    return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in values)


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_alike(name, impl, found, expected):
    """The same bits; but the eager reference of logits is autograd's own, and rounds otherwise.

    On CUDA both references do: what they compile to adds in other orders there.
    """
    if impl != "reference" or (name != "logits" and not found[0].is_cuda):
        assert_same(found, expected)
        return
    for a, b in zip(found, expected, strict=True):
        tolerance = {"rtol": 8 * torch.finfo(a.dtype).eps, "atol": 1e-6} if a.is_floating_point() else {}
        torch.testing.assert_close(a, b, **tolerance)


# Operators ------------------------------------------------------------------------------------------


# What an operator is told of the terms: none, and all that it can be told.
NO_TERMS = (None, None, None, "argmax", None, 0.0, 0.0, False, False, False)


def every_term(y, device):
    weights = torch.rand(y.shape, device=device)
    scale = torch.tensor(0.7, device=device)
    return (
        weights,
        torch.rand(3, 3, device=device),
        scale,
        "probability",
        3.0,
        0.2,
        0.05,
        True,
        True,
        True,
    )


def test_no_schema_holds_a_float_but_what_is_constant_in_a_training():
    registered = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("difftrain::")]
    assert {s.name.removeprefix("difftrain::") for s in registered} == {
        "diffusion_loss", "diffusion_loss_backward", "linear_diffusion_loss",
        "linear_diffusion_loss_backward", "case_sums", "shown_rows",
    }  # fmt: skip
    for schema in registered:
        held = re.findall(r"float\??\s(\w+)", str(schema))
        assert held == ["softcap", "label_smoothing", "z_loss"], schema


# Torch 2.15's opcheck looks at .grad of inputs that it cloned, and hides that warning only where it is no error.
OPCHECK = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


# opcheck does not take NaN for equal to NaN, so no mean of nothing.
@OPCHECK
@IMPL
@pytest.mark.parametrize(
    ("case", "reduction"),
    [
        ("fp32", "mean"), ("bf16", "none"), ("padded rows", "sum"), ("turned", "sum"), ("empty", "sum"),
        ("every term", "none"),
    ],
)  # fmt: skip
def test_opcheck_of_the_operators_on_logits(impl, reduction, case, device):
    n = 0 if case == "empty" else 7
    (logits,), y, x = problem_of(
        "logits", device, n, dtype=torch.bfloat16 if case == "bf16" else torch.float32
    )
    if case == "padded rows":
        logits = torch.randn(n, 25, device=device)[:, 3:21].requires_grad_()
        y, x = y.int(), x.int()
    if case == "turned":
        logits = torch.randn(18, n, device=device).t().requires_grad_()
    uses_triton = impl == "triton"
    terms = NO_TERMS
    if case == "every term":
        terms, y = every_term(y, device), torch.where(y == MASK_ID, -1, y)
    penalties = scalars(device, 0.25, 0.5)
    # A gradient made in forward is none of the operator's results: what it knows of them stays true.
    predicts = uses_triton and case != "turned"
    arguments = (logits, y, x, *penalties, MASK_ID, -1, reduction, uses_triton, predicts, False, *terms)
    opcheck(operators.diffusion_loss, arguments)
    loss, *statistics = (t.detach() for t in operators.diffusion_loss(*arguments))
    backward = (
        torch.randn_like(loss),
        logits.detach(),
        y,
        *statistics,
        reduction,
        uses_triton,
        MASK_ID,
        *terms,
    )
    opcheck(operators.diffusion_loss_backward, backward)
    opcheck(operators.case_sums, (*statistics, uses_triton, *terms))
    if case == "every term":
        opcheck(operators.shown_rows, (*statistics, uses_triton, *terms))


@OPCHECK
@IMPL
@pytest.mark.parametrize(
    ("case", "reduction"),
    [
        ("fp32", "mean"), ("bf16", "none"), ("no bias, frozen weight", "sum"), ("empty", "sum"),
        ("every term", "none"),
    ],
)  # fmt: skip
def test_opcheck_of_the_operators_on_hidden_states(impl, reduction, case, device):
    n = 0 if case == "empty" else 7
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    (hidden, weight, bias), y, x = problem_of("linear", device, n, dtype=dtype)
    if case.startswith("no bias"):
        bias, weight = None, weight.detach()
    head = (hidden, weight, bias)
    wants = [t is not None and t.requires_grad for t in head]
    terms = NO_TERMS
    if case == "every term":
        terms, y = every_term(y, device), torch.where(y == MASK_ID, -1, y)
    plan = (*terms, y, MASK_ID, -1, reduction, dtype, impl == "triton", *PLAN)
    arguments = (*head, x, *scalars(device, 0.25, 0.5), False, *wants, *plan)
    opcheck(linear_operators.linear_diffusion_loss, arguments)
    loss, *statistics = (t.detach() for t in linear_operators.linear_diffusion_loss(*arguments)[:3])
    head = [t if t is None else t.detach() for t in head]
    upstream = torch.randn_like(loss) if reduction == "none" else None
    opcheck(linear_operators.linear_diffusion_loss_backward, (*head, *statistics, upstream, *wants, *plan))


@IMPL
@LOSS
def test_a_derivative_of_an_operators_gradient_raises(name, impl, device):
    inputs, y, x = problem_of(name, device)
    penalties = scalars(device, 0.25, 0.5)
    if name == "logits":
        arguments = (
            *inputs, y, x, *penalties, MASK_ID, -1, "mean", impl == "triton", False, False, *NO_TERMS,
        )  # fmt: skip
        loss = operators.diffusion_loss(*arguments)[0]
    else:
        plan = (*NO_TERMS, y, MASK_ID, -1, "none", torch.float32, impl == "triton", *PLAN)
        arguments = (*inputs, x, *penalties, False, True, True, True, *plan)
        loss = linear_operators.linear_diffusion_loss(*arguments)[0].sum()
    for gradient in torch.autograd.grad(loss, inputs, create_graph=True):
        with pytest.raises(RuntimeError, match="have no second derivative"):
            gradient.sum().backward(retain_graph=True)


def test_a_gradient_not_made_in_forward_is_made_in_backward(device):
    inputs, y, x = problem_of("linear", device)
    expected = torch.autograd.grad(loss_of("linear", inputs, y, x, 0.25, 0.5), inputs)
    plan = (*NO_TERMS, y, MASK_ID, -1, "mean", torch.float32, False, 5, 1, None)
    arguments = (*inputs, x, *scalars(device, 0.25, 0.5), False, True, False, True, *plan)
    loss = linear_operators.linear_diffusion_loss(*arguments)[0]
    assert_same(torch.autograd.grad(loss, inputs), expected)


# One graph ------------------------------------------------------------------------------------------


@IMPL
@LOSS
def test_weights_scale_and_divisor_in_tensors_change_in_one_graph_with_the_eager_bits(name, impl, device):
    inputs, y, x = problem_of(name, device)
    y = torch.where(y == MASK_ID, -1, y)

    def step(inputs, y, x, weights, cases, scale, normalizer):
        loss, table, rows = loss_of(
            name, inputs, y, x, None, None, impl=impl, token_weights=weights, case_weights=cases, logit_scale=scale,
            normalizer=normalizer, gate="probability", softcap=3.0, label_smoothing=0.1, z_loss=0.01, forbid_mask=True,
            return_cases=True, return_rows=True, entropy=True,
        )  # fmt: skip
        return loss, table.weighted, table.z_loss, rows.entropy, rows.case

    compiled_step, counter = compiled(step)
    for i in range(5):
        weights = torch.rand(y.shape, device=device)
        arguments = (weights, torch.rand(3, 3, device=device), *scalars(device, 0.5 + i / 10, i))
        found, expected = compiled_step(inputs, y, x, *arguments), step(inputs, y, x, *arguments)
        assert_alike(name, impl, [t.detach() for t in found], [t.detach() for t in expected])
        for a, b in zip(*(torch.autograd.grad(r[0], inputs) for r in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@IMPL
@LOSS
@pytest.mark.parametrize(("reduction", "dtype"), [("mean", torch.bfloat16), ("none", torch.float32)])
def test_a_compiled_loss_has_the_bits_of_the_eager_one(name, impl, reduction, dtype, device):
    inputs, y, x = problem_of(name, device, dtype=dtype)
    penalties = scalars(device, 0.25, 0.5)

    options = {"impl": impl, "reduction": reduction, "return_cases": True}

    def function(inputs, y, x, pk, pm):
        inputs = [inputs[0].view(2, 5, -1), *inputs[1:]]
        return loss_of(name, inputs, y.view(2, 5), x.view(2, 5), pk, pm, **options)

    def everything(function):
        loss, cases = function(inputs, y, x, *penalties)
        assert cases.n_positions == 10
        assert not cases.nll.requires_grad
        upstream = torch.linspace(0.1, 1, loss.numel(), device=device).view(loss.shape)
        first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        second = torch.autograd.grad(loss, inputs, upstream)
        return loss, *first, *second, cases.counts, cases.nll, cases.gap

    fast, counter = compiled(function)
    found, expected = everything(fast), everything(function)
    assert_alike(name, impl, found, expected)
    assert counter.frame_count == 1


@LOSS
def test_a_curriculum_of_1000_steps_compiles_once(name, device):
    config = Config(masking_warmup_iters=900)
    inputs, y, x = problem_of(name, device)
    pk, pm = scalars(device, 1.0, 0.0)
    fast, counter = compiled(lambda inputs, y, x, pk, pm: loss_of(name, inputs, y, x, pk, pm))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1000):
            values = masking_penalties(step, config)
            pk.fill_(values[0])
            pm.fill_(values[1])
            loss = fast(inputs, y, x, pk, pm)
            gradients = torch.autograd.grad(loss, inputs)
            if step % 199 == 0:
                expected = loss_of(name, inputs, y, x, *values)
                torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
                for a, b in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert counter.frame_count == 1


@LOSS
@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
def test_a_curriculum_on_the_kernel_compiles_once(name, device):
    inputs, y, x = problem_of(name, device, n=3)
    pk, pm = scalars(device, 1.0, 0.0)
    fast, counter = compiled(
        lambda inputs, y, x, pk, pm: loss_of(name, inputs, y, x, pk, pm, impl="triton")
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(12):
            pk.fill_(1 - step / 16)
            pm.fill_(step / 24)
            found = fast(inputs, y, x, pk, pm)
            found = found, *torch.autograd.grad(found, inputs)
            expected = loss_of(name, inputs, y, x, pk, pm, impl="triton")
            assert_same(found, (expected, *torch.autograd.grad(expected, inputs)))
    assert counter.frame_count == 1


@LOSS
@IMPL
def test_any_number_of_positions_fits_one_graph(name, impl, device):
    reduction = "mean" if impl == "reference" else "none"
    fast, counter = compiled(
        lambda inputs, y, x, pk, pm: loss_of(
            name, inputs, y, x, pk, pm, impl=impl, reduction=reduction
        ).sum()
    )
    penalties = scalars(device, 0.25, 0.5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 11, 17):
            inputs, y, x = problem_of(name, device, n)
            for tensor in (inputs[0], y, x):
                torch._dynamo.mark_dynamic(tensor, 0)
            found = fast(inputs, y, x, *penalties)
            expected = loss_of(name, inputs, y, x, *penalties, impl=impl, reduction=reduction).sum()
            assert_alike(name, impl, [found], [expected])
            for a, b in zip(
                torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
@pytest.mark.xdist_group("inductor")
# No trials of what vectors the processor has, and no header compiled into the user's cache: half of the time.
@torch._inductor.config.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False})
def test_inductor_compiles_a_step_with_both_losses(device):
    inputs, y, x = problem_of("linear", device)
    penalties = scalars(device, 0.25, 0.5)

    def step(inputs, y, x, pk, pm):
        head = [torch.tanh(inputs[0]), *inputs[1:]]
        logits = torch.nn.functional.linear(*head)
        one, cases = loss_of("logits", [logits], y, x, pk, pm, return_cases=True)
        other = loss_of("linear", head, y, x, pk, pm, reduction="none")
        return one + other.sum(), cases.loss_at(pk, pm)

    fast, counter = compiled(step, "inductor")
    results = []
    for function in (fast, step):
        loss, again = function(inputs, y, x, *penalties)
        results.append((loss, again, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.0, 1.0, 0.3):
            for penalty in penalties:
                penalty.fill_(value)
            assert fast(inputs, y, x, *penalties)[0].item() == pytest.approx(
                step(inputs, y, x, *penalties)[0].item(), rel=1e-5
            )
    assert counter.frame_count == 1


# What else holds in a graph -------------------------------------------------------------------------


@LOSS
@pytest.mark.parametrize("held", ["argument", "attribute"])
def test_python_numbers_in_a_compiled_region_compile_twice_and_not_again(name, held, device):
    """The first call has the values as constants; the second, with others, has them as inputs."""
    inputs, y, x = problem_of(name, device)
    holder = SimpleNamespace()
    if held == "argument":
        fast, counter = compiled(lambda pk, pm: loss_of(name, inputs, y, x, pk, pm))
    else:
        fast, counter = compiled(lambda pk, pm: loss_of(name, inputs, y, x, holder.pk, holder.pm))
    counts = []
    for step in range(20):
        holder.pk, holder.pm = values = 1.0 - step / 40, step / 50
        found = fast(*values) if held == "argument" else fast(None, None)
        torch.testing.assert_close(found, loss_of(name, inputs, y, x, *values), rtol=1e-6, atol=0)
        counts.append(counter.frame_count)
    assert counts == [1] + [2] * 19


@LOSS
def test_a_wrong_argument_is_named_in_a_compiled_region_too(name, device):
    inputs, y, x = problem_of(name, device)
    fast, _ = compiled(lambda pk: loss_of(name, inputs, y[1:], x, pk, 0.5))
    message = r"y must have shape \(10,\), got \(9,\)"
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=message):
        fast(torch.tensor(0.25, device=device))


@LOSS
def test_one_penalty_may_be_a_number_and_the_other_a_tensor(name, device):
    inputs, y, x = problem_of(name, device)
    pk = torch.tensor(0.25, device=device, requires_grad=True)
    fast, counter = compiled(lambda inputs, y, x, pk: loss_of(name, inputs, y, x, pk, 0.5))
    found = fast(inputs, y, x, pk)
    assert torch.equal(found, loss_of(name, inputs, y, x, 0.25, 0.5))
    assert counter.frame_count == 1
    found.backward()
    assert pk.grad is None
    quiet = [t.detach() for t in inputs]
    assert not fast(quiet, y, x, pk).requires_grad


@IMPL
@LOSS
def test_penalties_may_change_between_forward_and_backward(name, impl, device):
    inputs, y, x = problem_of(name, device)
    pk, pm = scalars(device, 0.25, 0.5)
    fast, _ = compiled(
        lambda inputs, y, x, pk, pm: loss_of(name, inputs, y, x, pk, pm, impl=impl, reduction="none").sum()
    )
    loss = fast(inputs, y, x, pk, pm)
    pk.fill_(0.9)
    pm.fill_(0.9)
    expected = loss_of(name, inputs, y, x, 0.25, 0.5, impl=impl, reduction="none").sum()
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@IMPL
def test_permissions_and_statements_change_nothing_in_a_graph(impl, device):
    (logits,), y, x = problem_of("logits", device)
    penalties = scalars(device, 0.25, 0.5)

    def function(logits, y, x, pk, pm, **options):
        return loss_of("logits", [logits * 1], y, x, pk, pm, impl=impl, **options)

    fast, _ = compiled(function)
    plain = torch.autograd.grad(fast(logits, y, x, *penalties), logits)
    before = logits.detach().clone()
    allowed = fast(logits, y, x, *penalties, upstream_scale=1.0, overwrite_logits=True)
    assert_same(torch.autograd.grad(allowed, logits), plain)
    assert torch.equal(logits.detach(), before)


@LOSS
def test_labels_are_checked_in_a_graph_too(name, device):
    inputs, y, x = problem_of(name, device)
    fast, counter = compiled(
        lambda inputs, y, x, pk, pm: loss_of(name, inputs, y, x, pk, pm, check_labels=True)
    )
    assert fast(inputs, y, x, *scalars(device, 0.25, 0.5)).isfinite()
    y[5] = 18
    with pytest.raises(ValueError, match=r"y must be in \[0, 18\) .* got 18 at position \(5,\)"):
        fast(inputs, y, x, *scalars(device, 0.25, 0.5))
    assert counter.frame_count == 1


@LOSS
def test_a_compiled_second_derivative_raises(name, device):
    inputs, y, x = problem_of(name, device)
    fast, _ = compiled(lambda inputs, y, x, pk, pm: loss_of(name, inputs, y, x, pk, pm))
    loss = fast(inputs, y, x, *scalars(device, 0.25, 0.5))
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|does not require grad"):
        gradients[0].sum().backward()


@IMPL
@LOSS
def test_without_gradients_a_graph_computes_only_the_loss(name, impl, device, monkeypatch):
    from difftrain_kernels import chunks

    inputs, y, x = problem_of(name, device)
    expected = loss_of(name, inputs, y, x, 0.25, 0.5, impl=impl)
    monkeypatch.setattr(chunks, "_Gradients", None)
    fast, _ = compiled(lambda inputs, y, x, pk, pm: loss_of(name, inputs, y, x, pk, pm, impl=impl))
    with torch.no_grad():
        quiet = fast(inputs, y, x, *scalars(device, 0.25, 0.5))
    assert torch.equal(quiet, expected)
    assert not quiet.requires_grad


@IMPL
def test_a_compiled_region_under_autocast_gives_the_eager_bits(impl, device):
    dtype = torch.bfloat16 if impl == "reference" else torch.float16
    inputs, y, x = problem_of("linear", device)
    penalties = scalars(device, 0.25, 0.5)

    def function(inputs, y, x, pk, pm):
        with torch.autocast(device.type, dtype=dtype):
            hidden = torch.nn.functional.linear(inputs[0], torch.eye(6, device=device))
            return loss_of("linear", [hidden, *inputs[1:]], y, x, pk, pm, impl=impl)

    fast, counter = compiled(function)
    results = [
        (loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, 3.0)))
        for loss in (f(inputs, y, x, *penalties) for f in (fast, function))
    ]
    assert_same(*results)
    assert counter.frame_count == 1


@LOSS
def test_checkpointing_in_a_graph(name, device):
    inputs, y, x = problem_of(name, device)
    penalties = scalars(device, 0.25, 0.5)

    def function(inputs, y, x, pk, pm):
        return torch.utils.checkpoint.checkpoint(
            lambda first: loss_of(name, [first * 1, *inputs[1:]], y, x, pk, pm),
            inputs[0], use_reentrant=False,
        )  # fmt: skip

    fast, _ = compiled(function)
    results = [torch.autograd.grad(f(inputs, y, x, *penalties), inputs) for f in (fast, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# Numbers from outside a graph -----------------------------------------------------------------------


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("vocab_size", [66, 5000], ids=["small rows", "streamed rows"])
def test_a_whole_curriculum_of_numbers_is_one_triton_kernel(vocab_size, device, monkeypatch):
    """Counted on the key under which Triton looks a compiled kernel up, which takes no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from difftrain_kernels import triton_kernels

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = {}

    class Recorder:
        """A kernel that is not run."""

        def __init__(self, kernel):
            fixed = ["mask_id", "ignore_index", "n_rows"]
            names = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]
            self.jit = JITFunction(kernel.fn, do_not_specialize=[n for n in fixed if n in names])
            self.bind = create_function_from_signature(self.jit.signature, self.jit.params, backend)

        def __getitem__(self, grid):
            def launch(**arguments):
                _, key, options = self.bind(**arguments)
                keys.setdefault(self.jit.fn.__name__, set()).add(f"{key} {options}")

            return launch

    family = "_small" if vocab_size == 66 else ""
    for name in (f"{family}_loss_kernel", f"{family}_loss_and_gradient_kernel"):
        kernel = getattr(triton_kernels.loss, name)
        monkeypatch.setattr(triton_kernels.loss, name, Recorder(kernel))
    logits = torch.zeros(8, vocab_size, device=device)
    y = torch.zeros(8, dtype=torch.int64, device=device)
    config = Config()
    curriculum = [masking_penalties(step, config) for step in range(0, 1001, 10)]
    for pk, pm in [*curriculum, (1, 0), (0, 1), (1.0, 1.0), (0.0, 0.0), (16, 16.0), (True, False)]:
        triton_kernels.launch_loss(logits, y, y, 3, pk, pm)
        triton_kernels.launch_loss_and_gradient(logits, y, y, 3, pk, pm, upstream=1, divisor=8)
    assert [len(found) for found in keys.values()] == [1, 1]
    triton_kernels.launch_loss(logits, y, y, 3, *scalars(device, 0.25, 0.5))
    assert sorted(len(found) for found in keys.values()) == [1, 2]  # and one for tensors
