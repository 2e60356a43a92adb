"""DiffusionLossTrainer: accumulation, the curriculum, evaluation, epochs and what it refuses."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from difftrain.config import Config
from difftrain.errors import UserError
from difftrain.hf import DataCollatorForDiffusion, patch, unpatch
from hf_models import V, tiny_of
from processes import run_in_processes

MASK_ID = V - 1
NEEDED = ("transformers", "accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages


@pytest.fixture(autouse=True)
def _needs(request, monkeypatch):
    if not request.node.name.startswith("test_without_it"):
        for name in NEEDED:
            pytest.importorskip(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Rows(torch.utils.data.Dataset):
    """Sixteen examples of very different lengths."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"input_ids": torch.randint(0, MASK_ID, (2 + 5 * (i % 4),), generator=generator), "index": i}


def trainer_of(folder, *, config=None, model=None, collator=None, curriculum="config", **options):
    from transformers import TrainingArguments

    from difftrain.hf import DiffusionLossTrainer

    config = config or Config(masking_warmup_iters=4)
    arguments = {
        "max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 0.5, "optim": "sgd", "use_cpu": True,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "max_grad_norm": 0.0,
    }  # fmt: skip
    trainer_options = {n: options.pop(n) for n in ("compute_metrics", "compute_loss_func") if n in options}
    return DiffusionLossTrainer(
        patch(tiny_of("Qwen2ForCausalLM"), MASK_ID) if model is None else model,
        TrainingArguments(str(folder), **arguments | options),
        train_dataset=Rows(), eval_dataset=Rows(),
        data_collator=collator or DataCollatorForDiffusion(MASK_ID, V, config=config, index="index"),
        curriculum=config if curriculum == "config" else curriculum, **trainer_options,
    )  # fmt: skip


def trained(folder, **options):
    trainer = trainer_of(folder, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [float(loss) for loss in losses], {
        n: p.detach().clone() for n, p in trainer.model.named_parameters()
    }


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)  # logs are rounded
    for name, parameter in wanted[1].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=2e-6)


@pytest.mark.parametrize("recipe", ["specification", "llada"])
def test_four_micro_batches_of_uneven_length_train_as_one_batch(recipe, tmp_path):
    config = Config(recipe=recipe)
    whole = trained(tmp_path, config=config)
    assert_same(
        trained(tmp_path, config=config, per_device_train_batch_size=4, gradient_accumulation_steps=4),
        whole,
    )
    untrained = dict(tiny_of("Qwen2ForCausalLM").named_parameters())
    assert any((p - untrained[n]).abs().max() > 1e-3 for n, p in whole[1].items())


def two_processes(rank, folder):
    import warnings

    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }  # which accelerate asks for, and does not use
    return trained(folder, per_device_train_batch_size=2, gradient_accumulation_steps=4)


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    whole = trained(tmp_path)
    for found in run_in_processes(2, partial(two_processes, folder=tmp_path), tmp_path):
        assert_same(found, whole)


def test_divisors_that_batches_bring_are_added_up(tmp_path):
    class Counting(DataCollatorForDiffusion):
        def __call__(self, examples):
            return super().__call__(examples) | {"normalizer": torch.tensor(float(len(examples)))}

    def run(**options):
        return trained(
            tmp_path, collator=Counting(MASK_ID, V, index="index"), learning_rate=0.01, **options
        )

    assert_same(run(per_device_train_batch_size=4, gradient_accumulation_steps=4), run())
    model = patch(tiny_of("Qwen2ForCausalLM"), MASK_ID, normalizer=16.0)
    assert_same(trained(tmp_path, model=model, learning_rate=0.01), run())


