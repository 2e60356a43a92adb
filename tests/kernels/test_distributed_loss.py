"""Both losses under autocast, GradScaler and gradient checkpointing, and in DDP and FSDP2 processes."""

import importlib.util
import math
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracle
from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss
from processes import run_in_processes

pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter, about inf and NaN
]

IMPLS = ["reference", "triton"] if importlib.util.find_spec("triton") else ["reference"]
HOW = pytest.mark.parametrize("how", ["logits", "linear"])
VOCAB, WIDTH, MASK_ID = 13, 8, 12


class Model(nn.Module):
    """A head on a small network; the loss is made in forward, as FSDP needs it."""

    def __init__(self, dtype=torch.float64, device="cpu"):
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(VOCAB, WIDTH, dtype=dtype)
        self.block = nn.Sequential(
            nn.Linear(WIDTH, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, WIDTH, dtype=dtype)
        )
        self.head = nn.Linear(WIDTH, VOCAB, dtype=dtype)
        nn.init.normal_(self.head.bias)
        self.to(device)

    def forward(self, x, y, how, pk=0.25, pm=0.5, **options):
        hidden = self.block(self.tokens(x))
        return self.loss(hidden, x, y, how, pk, pm, **options)

    def loss(self, hidden, x, y, how, pk=0.25, pm=0.5, **options):
        if how == "logits":
            return fused_diffusion_loss(self.head(hidden), y, x, MASK_ID, pk, pm, **options)
        return fused_linear_diffusion_loss(
            hidden, self.head.weight, y, x, MASK_ID, pk, pm, bias=self.head.bias, **options
        )


def batch(shape, seed, ignored=0.2):
    """x and y with every kind of position."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, MASK_ID, shape, generator=generator)
    chance = torch.rand(shape, generator=generator)
    wrong = (y + 1) % MASK_ID
    x = torch.where(chance < 0.4, MASK_ID, torch.where(chance < 0.6, wrong, y))
    y = torch.where((chance >= 0.4) & (chance < 0.6), MASK_ID, y)
    return x, y.masked_fill(torch.rand(shape, generator=generator) < ignored, -1)


# Data-parallel processes ----------------------------------------------------------------------------

# What each of two processes gets at a step: uneven in sequences, in tokens, and in ignored positions.
SHARES = {
    "sequences": [((5, 6), 0.2), ((2, 6), 0.2)],
    "tokens": [((3, 4), 0.2), ((3, 11), 0.2)],
    "ignored": [((4, 6), 0.0), ((4, 6), 0.8)],
}
COUNTS = {"positions": lambda y: y.numel(), "counted": lambda y: int((y != -1).sum())}
RUNS = [*product(["ddp", "fsdp"], ["logits", "linear"], SHARES, COUNTS)]
STEPS = 3


def share(uneven, rank, step):
    shape, ignored = SHARES[uneven][rank]
    return batch(shape, seed=100 * step + rank, ignored=ignored)


def penalties(step):
    return 1.0 - 0.25 * step, 0.25 * step


def wrap(model, wrapper):
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.block)
    return fully_shard(model)


def train_in_processes(rank, wrapper, how, uneven, count, is_naive=False):
    """The recipe of docs/parallel.md: losses of the whole batch, and the parameters after some steps."""
    model = wrap(Model(), wrapper)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        x, y = share(uneven, rank, step)
        n = torch.tensor(COUNTS[count](y))
        dist.all_reduce(n)
        loss = model(x, y, how, *penalties(step), reduction="mean" if is_naive else "sum")
        optimizer.zero_grad()
        (loss if is_naive else loss * dist.get_world_size() / n).backward()
        optimizer.step()
        whole = loss.detach() / n
        dist.all_reduce(whole)
        losses.append(whole)
    parameters = [p.full_tensor() if wrapper == "fsdp" else p for p in model.parameters()]
    return torch.stack(losses), [p.detach().clone() for p in parameters]


def train_alone(how, uneven, count):
    """The same in one process, from both shares in one batch."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        shares = [share(uneven, rank, step) for rank in range(2)]
        x, y = (torch.cat([t.flatten() for t in parts]) for parts in zip(*shares, strict=True))
        loss = model(x, y, how, *penalties(step), reduction="sum") / COUNTS[count](y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach() for p in model.parameters()]


def work(rank):
    """Everything the processes compute: one start for all tests."""
    found = {run: train_in_processes(rank, *run) for run in RUNS}
    found["naive"] = train_in_processes(rank, "ddp", "logits", "sequences", "positions", is_naive=True)
    found["outside"] = loss_outside_forward(rank)
    found["checkpointed"] = checkpointed_in_ddp(rank)
    return found


def loss_outside_forward(rank):
    """What the linear loss says to a parameter that fully_shard has split."""
    model = wrap(Model(), "fsdp")
    x, y = share("tokens", rank, 0)
    try:
        model.loss(torch.zeros(*x.shape, WIDTH, dtype=torch.float64), x, y, "linear")
    except ValueError as error:
        return str(error)
    return ""


