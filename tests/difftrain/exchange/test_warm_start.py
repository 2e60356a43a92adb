import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanogpt
from corpora import nanogpt_folder
from difftrain.checkpoints.reading import find_checkpoint
from difftrain.data.vocabulary import Characters, Ids
from difftrain.errors import UserError
from difftrain.exchange.to_hf import export_hf
from difftrain.exchange.warm_start import warm_start
from difftrain.model import Transformer
from difftrain.reporting.log import read_metrics
from difftrain.training.annealing import visible
from difftrain.training.loop import train
from launch import obey, train_command

CPU = torch.device("cpu")
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "bias": True, "position": "learned"}
SIZES = {key: SHAPE[key] for key in ("n_layer", "n_head", "n_embd")}
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
X = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 3, 3, 1, 2], [6, 5, 4, 3, 2, 1, 0, 6, 6, 6, 6, 6]])


def gpt2_folder(folder, prefix="transformer.", options=(), **changes):
    """A GPT-2 folder as transformers writes it, and nanoGPT's model with the same weights."""
    model, _ = nanogpt.gpt(**changes)
    weights = {
        name.replace("transformer.", prefix): (t.t() if name.endswith(TURNED) else t).contiguous()
        for name, t in model.state_dict().items()
        if name != "lm_head.weight"
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "gpt2", "activation_function": "gelu", **SIZES, **dict(options)}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def begun(tiny):
    """A model that began from a source, the model as it was before, and the lines about it."""

    def begin(source, vocabulary=None, **changes):
        config = tiny(init_from=str(source), **(SHAPE | changes))
        vocabulary = vocabulary or Ids(7)
        model = Transformer(config, vocabulary.vocab_size)
        before = {name: p.clone() for name, p in model.named_parameters()}
        return model, before, " | ".join(warm_start(model, config, vocabulary))

    return begin


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_gpt2_folder_gives_its_weights_and_its_logits(tmp_path, begun, prefix):
    theirs = gpt2_folder(tmp_path / "gpt2", prefix)
    model, _, notes = begun(tmp_path / "gpt2", mode="gpt2")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X)[..., :7], theirs(X), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.embedding.weight[7], theirs.transformer.wte.weight.double().mean(0).float(), atol=1e-7, rtol=0
    )
    assert "vocabulary 8 here, 7 there: 7 words in common" in notes
    assert "[MASK] begins as the mean" in notes


def test_diffusion_mode_drops_the_causal_mask(tmp_path, begun):
    gpt2_folder(tmp_path / "gpt2")
    model, _, notes = begun(tmp_path / "gpt2")
    assert not model.blocks[0].attention.is_causal
    assert "the causal mask is dropped at once" in notes
    assert "over 30 steps" in begun(tmp_path / "gpt2", causal_anneal_iters=30)[2]


def test_shards_and_causal_buffers_are_read_and_another_gelu_is_named(tmp_path, begun):
    folder = tmp_path / "gpt2"
    theirs = gpt2_folder(folder, options={"activation_function": "gelu_new"})
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.float32).tril()
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: weights[name].clone() for name in names if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model, _, notes = begun(folder)
    assert torch.equal(model.blocks[1].mlp.up.weight, theirs.transformer.h[1].mlp.c_fc.weight)
    assert "its gelu_new is the exact GELU here" in notes


def test_a_nanogpt_checkpoint_gives_its_weights_and_keeps_its_mask(tmp_path, begun):
    theirs, args = nanogpt.gpt(vocab_size=8)
    args |= {"model_type": "diffusion", "mask_token_id": 7}
    torch.save(nanogpt.checkpoint_of(theirs, args), tmp_path / "ckpt.pt")
    model, _, notes = begun(tmp_path / "ckpt.pt")
    assert torch.equal(model.embedding.weight, theirs.transformer.wte.weight)
    assert "mean" not in notes
    assert "causal" not in notes


def test_our_own_runs_checkpoints_and_exports_give_their_weights(tiny, tmp_path, begun):
    train(tiny(max_iters=2))
    found = find_checkpoint(tmp_path / "run", "best")
    export_hf(tmp_path / "run", tmp_path / "hf")
    theirs = dict(found.make_model(CPU).named_parameters())
    shape = {key: getattr(found.config, key) for key in SHAPE}
    for source in (tmp_path / "run", found.folder, tmp_path / "hf"):
        model, _, _ = begun(source, found.vocabulary, **shape)
        assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters()), source


