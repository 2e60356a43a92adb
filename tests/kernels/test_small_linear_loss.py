"""The loss of a head of few words on the CPU: against the oracle, and as the way of many words takes it."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain_kernels import chunks, fused_linear_diffusion_loss, small_linear_loss, small_vocabulary
from head_problems import MASK_ID, error, head_problem, linear_loss, oracle_values, value_and_gradients

KINDS = ["few are ignored", "many are ignored", "none is ignored", "few weigh 0", "many weigh 0"]


def problem(kind, n=60, vocab_size=20, dtype=torch.float64):
    """A head's tensors and labels, and the penalties, in which so many rows take no part."""
    hidden, weight, bias, y, x = head_problem(n, vocab_size, dtype)
    y = y.clamp(min=0)
    penalties = {"pk": 0.25, "pm": 0.5}
    if kind.endswith("ignored"):
        step = {"few": 12, "many": 2, "none": n + 1}[kind.split()[0]]
        y[torch.arange(n) % step == step - 1] = -1
    else:
        penalties = {"pk": 0.0, "pm": 0.0}
        with torch.no_grad():
            says_mask = torch.nn.functional.linear(hidden, weight, bias).argmax(1) == MASK_ID
        x, y = y.clone(), torch.where(y == MASK_ID, 0, y)
        x = torch.where(says_mask, y, x)
        if kind.startswith("few"):
            kept = says_mask.nonzero().flatten()[4:]
            x[kept] = torch.where(y[kept] == 1, 2, 1)  # corrupted: their answer weighs 1
    return (hidden, weight, bias, y, x), penalties


def all_of(inputs, penalties, upstream=1.0, **options):
    """Loss, three gradients and the table's tensors."""
    *head, y, x = inputs
    head = [None if t is None else t.detach().requires_grad_() for t in head]
    loss, table = fused_linear_diffusion_loss(
        *head[:2], y, x, MASK_ID, bias=head[2], return_cases=True, **penalties, **options
    )
    wanted = [t for t in head if t is not None]
    return [
        loss.detach(),
        *torch.autograd.grad(loss * upstream, wanted),
        table.counts,
        table.nll,
        table.gap,
    ]


@pytest.fixture
def taken(monkeypatch):
    """Which gradients each pass was to make."""
    calls, made = [], small_linear_loss._Pass
    monkeypatch.setattr(
        small_linear_loss, "_Pass", lambda *a: calls.append(tuple(a[-1])) or made(*a)
    )  # fmt: skip
    return calls


@pytest.fixture(params=[0.25, 0.0], ids=["few others are multiplied", "no others are"])
def others(request, monkeypatch):
    """Rows that take no part are multiplied where they are few, of those in KINDS; or never."""
    monkeypatch.setattr(small_linear_loss, "MANY", request.param)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_the_oracle_s(reduction, dtype, taken):
    inputs = head_problem(301, 90, dtype)
    upstream = torch.tensor(0.3)
    found = value_and_gradients(linear_loss, inputs, upstream, reduction=reduction, chunk_tokens=64)
    assert taken == [(True, True, True)]
    for ours, exact in zip(found, oracle_values(inputs, reduction, upstream), strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact) <= 16 * torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"reduction": "sum"}, {"chunk_tokens": 1}, {"chunk_tokens": 7}, {"chunk_tokens": 1000}, {"normalizer": 7.0},
        {"shift": 1}, {"upstream_scale": 0.3}, {"upstream_scale": 1 / 3, "chunk_tokens": 9},
    ],
    ids=str,
)  # fmt: skip
def test_the_results_are_those_of_the_way_of_chunks(kind, options, others, taken, monkeypatch):
    inputs, penalties = problem(kind)
    found = all_of(inputs, penalties, 0.3, **options)
    assert len(taken) == 1
    monkeypatch.setattr(small_linear_loss, "takes", lambda *_: False)
    expected = all_of(inputs, penalties, 0.3, **options)
    assert len(taken) == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)
    assert torch.equal(found[4], expected[4])


