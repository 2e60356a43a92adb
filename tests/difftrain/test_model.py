import dataclasses

import pytest
import torch

from difftrain.config import Config
from difftrain.model import Transformer, make_optimizer

SMALL = Config(n_layer=2, n_head=2, n_embd=16, block_size=12)


def make(**changes):
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(SMALL, **changes), 9).eval()


@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize(("mode", "sees_later"), [("diffusion", True), ("gpt2", False)])
def test_only_diffusion_mode_looks_ahead(mode, sees_later, position):
    model = make(mode=mode, position=position)
    x = torch.randint(0, 9, (1, 12))
    changed = x.clone()
    changed[0, -1] = (x[0, -1] + 1) % 9
    difference = (model(x) - model(changed)).abs().amax(-1)[0]
    assert (difference[:-1] > 1e-7).any() == sees_later
    assert difference[-1] > 1e-4


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_the_order_of_the_tokens_matters(position):
    model = make(position=position)
    x = torch.tensor([[1, 2, 3, 4, 5, 6]])
    swapped = torch.tensor([[2, 1, 3, 4, 5, 6]])
    assert (model(x)[0, 3] - model(swapped)[0, 3]).abs().max() > 1e-5


def test_hidden_states_times_the_heads_weight_are_the_logits():
    model = make()
    x = torch.randint(0, 9, (2, 7))
    hidden = model(x, return_hidden=True)
    assert hidden.shape == (2, 7, 16)
    torch.testing.assert_close(hidden @ model.head.weight.T, model(x))
    assert model.head.weight is model.embedding.weight


def test_gpt2_small_has_124_million_parameters():
    config = Config(n_layer=12, n_head=12, n_embd=768, block_size=1024, position="learned", bias=True)
    model = Transformer(config, 50257, device="meta")
    assert model.n_parameters() == 124_439_808  # as Hugging Face's and OpenAI's GPT-2


def test_untrained_loss_on_unrelated_targets_is_near_uniform():
    x, y = torch.randint(0, 9, (2, 50, 12))
    nll = torch.nn.functional.cross_entropy(make()(x).flatten(0, 1), y.flatten())
    assert abs(nll - torch.tensor(9.0).log()) < 0.1


def test_too_long_input_names_expected_and_got():
    with pytest.raises(ValueError, match="at most block_size 12 columns, got 13"):
        make()(torch.zeros(1, 13, dtype=torch.int64))


def test_dropout_acts_in_training_only():
    model = make(dropout=0.5)
    x = torch.randint(0, 9, (1, 12))
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_only_matrices_decay():
    model = make(bias=True)
    decayed, others = make_optimizer(model, SMALL).param_groups
    assert decayed["weight_decay"] == SMALL.weight_decay
    assert decayed["betas"] == (SMALL.beta1, SMALL.beta2)
    assert others["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in others["params"])
    assert sum(p.numel() for g in (decayed, others) for p in g["params"]) == model.n_parameters()


def test_residual_projections_start_smaller_as_in_gpt2():
    model = make(n_layer=8, n_embd=64, block_size=4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / 4 if name.endswith("proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


def test_attention_embeddings_and_residuals_each_drop(monkeypatch):
    from torch.nn import functional

    shares = {"attention": [], "plain": []}
    attention, dropout = functional.scaled_dot_product_attention, functional.dropout

    def attend(*args, dropout_p, **options):
        shares["attention"].append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(
        functional, "dropout", lambda h, p, on: (shares["plain"].append((p, on)), dropout(h, p, on))[1]
    )
    make(dropout=0.3).train()(torch.zeros(1, 4, dtype=torch.int64))
    assert shares == {"attention": [0.3, 0.3], "plain": [(0.3, True)] * 5}  # embedding, two in each block


def test_the_mlp_is_two_matrices_with_gelu_between():
    mlp = make(bias=True).blocks[0].mlp
    h = torch.randn(3, 16)
    up = h @ mlp.up.weight.T + mlp.up.bias
    gelu = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    torch.testing.assert_close(mlp(h), gelu @ mlp.proj.weight.T + mlp.proj.bias)
