import json
from pathlib import Path

import numpy as np
import pytest
import torch

import difftrain
from difftrain.errors import UserError
from difftrain.sampling.policies import POLICIES
from difftrain.training.loop import train
from launch import obey
from ring_model import ring


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_folder):
    from difftrain.config import Config

    config = Config(
        out_dir=str(tmp_path_factory.mktemp("loaded") / "run"), data=str(corpus_folder), device="cpu",
        block_size=16, batch_size=8, n_layer=1, n_head=2, n_embd=16, max_iters=2, eval_interval=1, eval_iters=2,
        eval_batch_size=2, warmup_iters=1, softcap=3.0, keep_checkpoints=3,
    )  # fmt: skip
    train(config)
    return Path(config.out_dir)


def test_a_run_a_checkpoint_by_name_and_its_folder_are_loaded(run, monkeypatch):
    latest = difftrain.load(run, "latest", device="cpu")
    assert (latest.step, latest.config.block_size, latest.module.training) == (2, 16, False)
    assert difftrain.load(str(run), checkpoint="1", device="cpu").step == 1
    folder = difftrain.load(run / "checkpoints" / "step-00000002", device="cpu")
    for name, weight in latest.module.state_dict().items():
        assert torch.equal(weight, folder.module.state_dict()[name])
    monkeypatch.setenv("PLACE", str(run.parent))
    assert difftrain.load("$PLACE/run", device="cpu").tokenizer == latest.tokenizer
    with pytest.raises(UserError, match="is not a run folder"):
        difftrain.load(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint '9'; steps there: 0, 1, 2"):
        difftrain.load(run, "9")


def test_a_model_computes_in_the_dtype_that_it_is_loaded_for(run, monkeypatch):
    entered, real = [], torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda *how, **options: entered.append(options) or real(*how, **options)
    )
    plain, narrow, wide = (
        difftrain.load(run, device="cpu", dtype=d) for d in ("auto", "bfloat16", "float64")
    )
    assert plain.dtype == torch.float32
    assert plain.sample(length=9, steps=2) == difftrain.load(run, device="cpu").sample(length=9, steps=2)
    assert len(wide.sample(length=9, steps=2)[0]) == 9
    assert wide.module.head.weight.dtype == torch.float64
    ids = torch.tensor([plain.tokenizer.encode("red gr")])
    assert wide.logits(ids).dtype == torch.float32
    torch.testing.assert_close(wide.logits(ids), plain.logits(ids))
    assert not entered
    assert narrow.module.head.weight.dtype == torch.float32
    assert len(narrow.sample(length=9, steps=2, policy="confidence")[0]) == 9
    assert len(entered) == 2, "one for each call"
    narrow.repair("red green")
    assert len(entered) > 2
    assert {options["dtype"] for options in entered} == {torch.bfloat16}
    with pytest.raises(
        UserError, match="dtype must be auto, float32, bfloat16, float16, float64, got 'int8'"
    ):
        difftrain.load(run, device="cpu", dtype="int8")


def test_logits_are_those_of_the_loss(run):
    model = difftrain.load(run, device="cpu")
    ids = torch.tensor([model.tokenizer.encode("red gr"), [model.tokenizer.mask_id] * 6])
    logits = model.logits(ids)
    assert logits.shape == (2, 6, model.tokenizer.vocab_size)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, 3.0 * torch.tanh(model.module(ids) / 3.0).detach())


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_are_calls_of_the_module_the_prompt_stays_and_one_text_is_the_first_of_many(policy):
    model = ring(letters="abcdefgh")
    for length in (12, 40):
        texts = []
        for n in (1, 5):
            before = model.module.calls
            texts.append(model.sample(n, length=length, steps=9, policy=policy, prompt="hgf", seed=3))
            assert 1 <= model.module.calls - before <= 9
            assert policy in ("fill", "ancestral") or model.module.calls - before == 9
        one, five = texts
        assert [len(text) for text in five] == [length] * 5
        assert all(text.startswith("hgf") for text in five)
        assert len(set(five)) == 5
        assert one == five[:1]


