import pytest
import torch

from difftrain.data import corruption, open_corpus
from difftrain.evaluation import FIXED, LEVELS, TRAINING, evaluate, make_validation_set
from difftrain.loss import loss_terms
from difftrain.model import Transformer
from difftrain.reporting.records import loss_metrics
from difftrain.runtime import Runtime
from difftrain_kernels import fused_diffusion_loss

HERE = Runtime(torch.device("cpu"), torch.float32, rank=0, world_size=1)


@pytest.fixture
def setting(tiny):
    config = tiny(eval_iters=9)
    corpus = open_corpus(config.data)
    torch.manual_seed(0)
    model = Transformer(config, corpus.vocabulary.vocab_size)
    with torch.no_grad():
        model.head.weight[corpus.vocabulary.mask_id] *= 8  # so that [MASK] is answered now and then
    return config, corpus, model


def changed_share(corpus, x, y):
    mask_id = corpus.vocabulary.mask_id
    return ((x == mask_id) | (x != y)).double().mean().item()


def test_the_fixed_set_grows_from_almost_clean_to_almost_all_corrupted(setting):
    config, corpus, _ = setting
    batches = [(x, y) for part, x, y, _ in make_validation_set(corpus, config).batches if part == FIXED]
    assert len(batches) == config.eval_iters
    shares = [changed_share(corpus, x, y) for x, y in batches]
    assert shares[0] == 0  # at most 1 % of 16 tokens is none
    assert shares[-1] > 0.5
    assert sum(shares[5:]) > 2 * sum(shares[:4])


def test_levels_mask_exactly_their_share_and_replace_nothing(setting):
    config, corpus, _ = setting
    mask_id = corpus.vocabulary.mask_id
    seen = set()
    for part, x, y, _ in make_validation_set(corpus, config).batches:
        if part in LEVELS:
            seen.add(part)
            assert ((x == mask_id).sum(1) == int(LEVELS[part] * config.block_size)).all()
            assert torch.equal(x[x != mask_id], y[x != mask_id])
    assert seen == set(LEVELS)


def test_the_set_depends_on_data_and_seed_not_on_training_options_or_the_global_rng(setting, tiny):
    config, corpus, _ = setting
    base = make_validation_set(corpus, config)
    torch.manual_seed(5)
    torch.rand(3)
    other = tiny(eval_iters=9, batch_size=3, gradient_accumulation_steps=4, eval_interval=7, max_iters=2)
    assert make_validation_set(corpus, other).id == base.id
    assert make_validation_set(corpus, tiny(eval_iters=9, seed=2)).id != base.id
    assert make_validation_set(corpus, tiny(eval_iters=8)).id != base.id


def test_one_pass_gives_the_loss_at_any_penalties(setting):
    config, corpus, model = setting
    mask_id = corpus.vocabulary.mask_id
    validation_set = make_validation_set(corpus, config)
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    table = evaluate(model, validation_set, mask_id, HERE)[FIXED]
    assert len(calls) == len(validation_set.batches)

    fixed = [(x, y) for part, x, y, _ in validation_set.batches if part == FIXED]
    x, y = torch.cat([x for x, _ in fixed]), torch.cat([y for _, y in fixed])
    with torch.no_grad():
        logits = model.eval()(x).double()
    metrics = loss_metrics(table, 0.7, 0.2, config)
    for key, pk, pm in (("loss", 0.7, 0.2), ("loss_final", 0.25, 0.5), ("nll", 1.0, 1.0)):
        expected = fused_diffusion_loss(logits, y, x, mask_id, pk, pm).item()
        assert metrics[key] == pytest.approx(expected, rel=1e-5)
    assert len({metrics[key] for key in ("loss", "loss_final", "nll")}) == 3
    assert sum(metrics["cases"][kind]["n"] for kind in metrics["cases"]) == x.numel()
    sums = [sum(row["nll_sums"].values()) for row in metrics["cases"].values()]
    assert sum(sums) == pytest.approx(metrics["nll"] * x.numel(), rel=1e-5)


def test_masked_nll_of_a_level_is_the_mean_over_its_masked_positions(setting):
    config, corpus, model = setting
    mask_id = corpus.vocabulary.mask_id
    validation_set = make_validation_set(corpus, config)
    tables = evaluate(model, validation_set, mask_id, HERE)
    for level in (*LEVELS, TRAINING):
        nll = []
        for part, x, y, _ in validation_set.batches:
            if part == level:
                log_p = model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
                nll.append(-log_p[x == mask_id])
        assert tables[level].mean_nll()[0].item() == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)


