"""Recipes and terms of the loss in the trainer: what reaches the loss, the log, a resume, the command line."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from difftrain import loss as loss_module
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.cli import main
from difftrain.config.sources import read_toml
from difftrain.data import mask_alone, open_corpus, sample_indices
from difftrain.errors import UserError
from difftrain.loss import loss_terms
from difftrain.reporting.log import read_metrics
from difftrain.reporting.plot import plot_run
from difftrain.schedule import masking_penalties
from difftrain.training import step as step_module
from difftrain.training.loop import train
from difftrain_kernels import fused_linear_diffusion_loss
from resume_runs import train_with_stop
from run_digests import digests_of

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 1e-3}


def records_of(config, kind):
    return [r for r in read_metrics(Path(config.out_dir)) if r["kind"] == kind]


@pytest.fixture
def calls(monkeypatch):
    """The training calls of the loss from logits: positional arguments, options, and the loss."""
    seen, real = [], loss_module.fused_diffusion_loss

    def loss(*arguments, **options):
        result = real(*arguments, **options)
        if torch.is_grad_enabled():
            value = result[0] if isinstance(result, tuple) else result
            seen.append((arguments, options, value.item()))
        return result

    monkeypatch.setattr(loss_module, "fused_diffusion_loss", loss)
    return seen


# What reaches the loss --------------------------------------------------------------------------------


def test_by_default_the_loss_is_called_as_it_always_was(tiny, calls):
    config = tiny(max_iters=2)
    train(config)
    for _, options, _ in calls:
        weights = options.pop("token_weights")
        assert weights is None
        assert options == {"impl": "auto", "return_cases": True, "upstream_scale": 1.0}
    state = find_checkpoint(Path(config.out_dir), "latest").state
    evaluated = records_of(config, "eval")[-1]
    assert state["measure"] == [evaluated["validation_id"], 0.25, 0.5], (
        "what earlier versions saved goes on"
    )
    assert "counted" not in evaluated


@pytest.mark.parametrize("weighting", ["recipe", "uniform"])
@pytest.mark.parametrize("recipe", ["llada", "mdlm"])
def test_each_step_is_the_recipes_formula_on_its_own_samples(tiny, calls, recipe, weighting):
    config = tiny(recipe=recipe, token_weighting=weighting, max_iters=3, gradient_accumulation_steps=2)
    train(config)
    corpus = open_corpus(config.data)
    V = corpus.vocabulary.vocab_size
    assert len(calls) == 6
    for i, ((logits, y, x, mask_id, pk, pm), _, loss) in enumerate(calls):
        samples = sample_indices(i // 2, i % 2, 0, 1, config)
        tokens = corpus.windows("train", samples, seed=config.seed, length=config.block_size)
        masked, _, p_mask = mask_alone(tokens, samples, seed=config.seed, split="train", vocab_size=V)
        assert torch.equal(x, masked)
        assert torch.equal(y, tokens)
        assert (pk, pm) == (1.0, 1.0)
        wide = logits.detach().double()
        wide = wide[..., :mask_id] if recipe == "mdlm" else wide
        nll = -wide.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        weight = 1.0 / p_mask.double() if weighting == "recipe" else 1.0
        assert loss == pytest.approx((nll * weight)[x == mask_id].sum().item() / tokens.numel(), rel=1e-5)


def test_where_the_loss_wants_it_it_is_told_how_many_positions_are_masked(tiny, monkeypatch):
    config = tiny(recipe="llada", loss_impl="linear", max_iters=3, gradient_accumulation_steps=2)
    train(config)
    expected = [record["loss"] for record in records_of(config, "train")]
    told = []

    def linear_loss(hidden, weight, y, x, mask_id, *penalties, counted=None, **options):
        if counted is not None:
            assert counted == (x == mask_id).sum()
            told.append(counted)
        return fused_linear_diffusion_loss(
            hidden, weight, y, x, mask_id, *penalties, counted=counted, **options
        )

    monkeypatch.setattr(loss_module, "fused_linear_diffusion_loss", linear_loss)
    monkeypatch.setattr(step_module, "wants_count", lambda *_: True)
    config = tiny(
        recipe="llada", loss_impl="linear", max_iters=3, gradient_accumulation_steps=2,
        out_dir=f"{config.out_dir}-told",
    )  # fmt: skip
    train(config)
    assert [record["loss"] for record in records_of(config, "train")] == expected
    assert len(told) == 6


@pytest.mark.parametrize(
    ("changes", "device", "impl", "wants"),
    [
        ({"recipe": "llada"}, "cuda", "linear", True),
        ({"recipe": "mdlm"}, "cuda", "linear", True),
        ({"recipe": "llada"}, "cpu", "linear", False),
        ({"recipe": "llada"}, "cuda", "logits", False),
        ({}, "cuda", "linear", False),
        ({"mode": "gpt2"}, "cuda", "linear", False),
    ],
)
def test_the_linear_loss_on_a_gpu_wants_to_know_where_masks_alone_count(tiny, changes, device, impl, wants):
    runtime = SimpleNamespace(device=torch.device(device))
    assert loss_module.wants_count(tiny(**changes), impl, runtime) is wants


def test_the_terms_reach_the_loss_and_show_in_what_is_logged(tiny, calls):
    config = tiny(max_iters=3, gate="probability", masking_warmup_iters=2, **TERMS)
    train(config)
    for step, ((logits, y, x, mask_id, pk, pm), options, loss) in enumerate(calls):
        assert {name: options[name] for name in (*TERMS, "gate")} == TERMS | {"gate": "probability"}
        assert (pk, pm) == masking_penalties(step, config)
        z = 4.0 * torch.tanh(logits.detach().double() / 4.0)
        log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
        smooth = -0.9 * log_p.gather(-1, y[..., None])[..., 0] - 0.1 * log_p.mean(-1)
        is_masked, is_intact = (x == mask_id) & (y != mask_id), (x == y) & (x != mask_id)
        final = []
        for pk, pm in (masking_penalties(step, config), (0.25, 0.5)):
            step_weight = torch.where(is_masked, pk - 1.0, torch.where(is_intact, pm - 1.0, 0.0))
            weight = 1.0 + step_weight * log_p[..., mask_id].exp()
            final.append((weight * smooth + 1e-3 * lse**2).mean().item())
        record = records_of(config, "train")[step]
        assert [loss, record["loss"]] == pytest.approx([final[0]] * 2, rel=1e-5)
        assert record["loss_final"] == pytest.approx(final[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"gate": "probability"}, {"gate": "probability"}),
        ({"gate": "probability", "recipe": "llada"}, {}),
        ({"gate": "probability", "mode": "gpt2", "softcap": 5}, {"softcap": 5.0}),
        ({"recipe": "mdlm"}, {"forbid_mask": True}),
        ({"recipe": "llada", "forbid_mask": True, **TERMS}, TERMS | {"forbid_mask": True}),
    ],
)
def test_only_the_terms_that_do_something_are_passed_on(tiny, changes, terms):
    assert loss_terms(tiny(**changes)) == terms


def test_terms_work_in_gpt2_mode_and_uniform_weights_are_the_specifications_own(tiny):
    plain = tiny(max_iters=2)
    uniform = tiny(max_iters=2, token_weighting="uniform", out_dir=plain.out_dir + "-uniform")
    for config in (plain, uniform):
        train(config)
    assert digests_of(plain) == digests_of(uniform)
    gpt2 = tiny(max_iters=2, mode="gpt2", forbid_mask=True, out_dir=plain.out_dir + "-gpt2", **TERMS)
    train(gpt2)
    last = records_of(gpt2, "eval")[-1]
    assert last["loss"] > last["nll"] > 0


# Whole runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["llada", "mdlm"])
def test_a_recipe_learns_and_its_log_says_what_counted(tiny, recipe, capsys):
    config = tiny(recipe=recipe, max_iters=200, n_embd=32, eval_interval=100, log_interval=100, **TERMS)
    train(config)
    first, *_, last = records_of(config, "eval")
    assert last["loss_final"] < first["loss_final"]
    assert last["masked_nll"]["50"] < last["unigram_entropy"] < first["masked_nll"]["50"]
    assert first["validation_id"] == last["validation_id"]
    for record in (*records_of(config, "train"), last):
        assert 0 < record["counted"] < 1
        assert record["cases"]["intact"]["n"] == 0
        assert record["loss"] == record["loss_final"]
    assert "warning" not in capsys.readouterr().out
    best = min(records_of(config, "eval"), key=lambda r: r["loss_final"])
    assert find_checkpoint(Path(config.out_dir), "best").step == best["step"]
    assert plot_run(Path(config.out_dir)).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_linear_loss_trains_a_recipe_as_the_one_from_logits(tiny, dtype):
    usual = tiny(recipe="mdlm", max_iters=6, gradient_accumulation_steps=2, dtype=dtype, **TERMS)
    other = dataclasses.replace(usual, loss_impl="linear", out_dir=usual.out_dir + "-linear")
    for config in (usual, other):
        train(config)
    for kind in ("train", "eval"):
        for a, b in zip(records_of(usual, kind), records_of(other, kind), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if dtype == "float32" else 2e-2)
            assert a["cases"]["masked"]["n"] == b["cases"]["masked"]["n"]


def test_a_batch_in_which_nothing_counts_changes_nothing(tiny):
    config = tiny(
        recipe="llada",
        block_size=1,
        batch_size=1,
        max_iters=12,
        weight_decay=0.0,
        beta1=0.0,
        eval_interval=12,
    )
    train(config)
    empty = [r for r in records_of(config, "train") if r["counted"] == 0]
    assert empty
    assert all((r["loss"], r["grad_norm"], r["nll"]) == (0.0, 0.0, None) for r in empty)
    assert all(r["skipped_steps"] == 0 for r in empty)


# Going on ---------------------------------------------------------------------------------------------


def test_a_recipes_run_that_stopped_goes_on_to_the_same_bits(tiny):
    straight = tiny(recipe="mdlm", dropout=0.1, gradient_accumulation_steps=2, **TERMS)
    train(straight)
    stopped = dataclasses.replace(straight, out_dir=straight.out_dir + "-stopped")
    train_with_stop(stopped, 7)
    assert digests_of(stopped) == digests_of(straight)


@pytest.mark.parametrize(("was", "now"), [("specification", "mdlm"), ("llada", "specification")])
def test_a_resume_with_another_recipe_is_refused(tiny, was, now):
    config = tiny(max_iters=2, recipe=was)
    train(config)
    with pytest.raises(UserError, match=f"recipe must be '{was}' to resume .*, got '{now}'"):
        train(dataclasses.replace(config, recipe=now), resume=True)


@pytest.mark.parametrize(
    ("changes", "was"),
    [({"softcap": 1.0}, "0.0"), ({"z_loss": 0.5}, "0.0"), ({"token_weighting": "uniform"}, "recipe")],
)
def test_other_terms_are_noted_by_a_resume_and_start_a_new_best(tiny, capsys, changes, was):
    config = tiny(max_iters=4, recipe="llada")
    train(config)
    assert find_checkpoint(Path(config.out_dir), "latest").state["best_loss"] < 99
    capsys.readouterr()
    train(dataclasses.replace(config, max_iters=8, learning_rate=0.0, min_lr=0.0, **changes), resume=True)
    ((name, now),) = changes.items()
    assert f"note: {name} was {was} in step-00000004 and is {now} from here on" in capsys.readouterr().out
    evals = records_of(config, "eval")
    assert [r["step"] for r in evals] == [0, 4, 8]
    assert evals[1]["loss_final"] == evals[2]["loss_final"], (
        "step 4 is evaluated anew, and no weight moved since"
    )
    best = find_checkpoint(Path(config.out_dir), "best")
    assert best.step == 4, "of two equal ones the first"
    assert find_checkpoint(Path(config.out_dir), "latest").state["best_loss"] == evals[1]["loss_final"]


# The command line -------------------------------------------------------------------------------------


def test_the_options_work_on_the_command_line_and_are_saved(tiny, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(tiny(max_iters=1, eval_iters=2).to_toml())
    words = ["--recipe", "llada", "--token_weighting", "uniform", "--softcap", "30", "--z_loss", "1e-4"]
    words += ["--label_smoothing", "0.1", "--forbid_mask", "true", "--gate", "probability"]
    assert main(["train", "--config", str(tmp_path / "c.toml"), *words]) == 0
    saved = read_toml(tmp_path / "run" / "config.toml")
    expected = {"recipe": "llada", "token_weighting": "uniform", "softcap": 30.0, "z_loss": 1e-4,
                "label_smoothing": 0.1, "forbid_mask": True, "gate": "probability"}  # fmt: skip
    assert {name: saved[name] for name in expected} == expected
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["cases"]["masked"]["gap"] for line in text.splitlines()] == [None] * 3
    assert main(["sample", str(tmp_path / "run"), "--steps", "4", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["train", "--config", str(tmp_path / "c.toml"), "--forbid_mask", "true"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "forbid_mask must be false with recipe specification" in err
