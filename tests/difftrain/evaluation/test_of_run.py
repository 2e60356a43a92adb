import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.data import open_corpus
from difftrain.errors import UserError
from difftrain.evaluation.lines import lines_of
from difftrain.evaluation.of_run import EvaluationRequest, evaluate_run
from difftrain.reporting.log import read_metrics
from difftrain.training.loop import train
from launch import obey
from processes import run_in_processes

SMALL = {"windows": 9, "draws": 2, "device": "cpu", "batch_size": 4}
WORDS = ["--windows", 9, "--draws", 2, "--device", "cpu", "--dtype", "float64"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus_folder):
    """A run of each mode, and one under a recipe."""
    from difftrain.config import Config

    made = {}
    for name, changes in {
        "diffusion": {"mask_level": "stratified", "gradient_accumulation_steps": 2},
        "gpt2": {"mode": "gpt2"},
        "mdlm": {"recipe": "mdlm", "softcap": 5.0, "mask_level": "cosine"},
        "editing": {"wrong_target": "token", "replacement": "unigram"},
    }.items():  # fmt: skip
        config = Config(
            out_dir=str(tmp_path_factory.mktemp("runs") / name), data=str(corpus_folder), device="cpu", block_size=16,
            batch_size=8, n_layer=1, n_head=2, n_embd=16, max_iters=8, learning_rate=1e-2, warmup_iters=2,
            masking_warmup_iters=6, eval_interval=4, eval_iters=4, eval_batch_size=8, **changes,
        )  # fmt: skip
        train(config)
        made[name] = Path(config.out_dir)
    return made


def evaluate_all(folders, rank):
    return [obey(["evaluate", folder, *WORDS, "--json", "--batch_size", 5]) for folder in folders]


def test_figures_do_not_depend_on_the_batch_or_the_number_of_processes(runs, tmp_path):
    mine, others = run_in_processes(2, partial(evaluate_all, list(runs.values())), tmp_path)
    assert [(code, out) for code, out, _ in others] == [(0, "")] * len(runs)

    def numbers(value):
        if isinstance(value, dict):
            return [n for v in value.values() for n in numbers(v)]
        return [n for v in value for n in numbers(v)] if isinstance(value, list) else [value]

    for folder, (code, out, err) in zip(runs.values(), mine, strict=True):
        assert code == 0, err
        one = evaluate_run(folder, EvaluationRequest(**SMALL, dtype="float64"))
        for a, b in zip(numbers(one), numbers(json.loads(out)), strict=True):
            assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-9, abs=1e-12, nan_ok=True))