def checkpointed_in_ddp(rank):
    """Gradients with and without checkpointing of head and loss, under DDP."""
    gradients = []
    for is_checkpointed in (False, True):
        model = Model()
        plain = model.loss
        if is_checkpointed:
            model.loss = lambda *a, _plain=plain, **k: checkpoint(_plain, *a, use_reentrant=False, **k)
        parallel = wrap(model, "ddp")
        parallel(*share("sequences", rank, 0), "linear").backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return gradients


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_in_processes(2, work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("uneven", SHARES)
@HOW
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_uneven_processes_train_as_one(wrapper, how, uneven, count, found):
    losses, parameters = train_alone(how, uneven, count)
    for result in found:
        torch.testing.assert_close(result[wrapper, how, uneven, count][0], losses, rtol=1e-12, atol=0)
        for ours, alone in zip(result[wrapper, how, uneven, count][1], parameters, strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=1e-12)


def test_a_mean_of_means_would_train_otherwise(found):
    """Else the test above could not tell the two apart."""
    _, parameters = train_alone("logits", "sequences", "positions")
    differences = [
        (ours - alone).abs().max() for ours, alone in zip(found[0]["naive"][1], parameters, strict=True)
    ]
    assert max(differences) > 1e-4


def test_a_sharded_weight_outside_forward_is_refused_with_advice(found):
    for result in found:
        assert "weight must be a plain tensor, got a DTensor: under fully_shard" in result["outside"]


def test_checkpointed_loss_under_ddp_has_the_same_gradients(found):
    for result in found:
        plain, again = result["checkpointed"]
        for ours, expected in zip(again, plain, strict=True):
            assert torch.equal(ours, expected)


# Checkpointing, autocast and scaled gradients in one process ----------------------------------------


@HOW
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_head_and_loss_changes_no_bit(how, impl, reduction, device):
    dtype = torch.float32 if impl == "triton" else torch.float64
    x, y = (t.to(device) for t in batch((3, 5), seed=7))
    upstream = torch.rand((), device=device) if reduction == "mean" else torch.rand(3, 5, device=device)
    results, calls = [], []
    for is_checkpointed in (False, True):
        model = Model(dtype, device)

        def head_and_loss(hidden, model=model):
            calls.append(1)
            return model.loss(hidden, x, y, how, reduction=reduction, impl=impl)

        hidden = model.block(model.tokens(x))
        loss = (
            checkpoint(head_and_loss, hidden, use_reentrant=False)
            if is_checkpointed
            else head_and_loss(hidden)
        )
        loss.backward(upstream.to(loss))
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    # The linear loss of a mean keeps gradients, not what they are made from: nothing is run again.
    assert len(calls) == (2 if (how, reduction) == ("linear", "mean") else 3)


@HOW
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_loss_of_narrow_logits_and_fp32_gradients(how, impl, dtype, device):
    model = Model(torch.float32, device)
    x, y = (t.to(device) for t in batch((4, 9), seed=1))
    with torch.autocast(device.type, dtype):
        hidden = model.block(model.tokens(x))
        loss = model.loss(hidden, x, y, how, impl=impl)
    assert hidden.dtype == dtype
    assert loss.dtype == torch.float32
    hidden.retain_grad()
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}

    narrow = [t.detach().to(dtype).double().cpu() for t in (hidden, model.head.weight, model.head.bias)]
    logits = torch.nn.functional.linear(*narrow).to(dtype).flatten(0, 1)
    expected = oracle.diffusion_loss(
        logits.double(), y.flatten().cpu(), x.flatten().cpu(), MASK_ID, 0.25, 0.5
    )
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # Room for a few logits rounded the other way; states and weights left in fp32 would cost more.
    assert loss.item() == pytest.approx(expected.loss(), rel=rounding / 16)
    gradient = torch.from_numpy(expected.gradient / y.numel())
    states = narrow[0].flatten(0, 1)
    for found_, exact in (
        (model.head.weight.grad, gradient.t() @ states),
        (hidden.grad.flatten(0, 1), gradient @ narrow[1]),
    ):
        error = (found_.double().cpu() - exact).abs().max()
        assert error <= 4 * rounding * exact.abs().max()


@HOW
@pytest.mark.parametrize("impl", IMPLS)
def test_grad_scaler_trains_in_fp16_and_skips_a_step_that_overflows(how, impl, device):
    model = Model(torch.float32, device)
    exact = Model(torch.float64, device)
    exact.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=10**6)
    x, y = (t.to(device) for t in batch((4, 9), seed=1))
    before = [p.detach().clone() for p in model.parameters()]
    skipped = 0
    while all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = model(x, y, how, impl=impl)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += 1
        assert skipped < 40
    assert skipped > 2, "2^40 must overflow fp16"
    assert math.isfinite(loss.item())
    assert scaler.get_scale() > 2**8, "a scale that small would mean an overflow where there is none"
    exact(x, y, how, impl="reference").backward()
    for parameter, old, fp64 in zip(model.parameters(), before, exact.parameters(), strict=True):
        error = (old - parameter.detach() - fp64.grad).abs().max()
        assert error <= 2**-8 * max(fp64.grad.abs().max(), 1e-2)