def test_characters_are_matched_by_what_they_are(tiny, tmp_path, begun):
    train(tiny(max_iters=1))
    found = find_checkpoint(tmp_path / "run", "best")
    theirs = found.make_model(CPU).embedding.weight
    words = found.vocabulary.characters
    other = Characters((words[3], "\N{SNOWMAN}", words[0]))
    shape = {key: getattr(found.config, key) for key in SHAPE}
    model, _, notes = begun(tmp_path / "run", other, **shape)
    rows = model.embedding.weight
    assert torch.equal(rows[0], theirs[3])
    assert torch.equal(rows[2], theirs[0])
    torch.testing.assert_close(rows[1], (theirs[0] + theirs[3]) / 2)
    assert torch.equal(rows[3], theirs[found.vocabulary.mask_id])
    assert "2 words in common | 1 words that it does not know" in notes


def test_padded_rows_are_left_out_and_other_words_begin_anew(tmp_path, begun):
    theirs = gpt2_folder(tmp_path / "gpt2", vocab_size=64)
    model, _, notes = begun(tmp_path / "gpt2", Ids(60))
    assert torch.equal(model.embedding.weight[:60], theirs.transformer.wte.weight[:60])
    assert "61 here, 64 there: 60 words in common" in notes
    for words in (Ids(65), Characters(tuple("abcdefg"))):
        model, before, notes = begun(tmp_path / "gpt2", words)
        assert torch.equal(model.embedding.weight, before["embedding.weight"])
        assert torch.equal(model.norm.weight, theirs.transformer.ln_f.weight)
        assert "the embeddings begin anew" in notes


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (8, "8 positions are taken, the others are left out"),
        (20, "12 positions are taken, the others begin anew"),
    ],
)
def test_positions_are_taken_as_far_as_they_go(tmp_path, begun, length, words):
    theirs = gpt2_folder(tmp_path / "gpt2")
    model, before, notes = begun(tmp_path / "gpt2", block_size=length)
    n = min(length, 12)
    assert torch.equal(model.positions.weight[:n], theirs.transformer.wpe.weight[:n])
    assert torch.equal(model.positions.weight[n:], before["positions.weight"][n:])
    assert words in notes


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])


def change(name, tensor):
    def damage(folder):
        weights = load_file(folder / "model.safetensors") | {name: tensor}
        save_file(weights, folder / "model.safetensors")

    return damage