def test_the_loss_on_the_runs_own_validation_set_is_what_its_metrics_tell(runs):
    record = evaluate_run(runs["diffusion"], EvaluationRequest(**SMALL, checkpoint="latest"))
    last = [r for r in read_metrics(runs["diffusion"]) if r["kind"] == "eval"][-1]
    assert record["step"] == last["step"]
    assert record["validation"]["id"] == last["validation_id"]
    now, final, *_ = record["validation"]["loss"]
    assert now["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert final["loss"] == pytest.approx(last["loss_final"], rel=1e-6)


def test_the_causal_likelihood_is_the_cross_entropy_over_words_of_the_whole_text(runs):
    checkpoint = find_checkpoint(runs["gpt2"], "best")
    corpus = open_corpus(checkpoint.config.data)
    record = evaluate_run(runs["gpt2"], EvaluationRequest(**(SMALL | {"windows": 0}), dtype="float64"))
    model = checkpoint.make_model(torch.device("cpu")).double()
    ids = torch.from_numpy(corpus.val.astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            piece = ids[start : start + 17]
            logits = model(piece[None, :-1])[0][:, :-1]  # without [MASK], which is last
            total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
    assert record["tokens"] == len(ids) - 1
    exact = record["likelihood"]["exact"]
    assert exact["nats_per_token"]["value"] == pytest.approx(total / (len(ids) - 1))
    # Characters are tokens here, and all are ASCII.
    for unit in ("character", "byte"):
        assert exact[f"bits_per_{unit}"]["value"] == pytest.approx(total / (len(ids) - 1) / math.log(2))


def test_masked_levels_and_repair_are_counted_window_by_window(runs):
    from difftrain.data import mask_share, replace_share
    from difftrain.evaluation.windows import cut

    request = EvaluationRequest(**SMALL, levels=(50.0,), errors=(15.0,), dtype="float64", seed=4)
    record = evaluate_run(runs["diffusion"], request)
    checkpoint = find_checkpoint(runs["diffusion"], "best")
    windows = cut(open_corpus(checkpoint.config.data).val, 16, at_most=9)
    tokens, numbers = windows.stack(range(9))
    mask_id = checkpoint.vocabulary.mask_id
    model = checkpoint.make_model(torch.device("cpu")).double()
    keys = {"seed": 4, "split": "val", "vocab_size": mask_id + 1}
    with torch.no_grad():
        x, y = mask_share(tokens, numbers, share=0.5, **keys)
        logits, is_masked = model(x), x == mask_id
        nll = F.cross_entropy(logits[is_masked], y[is_masked]).item()
        right = (logits.argmax(2) == y)[is_masked].double().mean().item()
        assert record["masked"]["50"]["nll"]["value"] == pytest.approx(nll)
        assert record["masked"]["50"]["restored"]["value"] == pytest.approx(right)
        x, y = replace_share(tokens, numbers, share=0.15, **keys)
        answer, is_wrong = model(x).argmax(2), x != tokens
    assert (is_wrong.sum(1) == int(0.15 * 16)).all()
    assert (x != mask_id).all()
    assert (y[is_wrong] == mask_id).all()
    repair = record["repair"]["15"]
    assert repair["found"]["value"] == pytest.approx((answer == mask_id)[is_wrong].double().mean().item())
    assert repair["harmed"]["value"] == pytest.approx((answer == mask_id)[~is_wrong].double().mean().item())
    assert repair["kept"]["value"] == pytest.approx((answer == tokens)[~is_wrong].double().mean().item())


def test_any_text_is_measured_and_what_does_not_fit_it_is_left_out(runs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("red green blue\nwhite black grey\nshort")
    record = evaluate_run(runs["mdlm"], EvaluationRequest(**SMALL, data=str(text)))
    assert record["tokens"] == record["bytes"] == len(text.read_text())
    assert record["windows"] == 3
    assert "validation" not in record
    assert "repair" not in record
    assert [entry["pk"] for entry in record["loss"]] == [1.0]
    record = evaluate_run(
        runs["diffusion"], EvaluationRequest(**SMALL, data=str(text), penalties=((0.3, 2.0),))
    )
    assert [(e["pk"], e["pm"]) for e in record["loss"]][-1] == (0.3, 2.0)
    losses = {(e["pk"], e["pm"]): e["loss"] for e in record["loss"]}
    assert losses[0.25, 0.5] <= losses[1.0, 1.0]


def test_the_command_prints_the_same_as_json_and_as_lines(runs):
    code, out, _ = obey(["evaluate", runs["diffusion"], *WORDS, "--json", "--penalties", "0.5,0.5"])
    record = json.loads(out)
    assert code == 0
    assert record["likelihood"]["mdlm"]["draws"] == 2
    code, text, _ = obey(["evaluate", runs["diffusion"], *WORDS, "--penalties", "0.5,0.5"])
    assert code == 0
    assert text == "\n".join(lines_of(record)) + "\n"
    assert f"{record['likelihood']['llada']['nats_per_token']['value']:.4f}" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--levels", "0"], "levels must be per cents in (0, 100], got 0"),
        (["--errors", "1,200"], "errors must be per cents in (0, 100], got 200"),
        (["--levels", "a"], "invalid list of per cents value"),
        (["--penalties", "1"], "invalid pair PK,PM value"),
        (["--penalties", "nan,1"], "penalties must be in [0, 3.4e+38], got nan,1"),
        (["--penalties", "1e308,1"], "penalties must be in [0, 3.4e+38], got 1e+308,1"),
        (["--levels", "15,15"], "levels must differ, got 15,15"),
        (["--estimators", "elbo"], "estimators must be among mdlm, llada, got 'elbo'"),
        (["--draws", "0"], "draws must be at least 1"),
        (["--data", "nothing-here"], "nothing-here"),
        (["--checkpoint", "77"], "no checkpoint '77'"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_a_mistake_is_one_line(runs, words, told):
    code, out, err = obey(["evaluate", runs["diffusion"], *words])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err


def test_a_text_that_does_not_fit_is_one_line(runs, tmp_path):
    for content, told in [("", "must have at least 1 tokens, got 0"), ("r\u00e9d", "characters outside the vocabulary"),
                          ("\0", "binary")]:  # fmt: skip
        path = tmp_path / "text.txt"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            evaluate_run(runs["diffusion"], EvaluationRequest(**SMALL, data=str(path)))


def test_a_run_that_is_trained_to_correct_is_asked_how_many_it_does(runs):
    from difftrain.data import replace_share
    from difftrain.evaluation.windows import cut

    record = evaluate_run(runs["editing"], EvaluationRequest(**SMALL, errors=(15.0,), dtype="float64"))
    checkpoint = find_checkpoint(runs["editing"], "best")
    tokens, numbers = cut(open_corpus(checkpoint.config.data).val, 16, at_most=9).stack(range(9))
    keys = {"seed": 0, "split": "val", "vocab_size": checkpoint.vocabulary.vocab_size}
    x, y = replace_share(tokens, numbers, share=0.15, wrong_target="token", **keys)
    assert torch.equal(y, tokens)
    with torch.no_grad():
        answer = checkpoint.make_model(torch.device("cpu")).double()(x).argmax(2)
    right = (answer == tokens)[x != tokens].double().mean().item()
    assert record["repair"]["15"]["corrected"]["value"] == pytest.approx(right)
    assert "answered right" in "\n".join(lines_of(record))


def test_one_window_alone_has_the_spread_of_its_draws(runs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("red blue")
    record = evaluate_run(runs["diffusion"], EvaluationRequest(**(SMALL | {"draws": 64}), data=str(text)))
    for figures in record["likelihood"].values():
        assert figures["nats_per_token"]["standard_error"] > 0