def test_penalties_follow_the_step_and_evaluation_has_the_final_ones(tmp_path, monkeypatch):
    from difftrain.hf import patching

    seen, plain = [], patching.fused_linear_diffusion_loss

    def watched(*args, **options):
        seen.append((options["pk"], options["pm"]))
        return plain(*args, **options)

    monkeypatch.setattr(patching, "fused_linear_diffusion_loss", watched)
    trainer_of(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=4).train()
    half = [(1 - 0.75 * r / 4, 0.5 * r / 4) for r in (0, 1, 2, 3)]
    final = (0.25, 0.5)
    assert seen == [*half, *[final] * 6]  # two batches in the evaluations after steps 4 and 6


def test_a_function_of_the_step_gives_options(tmp_path):
    steps = []

    def curriculum(step):
        steps.append(step)
        return {"pk": 0.5, "pm": 0.25, "label_smoothing": 0.1}

    found = trained(tmp_path, curriculum=curriculum, max_steps=2)
    assert steps == [0, 1]
    model = patch(tiny_of("Qwen2ForCausalLM"), MASK_ID, pk=0.5, pm=0.25, label_smoothing=0.1)
    assert_same(found, trained(tmp_path, model=model, curriculum=None, max_steps=2))


def test_without_a_curriculum_it_is_that_of_the_collators_configuration(tmp_path):
    options = {"max_steps": 3, "config": Config(masking_warmup_iters=4, z_loss=0.1)}
    assert_same(trained(tmp_path, curriculum=None, **options), trained(tmp_path, **options))


def test_terms_of_the_configuration_reach_the_loss(tmp_path):
    plain = trained(tmp_path)
    assert trained(tmp_path, config=Config(masking_warmup_iters=4, z_loss=1.0))[0] != plain[0]


def test_autocast_and_checkpointed_layers_train_alike(tmp_path):
    options = {"max_steps": 3, "learning_rate": 0.1}
    plain, narrow = trained(tmp_path, **options), trained(tmp_path, bf16=True, **options)
    assert narrow[0] == pytest.approx(plain[0], rel=2e-2)
    assert narrow[0] != plain[0]
    model = patch(tiny_of("Qwen2ForCausalLM"), MASK_ID)
    model.gradient_checkpointing_enable()
    assert_same(trained(tmp_path, model=model, **options), plain)


def test_a_batch_that_lacks_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="batches must have labels"):
        trainer_of(tmp_path, collator=lambda rows: {"input_ids": rows[0]["input_ids"][None]}).train()


def test_each_epoch_is_corrupted_otherwise_and_an_evaluation_is_not(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3, learning_rate=0.0, curriculum=lambda step: {})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == 3
    evaluations = {trainer.evaluate()["eval_loss"] for _ in range(2)}
    assert len(evaluations) == 1
    assert not evaluations & set(losses)