def index_of(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def say(**options):
    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | options))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "is damaged"),
        (change("transformer.ln_f.weight", torch.ones(3)), r"norm.weight must have shape \(16,\), got \(3,\)"),
        (change("transformer.wte.weight", torch.ones(7, 3)), "its embedding has shape"),
        (change("transformer.wpe.weight", torch.ones(12, 3)), "positions.weight has shape"),
        (change("transformer.ln_f.weight", torch.full((16,), torch.nan)), "finite"),
        (change("transformer.adapter.weight", torch.ones(3)), "it has transformer.adapter.weight"),
        (change("lm_head.weight", torch.ones(7, 16)), "its head is not its embedding"),
        (say(n_layer=3), "--n_layer 3"),
        (say(n_layer="2"), "n_layer as a number"),
        (say(activation_function="relu"), "activation_function"),
        (say(model_type="llama"), "type llama"),
        (lambda folder: (folder / "config.json").write_text("{"), "holds no JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
        (index_of({"weight_map": {"a": 1}}), "1 is missing"),
        (index_of({"weight_map": {"a": "../x"}}), "x is missing"),
        (index_of({"weight_map": {"a": ["x"]}}), "is damaged"),
        (index_of([]), "is damaged"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, begun, damage, words):
    gpt2_folder(tmp_path / "gpt2")
    damage(tmp_path / "gpt2")
    with pytest.raises(UserError, match=words):
        begun(tmp_path / "gpt2")


def test_the_options_that_are_missing_are_all_named(tmp_path, begun):
    gpt2_folder(tmp_path / "gpt2")
    with pytest.raises(UserError, match="--n_embd 16 --bias true --position learned$"):
        begun(tmp_path / "gpt2", n_embd=8, bias=False, position="rotary")


def test_nothing_there_is_one_line_and_no_run(tiny, tmp_path):
    code, _, err = obey(train_command(tiny(init_from=str(tmp_path / "nowhere"))))
    assert (code, err.count("\n")) == (2, 1), err
    assert "is not there" in err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_run_begins_with_the_weights_and_its_resume_reads_them_no_more(tiny, tmp_path):
    gpt2_folder(tmp_path / "gpt2")
    data = nanogpt_folder(tmp_path / "numbers", train=[0, 1, 2, 3, 4, 5, 6] * 40, val=[3, 2, 1, 0] * 20)
    options = SHAPE | {"data": str(data), "init_from": str(tmp_path / "gpt2"), "causal_anneal_iters": 5}
    options |= {"max_iters": 6, "eval_interval": 3, "deterministic": True, "keep_checkpoints": 5}
    code, out, err = obey(train_command(tiny(out_dir=str(tmp_path / "whole"), **options)))
    assert code == 0, err
    assert "init_from: the causal mask is dropped over 5 steps" in out
    begun = find_checkpoint(tmp_path / "whole", "0").make_model(CPU)
    assert torch.equal(
        begun.norm.weight, load_file(tmp_path / "gpt2" / "model.safetensors")["transformer.ln_f.weight"]
    )
    half = tiny(out_dir=str(tmp_path / "half"), **(options | {"max_iters": 3, "lr_decay_iters": 6}))
    train(half)
    at_once = tiny(
        out_dir=str(tmp_path / "at once"), **(options | {"max_iters": 3, "causal_anneal_iters": 0})
    )
    train(at_once)
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    now = train(half, resume=True, eval_only=True)  # of a model that nobody has told whom to see
    (then,) = (r for r in read_metrics(tmp_path / "half") if r["kind"] == "eval" and r["step"] == 3)
    assert then["loss"] == now["loss"]
    train(dataclasses.replace(half, max_iters=6), resume=True)
    ends = [
        load_file(find_checkpoint(tmp_path / name, "6").folder / "model.safetensors")
        for name in ("whole", "half")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    thirds = [
        find_checkpoint(tmp_path / name, "3").make_model(CPU).norm.weight for name in ("half", "at once")
    ]
    assert not torch.equal(*thirds)


def test_later_positions_come_into_sight_little_by_little(tiny):
    config = tiny(causal_anneal_iters=10)
    seen = [visible(step, 64, config, CPU) for step in range(11)]
    assert torch.equal(seen[0], torch.ones(64, 64).tril().bool())
    for step in range(10):
        later = seen[step][torch.ones(64, 64).triu(1).bool()].double().mean().item()
        assert later == pytest.approx(step / 10, abs=5 * 0.5 / 2016**0.5)
        assert seen[step].tril().sum() == 64 * 65 // 2
    assert seen[10] is None
    assert torch.equal(seen[5], visible(5, 64, config, CPU))


def test_a_model_that_begins_to_anneal_is_the_causal_one(tiny):
    model = Transformer(tiny(**SHAPE), 8).eval()
    causal = Transformer(tiny(mode="gpt2", **SHAPE), 8).eval()
    causal.load_state_dict(model.state_dict())
    model.visible = visible(0, 12, tiny(causal_anneal_iters=10), CPU)
    with torch.no_grad():
        torch.testing.assert_close(model(X), causal(X), atol=1e-6, rtol=0)
        model.visible = None
        assert not torch.allclose(model(X), causal(X), atol=1e-3)


@pytest.mark.parametrize("changes", [{"mode": "gpt2"}, {"compile": "step"}])
def test_annealing_is_refused_where_it_has_no_place(tiny, changes):
    with pytest.raises(UserError, match="causal_anneal_iters must be 0"):
        tiny(causal_anneal_iters=3, **changes)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_a_gpt2_of_transformers_gives_its_logits(tmp_path, begun):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=7, n_positions=12, activation_function="gelu", **SIZES)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    model, _, _ = begun(tmp_path / "gpt2", mode="gpt2")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X)[..., :7], theirs(X).logits, atol=1e-5, rtol=0)