def test_without_steps_a_block_size_takes_64_and_fill_one_more():
    model = ring(block_size=200)
    model.module.forward = lambda x, return_hidden: torch.tensor([0.0] * 5 + [9.0]).expand(*x.shape, 6)
    for policy, length, n in (("", 200, 65), ("margin", 200, 64), ("fill", 201, 129)):
        calls, real = [], model.module.forward
        model.module.forward = lambda x, c=calls, r=real, **how: (c.append(1), r(x, **how))[1]
        model.sample(policy=policy, length=length, temperature=0)
        assert len(calls) == n
        model.module.forward = real


def test_samples_and_repairs_print_nothing_and_keep_types(run, capfd):
    model = difftrain.load(run, device="cpu")
    capfd.readouterr()
    assert [type(t) for t in model.sample(2, length=9, infill=None, steps=2)] == [str, str]
    assert len(model.sample(infill="red ____", steps=2)[0]) == 8
    repaired = model.repair("red green")
    assert type(repaired.text) is str
    assert type(repaired.edits) is tuple
    assert model.repair("").text == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 0}, "num_samples must be at least 1"),
        ({"length": 0}, "length must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"policy": "magic"}, "policy must be one of"),
        ({"prompt": "abcde" * 4}, "the prompt must have fewer tokens than the text's 16, got 20"),
        ({"prompt": "a", "infill": "ab____"}, "prompt and infill exclude each other"),
        ({"infill": "abc"}, "an infill text must have a gap"),
        ({"infill": "ab____", "length": 6}, "length and infill exclude each other"),
        ({"length": 1.5}, "length must be a whole number, got float 1.5"),
        ({"n": None}, "num_samples must be a whole number, got NoneType"),
        ({"n": True}, "num_samples must be a whole number, got bool"),
        ({"steps": "9"}, "steps must be a whole number, got str '9'"),
        ({"seed": 0.0}, "seed must be a whole number, got float"),
        ({"top_k": 1.0}, "top_k must be a whole number, got float"),
        ({"prompt": None}, "prompt must be text, got NoneType"),
        ({"prompt": b"ab"}, "prompt must be text, got bytes"),
        ({"infill": ["____"]}, "infill must be text, got list"),
        ({"policy": None}, "policy must be text, got NoneType"),
        ({"schedule": ["linear"]}, "schedule must be text, got list"),
        ({"suspect": "0.5"}, "suspect must be a number, got str '0.5'"),
        ({"temperature": "hot"}, "temperature must be a number, got str 'hot'"),
        ({"temperature": True}, "temperature must be a number, got bool True"),
        ({"min_p": float("nan")}, "min_p must be in .*, got nan"),
    ],
)
def test_a_mistake_is_told_in_one_line(options, told):
    with pytest.raises(UserError, match=told) as caught:
        ring().sample(**options)
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers():
    model, import_numpy = ring(), pytest.importorskip("numpy")
    plain = model.sample(2, length=9, steps=3, temperature=0.5, seed=4)
    integer, real = import_numpy.int32, import_numpy.float32
    others = {"length": integer(9), "steps": torch.tensor(3), "temperature": real(0.5), "seed": integer(4)}
    assert model.sample(integer(2), **others) == plain


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([[0, 1]], "ids must be an int64 tensor, got list"),
        (torch.tensor([[0.0, 1.0]]), "ids must be an int64 tensor, got torch.float32"),
        (torch.tensor([[0, 1]], dtype=torch.int32), "ids must be an int64 tensor, got torch.int32"),
        (torch.tensor([0, 1]), "ids must have shape \\(B, T\\) .* block_size 16, got \\(2,\\)"),
        (torch.zeros((1, 17), dtype=torch.int64), "ids must have shape .* got \\(1, 17\\)"),
        (torch.tensor([[0, 6]]), "ids must be in 0 .. 5, got 0 .. 6"),
        (torch.tensor([[-1, 0]]), "ids must be in 0 .. 5, got -1 .. 0"),
    ],
)
def test_ids_that_the_model_cannot_take_are_told_in_one_line(ids, told):
    with pytest.raises(UserError, match=told):
        ring().logits(ids)


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        (b"abc", {}, "text must be text, got bytes"),
        (None, {}, "text must be text, got NoneType"),
        ("abc", {"steps": 1.5}, "steps must be a whole number, got float 1.5"),
        ("abc", {"max_changes": "2"}, "max_changes must be a whole number, got str '2'"),
        ("abc", {"sure": None}, "sure must be a number, got NoneType"),
    ],
)
def test_a_repair_of_what_is_no_text_is_told_in_one_line(text, options, told):
    with pytest.raises(UserError, match=told):
        ring().repair(text, **options)


