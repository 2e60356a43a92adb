import json
import pickle
from pathlib import Path

import pytest
import torch

import nanogpt
from corpora import nanogpt_folder
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.cli import main
from difftrain.data.vocabulary import Characters, Ids
from difftrain.exchange.from_nanogpt import import_nanogpt
from difftrain.exchange.to_nanogpt import export_nanogpt
from difftrain.loss import bent_logits
from difftrain.training.loop import train
from launch import obey

LETTERS = "abcdefg"
X = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 3, 3, 1, 2], [6, 5, 4, 3, 2, 1, 0, 6, 6, 6, 6, 6]])
CPU = torch.device("cpu")


@pytest.fixture
def save(tmp_path):
    """Save a checkpoint, of a model if none is given; returns its file and the model."""

    def make(content=None, prefix="", more=None, **changes):
        model, args = nanogpt.gpt(**changes)
        file = tmp_path / "ckpt.pt"
        torch.save(content or nanogpt.checkpoint_of(model, args, prefix, **(more or {})), file)
        return file, model

    return make


@pytest.fixture
def meta(tmp_path):
    """nanoGPT's meta.pkl of seven letters, beside token files."""
    folder = nanogpt_folder(tmp_path / "letters", train=[0, 1, 2, 3, 4, 5, 6] * 20, val=[3, 2, 1] * 20)
    words = {
        "vocab_size": 7,
        "itos": dict(enumerate(LETTERS)),
        "stoi": {c: i for i, c in enumerate(LETTERS)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(words))
    return folder / "meta.pkl"


def logits_of(run, x=X, which="best"):
    with torch.no_grad():
        return find_checkpoint(run, which).make_model(CPU)(x)


def theirs(model, x=X):
    with torch.no_grad():
        return model(x)


def refusal(*words):
    """The one line of a command that is refused."""
    code, _, err = obey(words)
    assert code == 2, err
    assert err.count("\n") == 1
    return err


# In ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_an_imported_gpt2_model_gives_the_logits_of_nanogpts_own(save, tmp_path, bias, prefix):
    file, model = save(bias=bias, prefix=prefix)
    import_nanogpt(file, tmp_path / "run")
    found = logits_of(tmp_path / "run")
    assert found.shape == (2, 12, 8)
    torch.testing.assert_close(found[..., :7], theirs(model), rtol=0, atol=1e-5)


def test_mask_is_the_mean_of_the_words_and_never_an_answer_in_gpt2_mode(save, tmp_path):
    file, model = save()
    import_nanogpt(file, tmp_path / "run")
    checkpoint = find_checkpoint(tmp_path / "run", "best")
    ours = checkpoint.make_model(CPU)
    assert (checkpoint.config.mode, checkpoint.vocabulary) == ("gpt2", Ids(7))
    table = model.transformer["wte"].weight
    torch.testing.assert_close(ours.embedding.weight[7], table.mean(0), rtol=0, atol=1e-6)
    with torch.no_grad():
        bent = bent_logits(ours, 7, checkpoint.config)(X)
    torch.testing.assert_close(bent.logsumexp(-1), theirs(model).logsumexp(-1), rtol=0, atol=1e-5)


def test_a_gpt2_model_can_be_taken_without_its_causal_mask(save, tmp_path):
    file, model = save()
    notes = import_nanogpt(file, tmp_path / "run", mode="diffusion")
    assert any("causal mask is dropped" in note for note in notes)
    for block in model.transformer["h"]:
        block.attn.is_causal = False
    torch.testing.assert_close(logits_of(tmp_path / "run")[..., :7], theirs(model), rtol=0, atol=1e-5)
    assert find_checkpoint(tmp_path / "run", "best").config.forbid_mask is False


def test_the_specifications_model_keeps_its_mask_and_its_penalties(save, tmp_path):
    kind = {"model_type": "diffusion", "mask_token_id": 6}
    options = {"penalty_keep_mask": 0.125, "masking_warmup_iters": 77}
    file, model = save(**kind, more={"config": options})
    import_nanogpt(file, tmp_path / "run")
    checkpoint = find_checkpoint(tmp_path / "run", "best")
    assert (checkpoint.vocabulary.mask_id, checkpoint.vocabulary.vocab_size) == (6, 7)
    assert (checkpoint.config.mode, checkpoint.config.penalty_keep_mask) == ("diffusion", 0.125)
    assert checkpoint.config.masking_warmup_iters == 77
    torch.testing.assert_close(logits_of(tmp_path / "run"), theirs(model), rtol=0, atol=1e-5)


def test_padding_beyond_the_words_is_left_out_and_told(save, tmp_path, meta):
    file, model = save(vocab_size=16)
    notes = import_nanogpt(file, tmp_path / "run", meta=meta)
    assert any("9 rows beyond the 7 words" in note for note in notes)
    torch.testing.assert_close(
        logits_of(tmp_path / "run")[..., :7], theirs(model)[..., :7], rtol=0, atol=1e-5
    )
    kind = {"model_type": "diffusion", "mask_token_id": 7}
    file, model = save(vocab_size=16, **kind)
    assert "give --meta" in refusal("import", "nanogpt", file, "--out", tmp_path / "other")
    import_nanogpt(file, tmp_path / "other", meta=meta)
    torch.testing.assert_close(logits_of(tmp_path / "other"), theirs(model)[..., :8], rtol=0, atol=1e-5)


def test_rows_for_gpt2s_words_are_gpt2s_words(save, tmp_path):
    file, _ = save(vocab_size=50304, n_layer=1, n_embd=2, n_head=1)
    import_nanogpt(file, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run", "best").vocabulary == Ids(50257)


def test_an_old_checkpoints_causal_masks_and_half_weights_are_taken(save, tmp_path):
    model, args = nanogpt.gpt()
    content = nanogpt.checkpoint_of(model.bfloat16(), args)
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    file, _ = save(content)
    import_nanogpt(file, tmp_path / "run")
    torch.testing.assert_close(
        logits_of(tmp_path / "run")[..., :7], theirs(model.float()), rtol=0, atol=1e-5
    )


def test_an_imported_run_is_sampled_evaluated_and_trained_on(save, tmp_path, meta, capsys):
    file, _ = save()
    run = tmp_path / "run"
    assert main(["import", "nanogpt", str(file), "--meta", str(meta), "--out", str(run)]) == 0
    assert "note: [MASK] is added as id 7" in capsys.readouterr().out
    assert find_checkpoint(run, "latest").vocabulary == Characters(tuple(LETTERS))
    assert main(["sample", str(run), "--prompt", "abc", "--length", "9", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    words = ["--windows", "2", "--draws", "1", "--device", "cpu"]
    assert main(["evaluate", str(run), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"].startswith(str(meta.parent))
    small = ["--batch_size=2", "--eval_iters=2", "--eval_batch_size=2", "--device=cpu"]
    before = find_checkpoint(run, "latest").make_model(CPU).embedding.weight.clone()
    assert main(["train", "--resume", "--out_dir", str(run), "--max_iters", "2", *small]) == 0
    assert "steps 0 to 2" in capsys.readouterr().out
    trained = find_checkpoint(run, "latest")
    assert trained.step == 2
    assert not torch.equal(trained.make_model(CPU).embedding.weight, before)


def test_what_a_run_was_imported_from_stands_in_its_checkpoint(save, tmp_path):
    file, _ = save()
    import_nanogpt(file, tmp_path / "run")
    imported = find_checkpoint(tmp_path / "run", "best").state["imported"]
    assert imported.pop("sha256")
    assert imported == {"from": "nanogpt", "file": "ckpt.pt", "iter_num": 40, "best_val_loss": 1.5}


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/executed-by-a-checkpoint"),))


def broken(content, **changes):
    return content | {"model_args": content["model_args"] | changes}


def without(content, name):
    return content | {"model": {n: t for n, t in content["model"].items() if n != name}}


def put(content, name, tensor):
    return content | {"model": content["model"] | {name: tensor}}


REFUSED = {
    "a class": (lambda c: c | {"more": Hostile()}, "it names", "plain data only"),
    "no model": (lambda c: {"weights": c["model"]}, "must hold model and model_args"),
    "a list": (lambda c: [1, 2], "must hold model and model_args"),
    "no size": (lambda c: broken(c, n_head=None), "model_args must give n_head"),
    "a foreign option": (lambda c: broken(c, rope_theta=1e4), "its model has rope_theta"),
    "a size that is no text": (lambda c: broken(c, dropout="much"), "dropout must be float"),
    "heads that do not divide": (lambda c: broken(c, n_head=3), "n_embd must be a multiple of n_head 3"),
    "fewer blocks": (lambda c: broken(c, n_layer=3), "n_layer is 3, and it has 2 blocks"),
    "another width": (lambda c: broken(c, n_embd=32), "must have shape", "got"),
    "another length": (lambda c: broken(c, block_size=13), "transformer.wpe.weight must have shape (13, 16)"),
    "other words": (lambda c: broken(c, vocab_size=8), "transformer.wte.weight must have shape (8, 16)"),
    "biases that are told away": (lambda c: broken(c, bias=False), "it has transformer.h.0.attn.c_attn.bias"),
    "a missing norm": (lambda c: without(c, "transformer.ln_f.weight"), "it lacks transformer.ln_f.weight"),
    "no positions": (lambda c: without(c, "transformer.wpe.weight"), "it lacks transformer.wpe.weight"),
    "a gate": (
        lambda c: put(c, "transformer.h.0.mlp.c_gate.weight", torch.ones(2)),
        "it has transformer.h.0.mlp.c_gate.weight",
    ),
    "an untied head": (lambda c: put(c, "lm_head.weight", torch.ones(7, 16)), "its head must be its embedding"),
    "a weight twice": (
        lambda c: put(c, "_orig_mod.transformer.ln_f.weight", torch.ones(16)),
        "twice, with and without the prefix",
    ),
    "integers": (lambda c: put(c, "transformer.ln_f.weight", torch.ones(16).long()), "no plain tensor"),
    "fp64": (lambda c: put(c, "transformer.ln_f.weight", torch.ones(16).double()), "no plain tensor"),
    "NaN": (lambda c: put(c, "transformer.ln_f.weight", torch.full((16,), torch.nan)), "finite"),
    "a text for a weight": (lambda c: put(c, "transformer.ln_f.weight", "ones"), "no plain tensor"),
    "a mask without an id": (lambda c: broken(c, model_type="diffusion"), "mask_token_id must be an id"),
    "a mask beyond": (lambda c: broken(c, mask_token_id=7), "mask_token_id must be an id below vocab_size"),
    "another kind": (lambda c: broken(c, model_type="bert"), "model_type must be gpt2 or diffusion"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_would_not_compute_is_refused_in_one_line_that_says_why(save, tmp_path, case):
    harm, *reasons = REFUSED[case]
    file, _ = save(harm(nanogpt.checkpoint_of(*nanogpt.gpt())))
    line = refusal("import", "nanogpt", file, "--out", tmp_path / "run")
    assert all(reason in line for reason in reasons), line
    assert "ckpt.pt" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]
    assert not Path("/tmp/executed-by-a-checkpoint").exists()


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_refused(save, tmp_path, size):
    file, _ = save()
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * size) if isinstance(size, float) else size])
    assert "no whole PyTorch file" in refusal("import", "nanogpt", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_meta_that_is_no_plain_data_or_of_other_words_is_refused(save, tmp_path, meta):
    file, _ = save(vocab_size=6)
    words = ["import", "nanogpt", file, "--out", tmp_path / "run", "--meta", meta]
    assert "has 6 rows, but" in refusal(*words)
    file, _ = save(mask_token_id=6)
    assert "must be the number of words" in refusal(*words)
    file, _ = save()
    meta.write_bytes(pickle.dumps({"vocab_size": 9, "itos": dict(enumerate(LETTERS))}))
    assert "says vocab_size 9 and lists 7 words" in refusal(*words)
    meta.write_bytes(pickle.dumps({"vocab_size": Hostile()}))
    assert "must hold plain data only" in refusal(*words)
    assert "No such file" in refusal("import", "nanogpt", tmp_path / "none", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_and_a_causal_reading_of_a_diffusion_model_are_refused(save, tmp_path):
    file, _ = save(mask_token_id=6)
    (tmp_path / "run").mkdir()
    assert "exists already" in refusal("import", "nanogpt", file, "--out", tmp_path / "run")
    words = ["--out", tmp_path / "other", "--mode", "gpt2"]
    assert "trained without a causal mask" in refusal("import", "nanogpt", file, *words)


# Out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind", [{}, {"model_type": "diffusion", "mask_token_id": 6}], ids=["gpt2", "diffusion"]
)
def test_an_export_loads_in_nanogpt_with_the_logits_of_the_first(save, tmp_path, bias, kind):
    file, model = save(bias=bias, **kind)
    import_nanogpt(file, tmp_path / "run")
    export_nanogpt(tmp_path / "run", tmp_path / "out.pt")
    again, content = nanogpt.load(tmp_path / "out.pt")
    assert content["model_args"] == nanogpt.SIZES | {"bias": bias, "dropout": 0.0} | kind
    assert torch.equal(theirs(again), theirs(model))
    import_nanogpt(tmp_path / "out.pt", tmp_path / "again")
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(tmp_path / "run"))


@pytest.mark.parametrize("mode", ["gpt2", "diffusion"])
def test_the_optimisers_state_goes_along(tiny, tmp_path, mode):
    config = tiny(mode=mode, position="learned", bias=True, max_iters=3)
    train(config)
    run = tmp_path / "run"
    export_nanogpt(run, tmp_path / "out.pt", which="latest")
    model, content = nanogpt.load(tmp_path / "out.pt")
    checkpoint = find_checkpoint(run, "latest")
    n = len(content["model"]["lm_head.weight"])
    assert n == checkpoint.vocabulary.n_words + (mode == "diffusion")
    x = torch.arange(16)[None] % n
    torch.testing.assert_close(theirs(model, x), logits_of(run, x, "latest")[..., :n], rtol=0, atol=1e-5)
    optimizer = nanogpt.optimizer_of(model)
    optimizer.load_state_dict(content["optimizer"])
    ours = {
        f"{name}.exp_avg": torch.zeros_like(p) for name, p in checkpoint.make_model(CPU).named_parameters()
    }
    every = {
        key.replace("exp_avg", kind): t.clone()
        for key, t in ours.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    every |= {key.replace("exp_avg", "step"): torch.zeros(()) for key in ours}
    checkpoint.read_optimizer(every)
    for theirs_name, name in (
        ("transformer.wte.weight", "embedding.weight"),
        ("transformer.h.0.mlp.c_fc.bias", "blocks.0.mlp.up.bias"),
        ("transformer.ln_f.weight", "norm.weight"),
    ):
        state = optimizer.state[dict(model.named_parameters())[theirs_name]]
        moment = every[f"{name}.exp_avg"]
        assert torch.equal(state["exp_avg"], moment[: len(state["exp_avg"])])
        assert state["exp_avg"].any()
    assert content["iter_num"] == 3
    model(x).sum().backward()
    optimizer.step()


def test_what_nanogpt_cannot_compute_is_not_exported(tiny, tmp_path):
    train(tiny(max_iters=1))
    words = ["export", "nanogpt", tmp_path / "run", "--out", tmp_path / "out.pt"]
    assert "rotary positions" in refusal(*words)
    assert "is not a run folder" in refusal("export", "nanogpt", tmp_path, "--out", tmp_path / "out.pt")
    train(tiny(max_iters=1, position="learned", softcap=5.0), overwrite=True)
    assert "softcap 5" in refusal(*words)
    train(tiny(max_iters=1, position="learned", mode="gpt2"), overwrite=True)
    code, out, _ = obey(words)
    assert code == 0
    assert "probabilities are among words alone" in out
    before = (tmp_path / "out.pt").read_bytes()
    assert "exists already" in refusal(*words)
    assert (tmp_path / "out.pt").read_bytes() == before
