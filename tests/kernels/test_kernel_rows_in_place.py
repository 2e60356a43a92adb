"""Rows and token weights where they lie: batches of rows with gaps between them, read and written without a copy."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain_kernels import triton_kernels
from difftrain_kernels.terms import Terms
from difftrain_kernels.triton_kernels.spacing import Spacing, spacing_of
from difftrain_kernels.triton_kernels.term_arguments import scoring_arguments
from kernel_terms import WAYS, launch
from loss_problems import random_problem

# numpy warns where hardware computes inf and NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN = math.nan
# What a model's logits (B, T, V) are often cut to.
CUTS = {
    "all but the last": (slice(None), slice(None, -1)),
    "behind a prompt": (slice(None), slice(2, None)),
    "every other": (slice(None), slice(None, None, 2)),
    "one sequence": (slice(1, 2), slice(1, None)),
}


def cut_problem(cut, vocab_size, dtype, device, length=4, phase=0):
    """Logits (2, length, V) in a buffer of NaN, their cut, and labels of the cut."""
    whole, _, _ = random_problem(2 * length, vocab_size, 4, dtype)
    buffer = torch.full((phase + whole.numel() + 16,), NAN, dtype=dtype, device=device)
    whole = (
        buffer[phase : phase + whole.numel()].view(2, length, vocab_size).copy_(whole.view(2, length, -1))
    )
    rows = whole[CUTS[cut]]
    n = rows.shape[0] * rows.shape[1]
    _, y, x = random_problem(n, vocab_size, 4, dtype, seed=3)
    y[0], y[1] = 7, -1
    return whole, rows, y.to(device), x.to(device)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("vocab_size", [304, 301])
def test_batches_with_gaps_have_the_numbers_of_their_copy(cut, vocab_size, family, device):
    dtype = torch.bfloat16
    for way in (WAYS[0], WAYS[3]):
        whole, rows, y, x = cut_problem(cut, vocab_size, dtype, device)
        before = whole.clone()
        expected = launch(rows.reshape(-1, vocab_size), y, x, 4, 0.25, 0.5, way=WAYS[0], upstream=0.5)
        found = launch(rows, y, x, 4, 0.25, 0.5, way=way, upstream=0.5)
        assert torch.equal(found.statistics.case, expected.statistics.case)
        assert found.gradient.shape == rows.shape
        # A row that starts elsewhere is cut elsewhere, and sums in another order.
        torch.testing.assert_close(
            found.statistics.columns, expected.statistics.columns, rtol=2e-6, atol=1e-6
        )
        torch.testing.assert_close(
            found.gradient.reshape(-1, vocab_size),
            expected.gradient,
            rtol=2 * torch.finfo(dtype).eps,
            atol=1e-8,
        )
        rows_hit = torch.zeros_like(whole, dtype=torch.bool)
        rows_hit[CUTS[cut]] = way.endswith("over the logits")
        assert torch.equal(whole[~rows_hit], before[~rows_hit]), "what lies between is not written"


class Storages(TorchDispatchMode):
    """The memory behind all tensors that operations return: bytes by address."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes[storage.data_ptr()] = storage.nbytes()
        return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", CUTS)
