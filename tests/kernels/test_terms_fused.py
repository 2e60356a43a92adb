"""Terms through the kernels, by the losses' public calls: equal to the reference, and no copy of the logits."""

import pytest
import torch

from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss, triton_kernels
from loss_problems import rows_are
from term_problems import ALL, SINGLES, batch, options_of

MASK_ID = 6
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf and NaN


def results_of(loss_of, leaves, **options):
    """Loss, gradients, table and rows, as one list of tensors."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss, cases, rows = loss_of(*leaves, return_cases=True, return_rows=True, entropy=True, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    table = cases.to_vector().to(loss.device)
    shown = [rows.nll, rows.lse, rows.p_mask, rows.confidence, rows.entropy, rows.case]
    return [loss.detach(), *gradients, table[torch.isfinite(table)], *shown]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", [*SINGLES, *ALL], ids="+".join)
def test_the_fused_losses_are_the_reference_for_every_term(names, reduction, family, device):
    names = tuple(n for n in names if n != "normalizer" or reduction != "none")
    logits, y, x = batch(vocab_size=37, dtype=torch.float32, device=device)
    options, y = options_of(names, y, MASK_ID)
    head = torch.randn(37, 37, generator=torch.Generator().manual_seed(1)).to(device) * 0.3
    losses = (
        ([logits], lambda z, **o: fused_diffusion_loss(z, y, x, MASK_ID, **options, **o)),
        (
            [logits, head],
            lambda h, w, **o: fused_linear_diffusion_loss(
                h, w, y, x, MASK_ID, chunk_tokens=4, **options, **o
            ),
        ),
    )
    for leaves, loss_of in losses:
        kernel, plain = (
            results_of(loss_of, leaves, reduction=reduction, impl=impl) for impl in ("triton", "reference")
        )
        for ours, expected in zip(kernel, plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.fixture
def seen(monkeypatch):
    """Addresses of the logits that kernels were launched on."""
    addresses = []
    for name in ("launch_loss", "launch_loss_and_gradient", "launch_gradient"):
        real = getattr(triton_kernels, name)

        def launch(logits, *arguments, _real=real, **options):
            addresses.append((logits.data_ptr(), logits.stride()))
            return _real(logits, *arguments, **options)

        monkeypatch.setattr(triton_kernels, name, launch)
    return addresses


VIEWS = {
    "all but the last": lambda z: z[:, :-1],
    "after the prompt": lambda z: z[:, 2:],
    "a window": lambda z: z[:, 1:4],
    "two batch dimensions": lambda z: z[None, :, :-1],
    "every other sequence": lambda z: z[::2, 1:],
}


@pytest.mark.parametrize(
    "mode", ["no gradient", "in backward", "stated", "over the logits", "stated, over the logits"]
)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_sequences_is_read_where_it_lies(view, mode, dtype, family, seen, device):
    logits, y, x = batch(vocab_size=37, dtype=dtype, device=device)
    y, x = (view(t[..., None]).squeeze(-1) for t in (y, x))
    whole = logits.detach().clone()
    part = view(whole)
    expected = part.clone().requires_grad_()
    loss = fused_diffusion_loss(expected, y, x, MASK_ID, 0.25, 0.5, impl="reference")
    loss.backward(torch.tensor(0.5, device=device))
    if mode == "no gradient":
        ours = fused_diffusion_loss(part, y, x, MASK_ID, 0.25, 0.5, impl="triton")
    else:
        leaf = whole.requires_grad_()
        node = leaf * 1  # inside the graph, as a model's logits are
        part = view(node)
        gradients = []
        part.register_hook(gradients.append)
        ours = fused_diffusion_loss(
            part, y, x, MASK_ID, 0.25, 0.5, impl="triton",
            upstream_scale=0.5 if "stated" in mode else None, overwrite_logits="over" in mode,
        )  # fmt: skip
        ours.backward(torch.tensor(0.5, device=device))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(gradients[0], expected.grad, rtol=tolerance, atol=tolerance)
        if "over" in mode:
            assert gradients[0].data_ptr() == part.data_ptr()
    torch.testing.assert_close(ours.detach(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert {address for address, _ in seen} == {part.data_ptr()}, "the logits were copied"


def test_logits_that_are_no_batches_of_rows_are_copied_and_right(device):
    logits, y, x = batch(vocab_size=37, dtype=torch.float32, device=device)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1]
    ours = fused_diffusion_loss(turned, y[:, :-1], x[:, :-1], MASK_ID, 0.25, 0.5, impl="triton")
    plain = fused_diffusion_loss(turned, y[:, :-1], x[:, :-1], MASK_ID, 0.25, 0.5, impl="reference")
    torch.testing.assert_close(ours, plain)


def test_a_shift_copies_labels_and_no_logits(seen, device):
    logits, y, x = batch(vocab_size=37, dtype=torch.float32, device=device)
    fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="triton", shift=1)
    assert [address for address, _ in seen] == [logits.data_ptr()]


def test_expanded_token_weights_are_not_materialised(monkeypatch, device):
    """A (B, 1) of weights is read through its strides, the second of which is 0."""
    from difftrain_kernels.triton_kernels import loss as loss_module

    told = []
    real = loss_module.scoring_arguments
    monkeypatch.setattr(loss_module, "scoring_arguments", lambda *a: (told.append(real(*a)), real(*a))[1])
    logits, y, x = batch(vocab_size=37, dtype=torch.float32, device=device)
    weights = torch.rand(y.shape[0], 1, device=device)
    fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="triton", token_weights=weights)
    (arguments,) = told
    assert arguments.token_weights.data_ptr() == weights.data_ptr()
    assert arguments.token_spacing.stride == 0


@pytest.mark.parametrize("family_name", ["small", "streamed"])
def test_the_plain_call_launches_the_plain_kernel(family_name, monkeypatch, device):
    """What is not asked for is not compiled: a plain call tells its kernel of no term."""
    from difftrain_kernels.terms import PLAIN
    from difftrain_kernels.triton_kernels import loss as loss_module
    from difftrain_kernels.triton_kernels.term_arguments import scoring_arguments

    told = []
    monkeypatch.setattr(
        loss_module,
        "scoring_arguments",
        lambda terms, n: (told.append(terms), scoring_arguments(terms, n))[1],
    )
    logits, y, x = batch(vocab_size=37, dtype=torch.float32, device=device)
    with rows_are(family_name):
        fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, impl="triton", gate="argmax", softcap=None)
    assert len(told) == 1
    assert told[0] is PLAIN


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scale_on_the_device_may_change_between_forward_and_backward(reduction, impl, device):
    logits, y, x = batch(vocab_size=37, dtype=torch.float32, device=device)
    head = torch.randn(37, 37, generator=torch.Generator().manual_seed(1)).to(device) * 0.3
    losses = (
        ([logits], fused_diffusion_loss),
        ([logits, head], lambda *leaves, **o: fused_linear_diffusion_loss(*leaves, chunk_tokens=4, **o)),
    )
    for tensors, loss_of in losses:
        found = []
        for changed in (1.0, 3.0):
            leaves = [t.clone().requires_grad_() for t in tensors]
            scale = torch.full((), 0.7, dtype=torch.float32, device=device)
            loss = loss_of(*leaves, y, x, MASK_ID, logit_scale=scale, reduction=reduction, impl=impl)
            scale.mul_(changed)
            upstream = torch.full_like(loss, 0.5)
            first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
            found.append([*first, *torch.autograd.grad(loss, leaves, upstream)])
        for kept, after in zip(*found, strict=True):
            torch.testing.assert_close(after, kept, rtol=0, atol=0)