def test_a_resumed_run_goes_on_in_its_epoch_and_its_curriculum(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 8}
    whole = trained(tmp_path, **options)
    trainer = trainer_of(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert_same((losses, dict(trainer.model.named_parameters())), whole)


def test_the_plain_trainer_trains_and_evaluates_a_patched_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = patch(tiny_of("Qwen2ForCausalLM"), MASK_ID, pk=0.25, pm=0.5)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(),
        data_collator=DataCollatorForDiffusion(MASK_ID, V),
    )  # fmt: skip
    trainer.train()
    assert 3.0 < trainer.evaluate()["eval_loss"] < 12.0
    assert "input_ids" in trainer._signature_columns if trainer._signature_columns else True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute_metrics": lambda p: {}}, "compute_metrics must not be given"),
        ({"compute_loss_func": lambda *a: None}, "compute_loss_func must not be given"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must not be given"),
        ({"curriculum": Config(mode="gpt2")}, "mode must be diffusion"),
        ({"curriculum": 0.5}, "curriculum must be a Config or a function of the step, got float"),
    ],
)
def test_what_cannot_hold_is_refused_in_one_line(options, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        trainer_of(tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("collator", "said"),
    [
        ({"mask_id": 5}, f"mask_id of the collator must be the patch's, {MASK_ID}, got 5"),
        ({"ignore_index": -1}, "ignore_index of the collator must be the patch's, -100, got -1"),
        (
            {"config": Config(recipe="llada")},
            "recipe of the collator must be the curriculum's, specification, got llada",
        ),
    ],
)
def test_a_collator_that_corrupts_for_another_loss_is_refused(collator, said, tmp_path):
    collate = DataCollatorForDiffusion(**{"mask_id": MASK_ID, "vocab_size": V, "index": "index"} | collator)
    with pytest.raises(UserError, match=said):
        trainer_of(tmp_path, collator=collate)


class Corrupted(torch.utils.data.Dataset):
    """Examples with labels of their own and the weights of their tokens."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = Rows()[4 * (i % 4) + 3]["input_ids"]
        return {"input_ids": ids, "labels": ids, "token_weights": torch.full(ids.shape, float(i))}


@pytest.mark.parametrize("is_plain", [True, False], ids=["plain Trainer", "ours"])
def test_weights_in_the_examples_reach_the_loss_through_any_collator(is_plain, tmp_path, monkeypatch):
    from transformers import Trainer, default_data_collator

    from difftrain.hf import patching

    seen, loss = [], patching.fused_linear_diffusion_loss

    def watched(*args, **options):
        seen.append(options["token_weights"])
        return loss(*args, **options)

    monkeypatch.setattr(patching, "fused_linear_diffusion_loss", watched)
    trainer = trainer_of(tmp_path, curriculum=None)
    kind = Trainer if is_plain else type(trainer)
    trainer.args.remove_unused_columns = True
    kind(
        trainer.model, trainer.args, train_dataset=Corrupted(), data_collator=default_data_collator
    ).train()
    assert sorted(seen[0][:, 0].tolist()) == list(range(16))


def test_a_test_set_is_corrupted_as_in_an_evaluation(tmp_path):
    trainer = trainer_of(tmp_path)
    wanted = trainer.evaluate()["eval_loss"]
    trainer.data_collator.set_epoch(3)
    assert trainer.predict(Rows()).metrics["test_loss"] == wanted


def test_an_evaluation_without_labels_is_refused_and_with_them_has_a_loss(tmp_path):
    trainer = trainer_of(tmp_path, collator=lambda rows: {"input_ids": rows[0]["input_ids"][None]})
    with pytest.raises(UserError, match="batches must have labels"):
        trainer.evaluate()
    assert "eval_loss" in trainer_of(tmp_path, label_names=["target"]).evaluate()


def test_a_model_that_is_no_longer_patched_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    unpatch(trainer.model)
    with pytest.raises(UserError, match="must stay patched while it trains"):
        trainer.train()


@pytest.mark.parametrize("name", ["shift", "normalizer"])
def test_a_curriculum_does_not_set_the_divisor(name, tmp_path):
    with pytest.raises(UserError, match=f"{name} must be an option of patch or in batches"):
        trainer_of(tmp_path, curriculum=lambda step: {name: 1}).train()


def test_a_model_that_is_not_patched_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"model must be patched first: difftrain.hf.patch\(model, mask_id\)"
    ):
        trainer_of(tmp_path, model=tiny_of("Qwen2ForCausalLM"))


def test_without_its_packages_the_trainer_is_one_line_and_the_rest_is_there():
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import difftrain.hf
assert "torch" not in sys.modules
for missing in {NEEDED!r}:
    sys.modules.update(dict.fromkeys({NEEDED!r}, type(sys)("there")) | {{missing: None}})
    try:
        difftrain.hf.DiffusionLossTrainer
    except ValueError as error:
        print(error)
sys.modules.update(dict.fromkeys({NEEDED!r}))
difftrain.hf.patch, difftrain.hf.DataCollatorForDiffusion
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [f"{name} is not installed: pip install 'difftrain[hf]'" for name in NEEDED]
    assert done.stdout.splitlines() == lines, done.stderr


def test_without_it_an_unknown_name_is_named():
    import difftrain.hf

    with pytest.raises(AttributeError, match="no_such_name"):
        difftrain.hf.no_such_name  # noqa: B018
