import importlib.util
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import difftrain
from corpora import nanogpt_folder
from difftrain.data import prepare
from difftrain.data.vocabulary import Characters, Tokenizer
from difftrain.errors import UserError
from difftrain.exchange.hf_tokenizer import tokenizer_files
from difftrain.exchange.to_hf import export_hf
from difftrain.training.loop import train
from launch import SUPPORT, obey, run

TEXT = "Ein T\N{LATIN SMALL LETTER A WITH DIAERESIS}g, \N{MATHEMATICAL FRAKTUR CAPITAL U}\tund  mehr\n\n   x\u00a0 e\u0301.\n"
NEED_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
# Each kind of model there is: both kinds of positions, with and without biases and what bends the logits.
MODELS = {
    "plain": {},
    "bent": {"softcap": 3.0, "recipe": "mdlm", "forbid_mask": True, "position": "rotary", "bias": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two short runs, and each one's export, named OUT beside it."""
    from difftrain.config import Config

    home = tmp_path_factory.mktemp("hf")
    (home / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    data = prepare(str(home / "text.txt"), out=home / "tokens")
    for name, options in MODELS.items():
        train(
            Config(
                out_dir=str(home / f"run-{name}"), data=str(data), device="cpu", dtype="float32", block_size=12,
                batch_size=4, n_layer=2, n_head=2, n_embd=16, max_iters=4, eval_interval=2, eval_iters=2,
                learning_rate=0.05, warmup_iters=0, **options,
            )
        )  # fmt: skip
        export_hf(home / f"run-{name}", home / name)
    return home


def ids_of(loaded):
    size = loaded.tokenizer.vocab_size
    return torch.arange(24, dtype=torch.int64).mul(7).remainder(size).view(2, 12)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_folder_is_taken_back_with_the_same_bits(runs, name):
    ours, again = (
        difftrain.load(runs / f"run-{name}", device="cpu"),
        difftrain.load(runs / name, device="cpu"),
    )
    ids = ids_of(ours)
    assert torch.equal(again.logits(ids), ours.logits(ids))
    assert (again.step, again.config, again.tokenizer) == (ours.step, ours.config, ours.tokenizer)
    assert again.sample(length=8, steps=2) == ours.sample(length=8, steps=2)


def test_evaluate_and_sample_take_an_exported_folder(runs):
    records = []
    for folder in ("run-plain", "plain"):
        code, out, err = obey(["evaluate", runs / folder, "--device", "cpu", "--json", "--windows", "4"])
        assert code == 0, err
        records.append(json.loads(out) | {"run": ""})
    assert records[0] == records[1]
    code, out, err = obey(["sample", runs / "plain", "--device", "cpu", "--length", "8", "--steps", "2"])
    assert code == 0, err


def test_the_card_says_what_the_run_has_measured_and_nothing_else(runs):
    text = (runs / "plain" / "README.md").read_text()
    records = [json.loads(line) for line in (runs / "run-plain" / "metrics.jsonl").read_text().splitlines()]
    step = difftrain.load(runs / "plain", device="cpu").step
    (record,) = (r for r in records if r["kind"] == "eval" and r["step"] == step)
    assert f"| loss at the final penalties | {record['loss_final']:.4f} |" in text
    assert f"| nll of masked words, 50 % masked | {record['masked_nll']['50']:.4f} |" in text
    assert f"| optimiser steps | {step} |" in text
    assert str(runs) not in text


def test_a_run_without_metrics_gets_a_card_without_figures(runs, tmp_path):
    shutil.copytree(runs / "run-plain", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    export_hf(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "no evaluation of this step written down" in text
    assert "nll" not in text


def test_the_folder_is_readable_by_all_and_names_no_module_of_ours(runs, tmp_path):
    export_hf(runs / "run-plain", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "config.json", "difftrain_model.py", "difftrain_rotary.py", "model.safetensors",
        "modeling_difftrain.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(), path
        if path.suffix == ".py":
            assert "from difftrain" not in path.read_text()
            compile(path.read_text(), path.name, "exec")


def _umask():
    before = os.umask(0)
    os.umask(before)
    return before


def test_a_causal_run_is_refused_in_one_line(tiny, tmp_path):
    train(tiny(mode="gpt2", max_iters=1))
    code, _, err = obey(["export", "hf", tmp_path / "run", "--out", tmp_path / "out"])
    assert (code, err.count("\n")) == (2, 1)
    assert "mode gpt2" in err
    assert not (tmp_path / "out").exists()


def test_words_that_are_numbers_export_without_a_tokenizer(tiny, tmp_path):
    data = nanogpt_folder(tmp_path / "numbers", train=[0, 1, 2, 3] * 40, val=[3, 2, 1, 0] * 20)
    train(tiny(data=str(data), max_iters=1))
    code, out, err = obey(["export", "hf", tmp_path / "run", "--out", tmp_path / "out"])
    assert code == 0, err
    assert "must be given as ids" in out
    assert not list((tmp_path / "out").glob("tokenizer*"))


def damage_cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def damage_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.norm.weight"] = torch.ones(5, dtype=torch.float32)
    save_file(weights, folder / "model.safetensors")


def damage_name(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.lora"] = weights.pop("transformer.norm.weight")
    save_file(weights, folder / "model.safetensors")


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_foreign(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def damage_options(folder):
    content = json.loads((folder / "config.json").read_text())
    content["difftrain"]["config"]["n_layer"] = 0
    (folder / "config.json").write_text(json.dumps(content))


def damage_gone(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_cut, "does not fit this model"),
        (damage_shape, "does not fit this model"),
        (damage_name, "does not fit this model"),
        (damage_config, "holds no JSON"),
        (damage_foreign, "not that of a model that difftrain exported"),
        (damage_options, "n_layer"),
        (damage_gone, "is missing"),
    ],
)
def test_a_damaged_folder_is_one_line(runs, tmp_path, damage, words):
    shutil.copytree(runs / "plain", tmp_path / "folder")
    damage(tmp_path / "folder")
    code, _, err = obey(["evaluate", tmp_path / "folder", "--device", "cpu"])
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err


def test_half_a_character_is_refused():
    with pytest.raises(UserError, match="half of a character"):
        tokenizer_files(Characters(("a", "\ud800")), 8)


def a_tokenizer():
    """The definition of a small byte-level tokenizer with a [MASK] of its own and words put around a text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=made.pre_tokenizer.alphabet(), special_tokens=["[MASK]", "<s>"]
    )
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made.to_str()


@NEED_TRANSFORMERS
def test_transformers_computes_our_bits_and_reads_our_words(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # where it copies the code to
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer.json").write_text(a_tokenizer(), encoding="utf-8")
    from difftrain.config import Config

    folders = {runs / name: runs / f"run-{name}" for name in MODELS}
    for words, tokenizer in {"words": str(tmp_path / "tokenizer.json"), "bytes": "bytes"}.items():
        data, trained = tmp_path / words, tmp_path / f"run-{words}"
        prepare(str(runs / "text.txt"), out=data, tokenizer=tokenizer)
        train(
            Config(
                out_dir=str(trained), data=str(data), device="cpu", block_size=8, batch_size=2,
                n_layer=1, n_head=1, n_embd=8, max_iters=1, eval_iters=2,
            )
        )  # fmt: skip
        export_hf(trained, tmp_path / f"{words}-out")
        folders[tmp_path / f"{words}-out"] = trained
    for folder, source in folders.items():
        ours = difftrain.load(source, device="cpu")
        ids = ids_of(ours)[:, : ours.config.block_size].tolist()
        asked = {"ids": ids, "texts": ["x", TEXT, " \n\n ", ""], "gap": "und _ehr"}
        folder.with_name(f"{folder.name}.json").write_text(json.dumps(asked))
    code, out, err = run(SUPPORT / "hf_folder.py", *folders)
    assert code == 0, err
    answers = json.loads(out.splitlines()[-1])
    for folder, source in folders.items():
        ours, answer = difftrain.load(source, device="cpu"), answers[folder.name]
        asked = json.loads(folder.with_name(f"{folder.name}.json").read_text())
        ids = torch.tensor(asked["ids"], dtype=torch.int64)
        logits = load_file(folder.with_name(f"{folder.name}.logits"))["logits"]
        assert torch.equal(logits, ours.logits(ids)), folder
        assert (answer["is_training"], answer["dtype"]) == (False, "torch.float32")
        assert "no padding" in answer["padding"]
        words = ids != ours.tokenizer.mask_id
        expected = torch.nn.functional.cross_entropy(logits[words], ids[words])
        assert answer["loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert answer["ids"] == [ours.tokenizer.encode(text) for text in asked["texts"]]
        assert answer["texts"] == asked["texts"]
        mask_id = ours.tokenizer.mask_id
        name = "[DIFFTRAIN_MASK]" if isinstance(ours.tokenizer, Tokenizer) else "[MASK]"
        assert answer["mask"] == [name, mask_id, mask_id + 1]
        gap = torch.tensor([answer["gap"]], dtype=torch.int64)
        assert gap.eq(mask_id).sum() == 1
        best = ours.logits(gap)[0, gap[0] == mask_id].softmax(-1).topk(2)
        assert [token for token, _ in answer["filled"]] == best.indices[0].tolist()
        assert [score for _, score in answer["filled"]] == pytest.approx(best.values[0].tolist(), rel=1e-6)
        if isinstance(ours.tokenizer, Characters):
            assert "UNK" in answer["unknown"]  # an error: no word stands for what is unknown
        again = difftrain.load(folder.with_name(f"{folder.name}-again"), device="cpu")  # save_pretrained's
        assert torch.equal(again.logits(ids), logits)
