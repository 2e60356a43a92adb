"""The examples under examples: each trains, and its loss is the eager formula where one stands beside it."""

import ast
import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from difftrain_kernels import recipes
from processes import run_in_processes

FOLDER = Path(__file__).parent.parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_on_mesh(rank, n_data, n_vocab):
    """In one of several processes: losses and weights of the mesh's training."""
    return example("mesh_training").train(4, n_data, n_vocab, torch.float64)


@pytest.mark.xdist_group("processes")
def test_two_by_two_processes_of_data_and_vocabulary_train_as_one(tmp_path):
    (alone,) = run_in_processes(1, partial(train_on_mesh, n_data=1, n_vocab=1), tmp_path)
    for losses, weights in run_in_processes(4, partial(train_on_mesh, n_data=2, n_vocab=2), tmp_path):
        assert losses == pytest.approx(alone[0], abs=1e-12)
        assert weights.keys() == alone[1].keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[1][name], rtol=0, atol=1e-12)
    assert len(set(alone[0])) == 4


def mean(values):
    return sum(values) / len(values)


def test_nanogpt_loop_does_with_our_loss_what_it_did_before():
    module = example("nanogpt_loop")
    calls = []

    def both(*arguments):
        loss, before = module.fused_diffusion_loss(*arguments), module.eager_loss(*arguments)
        parameters = arguments[0]
        ours, theirs = (
            torch.autograd.grad(each, parameters, retain_graph=True)[0] for each in (loss, before)
        )
        torch.testing.assert_close(loss, before, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
        calls.append(arguments[-2:])
        return loss

    losses = module.train(both, steps=40)
    assert len(calls) == 40
    assert calls[0] == (1.0, 0.0)
    assert calls[-1] == (0.25, 0.5)
    assert losses[0] > 3.5
    assert mean(losses[-5:]) < 0.6 * losses[0]


@pytest.mark.filterwarnings("ignore")  # of other people's packages
def test_hf_trainer_learns_its_text_and_fills_the_gap(monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = example("hf_trainer")
    model = module.make_model()
    losses, evaluation = module.train(model)
    assert evaluation < 0.5 * float(losses[0])
    assert module.fill(model.eval(), module.GAP) in module.text


def test_hf_trainer_says_in_one_line_what_is_not_installed():
    code = (
        f"import runpy, sys; sys.path[:0] = {sys.path!r}; sys.modules['transformers'] = None; "
        f"runpy.run_path({str(FOLDER / 'hf_trainer.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "transformers is not installed: pip install 'difftrain[hf]'\n",
    )


def test_masked_only_is_the_loss_of_llada_and_of_mdlm():
    module = example("masked_only")
    generator = torch.Generator().manual_seed(1)
    x, y, t = module.get_batch(generator, batch_size=8)
    is_masked = x == module.mask_id
    assert torch.equal(is_masked, y != -1)
    tokens = torch.where(is_masked, y, x)
    logits = torch.randn(8, module.length, module.words + 1, generator=generator, requires_grad=True)

    # LLaDA: cross-entropy of masked tokens over t, summed, over batch size times length.
    nll = F.cross_entropy(logits[is_masked], tokens[is_masked], reduction="none")
    llada = (nll / t.expand_as(x)[is_masked]).sum() / x.numel()
    found = module.masked_loss(logits, x, y, t)
    torch.testing.assert_close(found, llada, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, llada)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert not gradients[0][~is_masked].any()

    # MDLM: log-probabilities among words alone, intact tokens copied (log 1), weight -1/t.
    log_p = torch.log_softmax(logits[..., : module.words], -1).gather(-1, tokens[..., None])[..., 0]
    mdlm = (torch.where(is_masked, -log_p, 0.0) / t).mean()
    found = module.masked_loss(logits, x, y, t, mdlm=True)
    torch.testing.assert_close(found, mdlm, rtol=1e-6, atol=0)
    assert (mdlm < llada).item(), "without [MASK] among the answers every word is likelier"


@pytest.mark.parametrize("mdlm", [False, True])
def test_masked_only_training_learns(mdlm):
    losses = example("masked_only").train(steps=80, mdlm=mdlm)
    assert mean(losses[-10:]) < 0.88 * mean(losses[:10])


RECIPES = example("recipes").RECIPES


def test_the_recipes_example_has_every_recipe():
    module = ast.parse(Path(recipes.__file__).read_text(encoding="utf-8"))
    public = {f.name for f in module.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")}
    assert public - {"schedule_weight"} <= RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_learns_in_its_example(name):
    before, after = example("recipes").train(RECIPES[name], steps=50)
    assert after < 0.9 * before
