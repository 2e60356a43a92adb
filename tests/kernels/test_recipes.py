"""Each recipe against a formula written from its paper or trainer, in fp64 PyTorch: value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss, recipes

B, T, V, MASK_ID = 4, 12, 9, 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, MASK_ID, (B, T), generator=generator)
    t = torch.rand(B, 1, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    is_masked = torch.rand(B, T, generator=generator) < t
    x = torch.where(is_masked, MASK_ID, tokens)
    hidden = torch.randn(B, T, 5, generator=generator, dtype=torch.float64)
    head = torch.randn(V, 5, generator=generator, dtype=torch.float64)
    is_prompt = torch.arange(T)[None] < torch.tensor([[0], [3], [5], [T]])
    return {"tokens": tokens, "t": t, "is_masked": is_masked, "x": x, "hidden": hidden, "head": head} | {
        "is_prompt": is_prompt
    }


def nll_of(logits, tokens, forbid=False):
    if forbid:
        logits = logits.masked_fill(torch.arange(V) == MASK_ID, -torch.inf)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def check(batch, recipe, eager, rtol=1e-11):
    """Both losses with the recipe's options against ``eager(logits)``, values and gradients."""
    hidden, head, labels = batch["hidden"], batch["head"], (batch["tokens"], batch["x"], MASK_ID)
    results = []
    for loss_of in (
        lambda h, w: eager(h @ w.t()),
        lambda h, w: fused_diffusion_loss(h @ w.t(), *labels, **recipe),
        lambda h, w: fused_linear_diffusion_loss(h, w, *labels, **recipe),
    ):
        leaves = [t.clone().requires_grad_() for t in (hidden, head)]
        loss = loss_of(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours in results[1:]:
        for a, b in zip(ours, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


def test_llada_is_one_over_p_mask_over_all_positions(batch):
    is_masked, t = batch["is_masked"], batch["t"]
    check(
        batch,
        recipes.llada(is_masked, t),
        lambda z: (nll_of(z, batch["tokens"])[is_masked] / t.expand(B, T)[is_masked]).sum() / (B * T),
    )


def test_llada_sft_leaves_the_prompt_out_and_divides_by_the_answers_length(batch):
    is_masked, t, is_prompt = batch["is_masked"], batch["t"], batch["is_prompt"]
    length = (~is_prompt).sum(1, keepdim=True)

    def eager(z):
        terms = nll_of(z, batch["tokens"]) / t / length.clamp(min=1)
        return (terms * (is_masked & ~is_prompt)).sum() / B

    check(batch, recipes.llada_sft(is_masked, t, is_prompt), eager)


@pytest.mark.parametrize("normalization", recipes.NORMALIZATIONS)
@pytest.mark.parametrize("schedule", recipes.SCHEDULES)
def test_mdlm_weighs_by_its_schedule_and_never_answers_mask(batch, schedule, normalization):
    is_masked, is_supervised = batch["is_masked"], ~batch["is_prompt"]
    t = batch["t"].clone().requires_grad_()
    alpha = 1 - torch.cos(math.pi / 2 * (1 - t)) if schedule == "cosine" else 1 - t
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    weight = (-slope / (1 - alpha)).detach()

    def eager(z):
        terms = nll_of(z, batch["tokens"], forbid=True) * weight * (is_masked & is_supervised)
        if normalization == "token":
            return terms.sum() / is_supervised.sum()
        if normalization == "sequence":
            return (terms / is_supervised.sum(1, keepdim=True).clamp(min=1)).sum() / B
        return terms.sum() / B

    recipe = recipes.mdlm(
        is_masked, batch["t"], schedule=schedule, is_supervised=is_supervised, normalization=normalization
    )
    check(batch, recipe, eager)


def test_dllm_leaves_mask_in_and_may_weigh_uniformly(batch):
    is_masked = batch["is_masked"]
    recipe = recipes.mdlm(is_masked, batch["t"], is_weighted=False) | {"forbid_mask": False}
    check(batch, recipe, lambda z: nll_of(z, batch["tokens"])[is_masked].sum() / (B * T))


def test_nemo_clamps_p_mask_and_divides_by_the_steps_tokens(batch):
    is_masked, p_mask = batch["is_masked"], batch["t"].clone()
    p_mask[0] = 0.0

    def eager(z):
        return (nll_of(z, batch["tokens"]) * is_masked / p_mask.clamp(min=1e-8)).sum() / 1000

    check(batch, recipes.nemo(is_masked, p_mask, torch.tensor(1000)), eager)


def test_bd3lm_has_a_time_for_each_block(batch):
    is_masked = batch["is_masked"]
    t = torch.rand(B, 3, dtype=torch.float64) * 0.8 + 0.1
    wide = t[:, :, None].expand(B, 3, T // 3).reshape(B, T)
    check(
        batch,
        recipes.bd3lm(is_masked, t),
        lambda z: (nll_of(z, batch["tokens"], forbid=True) * is_masked / wide).sum() / (B * T),
    )


def test_i_dlm_adds_a_mean_of_masked_and_one_of_clean_positions(batch):
    is_masked = batch["is_masked"]

    def eager(z):
        nll = nll_of(z, batch["tokens"])
        return nll[is_masked].mean() + 0.2 * nll[~is_masked].mean()

    check(batch, recipes.i_dlm(is_masked), eager, rtol=1e-6)  # counts are turned into fp32 weights


def test_the_specification_is_the_plain_call(batch):
    logits = batch["hidden"] @ batch["head"].t()
    labels = (logits, batch["tokens"], batch["x"], MASK_ID)
    assert fused_diffusion_loss(*labels, **recipes.specification(0.3, 0.7)) == fused_diffusion_loss(
        *labels, 0.3, 0.7
    )


@pytest.mark.parametrize(
    "recipe",
    [
        lambda b: recipes.llada(b["none"], b["t"]),
        lambda b: recipes.llada_sft(b["is_masked"], b["t"], ~b["none"]),
        lambda b: recipes.mdlm(b["is_masked"], b["t"], is_supervised=b["none"]),
        lambda b: recipes.nemo(b["none"], b["t"], b["none"].sum()),
        lambda b: recipes.bd3lm(b["none"], b["t"], is_supervised=b["none"]),
        lambda b: recipes.i_dlm(b["none"], 0.0),
    ],
)
def test_a_batch_in_which_nothing_counts_gives_0_and_no_nan(batch, recipe):
    batch["none"] = torch.zeros_like(batch["is_masked"])
    logits = (batch["hidden"] @ batch["head"].t()).requires_grad_()
    loss = fused_diffusion_loss(logits, batch["tokens"], batch["x"], MASK_ID, **recipe(batch))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sqrt"}, "schedule must be one of"),
        ({"normalization": "mean"}, "normalization must be one of"),
    ],
)
def test_an_unknown_name_is_named(batch, options, message):
    with pytest.raises(ValueError, match=message):
        recipes.mdlm(batch["is_masked"], batch["t"], **options)