@pytest.mark.parametrize("kind", ["few are ignored", "many are ignored", "few weigh 0"])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_graph_gives_the_same_bits(kind, chunk_tokens, others):
    inputs, penalties = problem(kind)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(head, y, x):
        loss, table = fused_linear_diffusion_loss(
            *head[:2],
            y,
            x,
            MASK_ID,
            bias=head[2],
            return_cases=True,
            chunk_tokens=chunk_tokens,
            **penalties,
        )
        return loss, table.counts, table.nll, table.gap

    head = [t.detach().requires_grad_() for t in inputs[:3]]
    loss, *table = step(head, *inputs[3:])
    expected = all_of(inputs, penalties, chunk_tokens=chunk_tokens)
    found = [loss, *torch.autograd.grad(loss, head), *table]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_slice_of_sequences_gives_the_same_bits_in_a_graph_and_by_its_copy():
    (hidden, weight, bias, y, x), penalties = problem("few are ignored")
    sequences = torch.nn.functional.pad(hidden.detach().view(4, 15, 16), (0, 0, 0, 1)).requires_grad_()
    labels = y.view(4, 15), x.view(4, 15)

    def step(sequences, weight, bias):
        return fused_linear_diffusion_loss(
            sequences[:, :-1], weight, *labels, MASK_ID, bias=bias, chunk_tokens=7, **penalties
        )

    head = sequences, weight, bias
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss, *gradients = all_of((hidden, weight, bias, y, x), penalties, chunk_tokens=7)[:4]
    for run in (step, compiled):
        found = run(*head)
        of_sequences, *others = torch.autograd.grad(found, head)
        assert torch.equal(found, loss)
        assert torch.equal(of_sequences[:, :-1].reshape(60, 16), gradients[0])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, gradients[1:], strict=True))


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_backward_under_autocast_is_that_of_the_forward_s_dtype(chunk_tokens):
    inputs, _ = problem("few are ignored", dtype=torch.float32)
    loss = linear_loss(*inputs, chunk_tokens=chunk_tokens)
    plain = torch.autograd.grad(loss, inputs[:3], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = [torch.autograd.grad(loss, inputs[:3], retain_graph=True) for _ in range(2)]
    for found in again:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sums_beyond_the_numbers_are_infinite_in_silence():
    y = torch.full((4,), 1)
    hidden, weight = torch.full((4, 1), 3e38), torch.zeros(10, 1)
    weight[0] = 1.0
    assert fused_linear_diffusion_loss(hidden, weight, y, y, MASK_ID, return_cases=True)[0] == math.inf
    hidden, weight = torch.full((4, 1), 1.5e308, dtype=torch.float64), weight.double()
    _, table = fused_linear_diffusion_loss(hidden, weight, y * 5, y, MASK_ID, return_cases=True)
    assert math.inf in table.gap.tolist()


@pytest.mark.parametrize("kind", ["few are ignored", "many are ignored"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("holds", ["a number", "a whole state"])
def test_what_an_ignored_position_holds_reaches_no_gradient(kind, bad, holds, others):
    inputs, penalties = problem(kind)
    plain = all_of(inputs, penalties, chunk_tokens=16)
    poisoned = inputs[0].detach().clone()
    rows = (inputs[3] == -1).nonzero().flatten()
    poisoned[rows[::2], 3 if holds == "a number" else slice(None)] = bad
    found = all_of((poisoned, *inputs[1:]), penalties, chunk_tokens=16)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert found[1][rows].eq(0).all()


class _Products(TorchDispatchMode):
    """How many rows of 20 logits each product makes or takes."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm"):
            n, inner = args[-2].shape
            self.rows.append(inner if n == 20 else n)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_take_no_part_are_not_multiplied_where_they_are_many(kind, others):
    inputs, penalties = problem(kind)
    with _Products() as products:
        found = all_of(inputs, penalties)
    n_live = int(found[1].abs().sum(1).ne(0).sum())
    assert n_live == 60 if kind.startswith("none") else 0 < n_live < 60
    is_moved = kind.startswith("many") or small_linear_loss.MANY == 0
    backward = n_live if is_moved else 60
    forward = backward if kind.endswith("ignored") else 60
    assert products.rows == [forward, backward, backward]


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradients_that_are_wanted_are_made(kind, wanted, others, taken):
    inputs, penalties = problem(kind)
    expected = all_of(inputs, penalties, chunk_tokens=11)[1:4]
    head = [t.detach().requires_grad_(want) for t, want in zip(inputs[:3], wanted, strict=True)]
    loss = fused_linear_diffusion_loss(
        *head[:2], *inputs[3:], MASK_ID, bias=head[2], chunk_tokens=11, **penalties
    )
    loss.backward()
    assert taken[1:] == [wanted]
    for tensor, want, gradient in zip(head, wanted, expected, strict=True):
        assert torch.equal(tensor.grad, gradient) if want else tensor.grad is None


def test_without_gradients_the_loss_has_the_same_bits(taken):
    inputs, penalties = problem("few are ignored")
    expected = all_of(inputs, penalties)
    with torch.no_grad():
        loss, table = fused_linear_diffusion_loss(
            *inputs[:2], *inputs[3:], MASK_ID, bias=inputs[2], return_cases=True, **penalties
        )
    assert torch.equal(loss, expected[0])
    assert torch.equal(table.nll, expected[5])
    with torch.inference_mode():
        quiet = fused_linear_diffusion_loss(
            *(t.clone() for t in inputs[:2]), *inputs[3:], MASK_ID, bias=inputs[2], **penalties
        )
    assert torch.equal(quiet, loss)
    assert taken[1:] == [(False, False, False)] * 2


@pytest.mark.parametrize("label", [20, -2, 2**40])
def test_a_label_that_is_none_makes_the_loss_nan_or_raises(label):
    inputs, penalties = problem("none is ignored")
    inputs[3][5] = label
    loss, of_hidden, of_weight, *_ = all_of(inputs, penalties)
    assert loss.isnan()
    assert of_hidden.isnan().any(1).nonzero().tolist() == [[5]]
    assert of_weight.isnan().all()
    with pytest.raises(ValueError, match=r"y must be in \[0, 20\)"):
        all_of(inputs, penalties, check_labels=True)


@pytest.mark.parametrize("ignore_index", [-1, 3, 100])
def test_labels_of_32_bits_penalties_in_tensors_and_any_shape_and_stride(ignore_index):
    (hidden, weight, bias, y, x), penalties = problem("none is ignored")
    y[7:11] = ignore_index
    plain = all_of((hidden, weight, bias, y, x), penalties, ignore_index=ignore_index)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in penalties.items()}
    wide = torch.zeros(60, 40, dtype=torch.float64)
    wide[:, ::2][:, :16] = hidden.detach()
    for states, shape in ((wide[:, ::2][:, :16], (60,)), (hidden.view(4, 15, 16), (4, 15))):
        labels = (t.int().view(shape) for t in (y, x))
        found = all_of((states, weight, bias, *labels), tensors, ignore_index=ignore_index)
        assert all(torch.equal(a.view_as(b), b) for a, b in zip(found, plain, strict=True))


def test_a_head_without_bias_and_no_positions(taken):
    (hidden, weight, _, y, x), penalties = problem("few are ignored")
    found = all_of((hidden, weight, None, y, x), penalties)
    zero = all_of((hidden, weight, torch.zeros(20, dtype=torch.float64), y, x), penalties)
    for ours, theirs in zip(found, (*zero[:3], *zero[4:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    for labels in (y[:0], torch.full((3,), -1)):
        n = len(labels)
        loss, *gradients = all_of((hidden[:n], weight, None, labels, labels), penalties, reduction="sum")[
            :3
        ]
        assert loss == 0.0
        assert not any(gradient.any() for gradient in gradients)
        assert gradients[1].shape == weight.shape
    assert len(taken) == 4


def test_a_second_backward_makes_the_same_bits_and_sees_changes(others, taken):
    inputs, _ = problem("few are ignored")
    for upstream in (1.0, 0.3):
        loss = linear_loss(*inputs, chunk_tokens=16) * upstream
        first, second = (torch.autograd.grad(loss, inputs[:3], retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(taken) == 4
    with torch.no_grad():
        inputs[4].zero_()  # x, which the weights of the first pass stand for
    again = torch.autograd.grad(loss, inputs[:3], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for changed in inputs[:4]:
        loss = linear_loss(*inputs)
        loss.backward(retain_graph=True)
        with torch.no_grad():
            changed += 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_penalties_that_change_before_a_second_backward_count_as_they_were():
    inputs, _ = problem("few are ignored")
    pk = torch.tensor(0.25, dtype=torch.float64)
    loss = fused_linear_diffusion_loss(*inputs[:2], *inputs[3:], MASK_ID, pk, 0.5)
    first = torch.autograd.grad(loss, inputs[0], retain_graph=True)[0]
    pk.fill_(3.0)
    assert torch.equal(first, torch.autograd.grad(loss, inputs[0])[0])


def test_a_second_derivative_raises():
    inputs, _ = problem("few are ignored")
    gradients = torch.autograd.grad(linear_loss(*inputs), inputs[:3], create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="have no second derivative"):
            gradient.sum().backward(retain_graph=True)


def test_a_stated_number_that_is_too_small_raises():
    inputs, penalties = problem("few are ignored")
    all_of(inputs, penalties, counted=55)
    with pytest.raises(ValueError, match="counted must be at least 55, as many positions count, got 54"):
        all_of(inputs, penalties, counted=54)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"}, {"token_weights": torch.ones(60)}, {"gate": "probability"}, {"return_rows": True},
        {"accumulate_into_grad": True},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_it_has_no_way_for_goes_the_way_of_many_words(options, taken):
    (hidden, weight, _, y, x), penalties = problem("few are ignored")
    weight.grad = torch.zeros_like(weight)
    result = fused_linear_diffusion_loss(hidden, weight, y, x, MASK_ID, **penalties, **options)
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    fused_linear_diffusion_loss(*narrow, y, x, MASK_ID, **penalties).backward()
    before = torch.get_autocast_dtype("cpu")
    try:  # the context would turn itself off for this dtype
        torch.set_autocast_dtype("cpu", torch.float32)
        torch.set_autocast_enabled("cpu", True)
        fused_linear_diffusion_loss(
            hidden.float(),
            weight.float(),
            y,
            x,
            MASK_ID,
            bias=torch.zeros(20, dtype=torch.bfloat16),
            **penalties,
        )
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", before)
    with torch.autocast("cpu", torch.bfloat16):
        fused_linear_diffusion_loss(hidden.float(), weight.float(), y, x, MASK_ID, **penalties).backward()
    assert taken == []


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = self.nbytes = 0
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.names.add(function._schema.name)
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


def test_a_step_takes_few_operations_and_no_memory_of_all_logits():
    hidden, weight, _, y, x = head_problem(768, 66, torch.float32, width=4)
    with _Seen() as forward:
        loss = fused_linear_diffusion_loss(hidden, weight, y, x, MASK_ID, 0.25, 0.5, chunk_tokens=64)
    assert forward.nbytes == 64 * 66 * 4
    with _Seen() as forward:
        loss, _ = fused_linear_diffusion_loss(hidden, weight, y, x, MASK_ID, 0.25, 0.5, return_cases=True)
    with _Seen() as backward:
        loss.backward()
    assert 15 < forward.count <= 22  # NumPy's are not counted
    assert backward.count <= 8


def test_chunks_are_those_of_the_workspace(monkeypatch):
    inputs, penalties = problem("none is ignored")
    plain = all_of(inputs, penalties)
    sizes, score = [], small_vocabulary.score
    monkeypatch.setattr(
        small_vocabulary,
        "score",
        lambda logits, *a, **options: sizes.append(len(logits)) or score(logits, *a, **options),
    )
    monkeypatch.setattr(chunks, "TILE_ROWS", 1)
    found = all_of(inputs, penalties, workspace_mib=10 * chunks.row_bytes(20, torch.float64, False) / 2**20)
    assert sizes == [10] * 6
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_tensor_of_a_subclass_gives_a_plain_loss_and_a_stated_scale_multiplies_nothing():
    class Named(torch.Tensor):
        pass

    (hidden, weight, bias, y, x), penalties = problem("few are ignored", dtype=torch.float32)
    head = [t.detach().as_subclass(Named).requires_grad_() for t in (hidden, weight, bias)]
    loss = fused_linear_diffusion_loss(
        *head[:2], y, x, MASK_ID, bias=head[2], upstream_scale=0.3, **penalties
    )
    assert type(loss) is torch.Tensor
    with _Seen() as backward:
        loss.backward(torch.tensor(0.3))
    assert not {"aten::mul_", "aten::div"} & backward.names