def test_batches_with_gaps_are_not_copied(cut, way, device):
    _, rows, y, x = cut_problem(cut, 304, torch.float32, device)
    with Storages() as seen:
        found = launch(rows, y, x, 4, 0.25, 0.5, way=way)
    seen.bytes.pop(rows.untyped_storage().data_ptr(), None)
    size = rows.numel() * rows.element_size()
    large = [address for address, size_ in seen.bytes.items() if size_ >= size // 2]
    gradient = found.gradient.untyped_storage().data_ptr()
    assert large == ([] if way.endswith("over the logits") else [gradient])
    assert (found.gradient.data_ptr() == rows.data_ptr()) == way.endswith("over the logits")


@pytest.mark.parametrize("vocab_size", [301, 304])
@pytest.mark.parametrize("phase", [0, 3])
@pytest.mark.parametrize("cut", CUTS)
def test_gradient_rows_of_batches_start_at_the_phase_of_the_logits_rows(cut, phase, vocab_size, device):
    _, rows, _, _ = cut_problem(cut, vocab_size, torch.bfloat16, device, phase=phase)
    gradient = triton_kernels.empty_gradient_like(rows)
    tile = triton_kernels.Tile(warps=1)
    is_aligned = triton_kernels.tiles.tile_arguments(rows, tile)["ALIGNED"]
    starts = [
        (a.data_ptr(), b.data_ptr())
        for s, t in zip(rows, gradient, strict=True)
        for a, b in zip(s, t, strict=True)
    ]
    assert all((a - b) % 16 == 0 for a, b in starts)
    assert not is_aligned or all(a % 16 == 0 for a, _ in starts)
    gradient.copy_(torch.arange(gradient.numel(), device=device).view(gradient.shape) % 251)
    assert torch.equal(gradient.flatten().int(), torch.arange(gradient.numel(), device=device) % 251), (
        "no row overlaps"
    )


def test_a_rescale_reaches_every_row_of_batches_and_no_other(device):
    whole, rows, _, _ = cut_problem("all but the last", 304, torch.float32, device)
    before, last = rows.clone(), whole[:, -1].clone()
    triton_kernels.launch_rescale(rows, torch.tensor(3.0, device=device), stated=2.0)
    assert torch.equal(rows, before * 1.5)
    assert torch.equal(whole[:, -1], last)


def test_rows_that_two_strides_cannot_say_are_refused(device):
    logits = torch.zeros(2, 3, 4, 40, device=device)[:, :-1, :-1]
    labels = torch.zeros(12, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"logits must be \(N, V\) or \(B, T, V\), got \(2, 2, 3, 40\)"):
        triton_kernels.launch_loss(logits, labels, labels, 0)


# Token weights.

WEIGHTS = torch.tensor([0.5, 2.0, -1.0, 0.0, 3.0, 1.5, 0.25, 4.0, 7.0, 1.0, 0.125, 6.0])
LAYOUTS = {
    "by token": WEIGHTS.view(3, 4),
    "by sequence": WEIGHTS[:3, None].expand(3, 4),
    "by place": WEIGHTS[None, :4].expand(3, 4),
    "one for all": WEIGHTS[0].expand(3, 4),
    "transposed": WEIGHTS.view(4, 3).T,
    "every other": torch.stack([WEIGHTS, WEIGHTS + 9], 1)[:, 0].view(3, 4),
    "cut": torch.cat([WEIGHTS.view(3, 4), torch.full((3, 2), 9.0)], 1)[:, :4],
    "flipped and expanded thrice": WEIGHTS[:4].view(2, 1, 2).expand(2, 3, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_weights_are_read_through_their_strides(layout, family, device):
    weights = LAYOUTS[layout].to(device)
    logits, y, x = random_problem(12, 40, 4, torch.float32)
    arguments = (logits.to(device), y.to(device), x.to(device), 4, 0.25, 0.5)
    found, expected = (
        triton_kernels.launch_loss(*arguments, terms=Terms(token_weights=w))
        for w in (weights, weights.flatten().clone())
    )
    assert torch.equal(found.columns, expected.columns)
    assert torch.equal(found.case, expected.case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_token_weights_are_not_materialised(layout):
    weights = LAYOUTS[layout]
    passed = scoring_arguments(Terms(token_weights=weights), 12).token_weights
    assert (passed.data_ptr() == weights.data_ptr()) == (layout != "flipped and expanded thrice")


def test_token_weights_must_be_one_per_row(device):
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    terms = Terms(token_weights=torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"token_weights must be one per row, 4, got shape \(3,\)"):
        triton_kernels.launch_loss(torch.zeros(4, 40, device=device), labels, labels, 0, terms=terms)


@pytest.mark.parametrize(
    ("shape", "strides", "spacing"),
    [
        ((6,), (40,), Spacing(40)),
        ((2, 3), (120, 40), Spacing(40)),
        ((2, 3), (160, 40), Spacing(40, per_batch=3, batch_stride=160)),
        ((2, 1), (160, 40), Spacing(160)),
        ((1, 3), (160, 40), Spacing(40)),
        ((1, 1), (160, 40), Spacing(0)),
        ((2, 3), (0, 0), Spacing(0)),
        ((2, 3), (1, 0), Spacing(0, per_batch=3, batch_stride=1)),
        ((2, 3, 4), (24, 4, 1), Spacing(1, per_batch=12, batch_stride=24)),
        ((2, 3, 4), (12, 0, 1), None),
        ((), (), Spacing(0)),
    ],
)
def test_the_spacing_of_rows_joins_what_is_evenly_spaced(shape, strides, spacing):
    assert spacing_of(shape, strides) == spacing
    if spacing is not None and shape:
        places = torch.arange(math.prod(shape))
        per_batch = spacing.per_batch or len(places)
        batch, within = places // per_batch, places % per_batch
        found = batch * (spacing.batch_stride or 0) + within * spacing.stride
        steps = [torch.arange(size) * stride for size, stride in zip(shape, strides, strict=True)]
        expected = sum(torch.meshgrid(*steps, indexing="ij"))
        assert found.tolist() == expected.flatten().tolist()