def test_a_pointer_is_the_checkpoint_that_it_names(run):
    for name in ("latest", "best"):
        pointed = difftrain.load(run / "checkpoints" / name, device=torch.device("cpu"))
        assert pointed.step == difftrain.load(run, name, device="cpu").step
    for place in (None, 3, run / "checkpoints" / "first"):
        with pytest.raises(UserError, match="run_or_folder must be a path, got|is not a run folder"):
            difftrain.load(place)
    with pytest.raises(UserError, match="device must be auto, cpu, cuda, cuda:N or mps, got None"):
        difftrain.load(run, device=None)


def test_an_evaluation_of_a_text_is_that_of_the_command_line(run, tmp_path, capfd):
    text = "red green blue\n" * 40
    (tmp_path / "a.txt").write_text(text)
    capfd.readouterr()
    words = ["evaluate", run, "--data", tmp_path / "a.txt", "--json", "--device", "cpu", "--seed", 3]
    code, out, err = obey(
        [*words, "--windows", 5, "--levels", 20, "--errors", 5, "--draws", 2, "--penalties", "0.5,2"]
    )
    assert code == 0, err
    told = json.loads(out)
    capfd.readouterr()
    record = difftrain.load(run, device="cpu").evaluate(
        text,
        windows=5,
        levels=[20],
        errors=[5],
        draws=2,
        seed=np.int64(3),
        penalties=[[np.float32(0.5), 2]],
    )
    assert capfd.readouterr() == ("", "")
    assert told.pop("run") == str(run)
    assert told.pop("data") == str(tmp_path / "a.txt")
    assert record.pop("data") == "the text"
    assert record == told
    assert record["loss"][-1]["pm"] == 2.0
    json.dumps(record)


def test_an_evaluation_is_at_what_a_waiting_schedule_had_come_to(tiny):
    waits = {"shape": "metric", "metric": "nll", "below": 99.0, "values": [0.25, 0.5], "steps": 0}
    run = difftrain.train(tiny(max_iters=2, schedules={"penalty_keep_mask": waits}))
    model = difftrain.load(run, "latest", device="cpu")
    assert model.reached["penalty_keep_mask"][0] == 1
    assert model.evaluate("red green", draws=1)["loss"][0]["pk"] == 0.5


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("", {}, "the text must have at least 1 tokens, got 0"),
        (b"abc", {}, "text must be text, got bytes"),
        ("abz", {}, "characters outside the vocabulary: 'z'"),
        ("abc", {"windows": 1.5}, "windows must be a whole number, got float 1.5"),
        ("abc", {"levels": 15}, "levels must be a list, got int"),
        ("abc", {"levels": ["15"]}, "levels must be a number, got str '15'"),
        ("abc", {"penalties": [0.5]}, r"penalties must be pairs of numbers \(pk, pm\), got 0.5"),
        ("abc", {"estimators": ["best"]}, "estimators must be among mdlm, llada, got 'best'"),
        ("abc", {"estimators": "mdlm"}, "estimators must be a list, got str"),
    ],
)
def test_an_evaluation_that_cannot_be_is_told_in_one_line(text, options, told):
    with pytest.raises(UserError, match=told):
        ring().evaluate(text, **options)