def test_the_model_is_evaluated_without_dropout_and_trained_with_it_again(setting):
    config, corpus, model = setting
    model.dropout = 0.9
    model.train()
    arguments = (
        model,
        make_validation_set(corpus, config),
        corpus.vocabulary.mask_id,
        HERE,
    )
    first, second = (evaluate(*arguments)[FIXED].nll for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_gpt2_mode_predicts_the_next_token_of_clean_text(tiny):
    config = tiny(mode="gpt2")
    batches = make_validation_set(open_corpus(config.data), config).batches
    assert {part for part, *_ in batches} == {FIXED}
    for _, x, y, weights in batches:
        assert weights is None
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape == y.shape == (config.eval_batch_size, config.block_size)


@pytest.mark.parametrize("weighting", ["recipe", "uniform"])
@pytest.mark.parametrize("recipe", ["llada", "mdlm"])
def test_a_recipe_that_masks_alone_is_evaluated_from_least_to_most_masked_at_its_own_weights(
    setting, tiny, recipe, weighting
):
    _, corpus, model = setting
    terms = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    config = tiny(eval_iters=9, recipe=recipe, token_weighting=weighting, **terms)
    mask_id = corpus.vocabulary.mask_id
    validation_set = make_validation_set(corpus, config)
    fixed = [batch[1:] for batch in validation_set.batches if batch[0] == FIXED]
    growth = [0.01 + i / 8 * 0.98 for i in range(9)]
    for (x, y, weights), p_mask in zip(fixed, growth, strict=True):
        is_masked = x == mask_id
        assert torch.equal(torch.where(is_masked, y, x), y)
        weight = 1.0 / p_mask if weighting == "recipe" else 1.0
        torch.testing.assert_close(weights, torch.where(is_masked, weight, 0.0))
    shares = [(x == mask_id).double().mean().item() for x, *_ in fixed]
    assert shares == pytest.approx(growth, abs=0.12)

    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    table = evaluate(model, validation_set, mask_id, HERE, **loss_terms(config))[FIXED]
    metrics = loss_metrics(table, 1.0, 1.0, config)
    assert len(calls) == len(validation_set.batches)
    # By hand: the capped logits' log-softmax, over all words or all but [MASK].
    x, y, weights = (torch.cat(part) for part in zip(*fixed, strict=True))
    with torch.no_grad():
        z = 3.0 * torch.tanh(model.eval()(x).double() / 3.0)
    z = z[..., :mask_id] if recipe == "mdlm" else z
    log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
    nll = -log_p.gather(-1, y[..., None])[..., 0]
    rows = weights * (0.9 * nll - 0.1 * log_p.mean(-1) + 1e-3 * lse**2)
    assert metrics["loss"] == metrics["loss_final"] == pytest.approx(rows.mean().item(), rel=1e-5)
    is_masked = x == mask_id
    assert metrics["nll"] == pytest.approx(nll[is_masked].mean().item(), rel=1e-5)
    assert metrics["counted"] == is_masked.double().mean().item()
    cases = metrics["cases"]
    assert [cases[kind]["n"] for kind in cases] == [is_masked.sum(), 0, 0]
    assert (cases["masked"]["gap"] is None) == (recipe == "mdlm")
    assert cases["masked"]["nll"] == pytest.approx(metrics["nll"], rel=1e-6)


def test_the_sets_id_tells_what_is_compared(setting, tiny):
    """Recipes differ in it as their batches or weights do; the levels are the same for all."""
    _, corpus, _ = setting
    kinds = [("specification", "recipe"), ("llada", "recipe"), ("llada", "uniform"), ("mdlm", "recipe")]
    sets = [
        make_validation_set(corpus, tiny(eval_iters=9, recipe=recipe, token_weighting=weighting))
        for recipe, weighting in kinds
    ]
    ids = [validation_set.id for validation_set in sets]
    assert len(set(ids)) == 3
    assert ids[1] == ids[3], "MDLM and LLaDA mask and weigh alike"
    terms = tiny(eval_iters=9, softcap=5.0, z_loss=0.1, label_smoothing=0.1, gate="probability")
    assert make_validation_set(corpus, terms).id == ids[0]
    levels = [
        torch.stack([x for part, x, *_ in validation_set.batches if part in LEVELS])
        for validation_set in sets
    ]
    assert all(torch.equal(levels[0], other) for other in levels[1:])


def test_each_part_is_corrupted_as_it_says(setting, monkeypatch):
    config, corpus, _ = setting
    calls = []
    real = corruption.corrupt

    def spy(tokens, samples, **options):
        expected = corpus.windows("val", samples, seed=config.seed, length=config.block_size)
        assert torch.equal(tokens, expected)
        assert (options["split"], options["seed"]) == ("val", config.seed)
        calls.append(options["max_corruption"])
        return real(tokens, samples, **options)

    monkeypatch.setattr(corruption, "corrupt", spy)
    batches = make_validation_set(corpus, config).batches
    growth = [0.01 + i / 8 * 0.98 for i in range(9)]
    assert calls == pytest.approx([*growth[:1], 0.99, *growth[1:5], 0.99, *growth[5:9], 0.99])
    per_part = {part: sum(p == part for p, *_ in batches) for part in (*LEVELS, TRAINING)}
    assert set(per_part.values()) == {3}
