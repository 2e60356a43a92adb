"""The benchmark of sampling: every figure of every policy, and passes that are those asked for."""

import json

import pytest
import torch

import bench_sampling
from difftrain.config import Config
from difftrain.training.loop import train
from ring_model import ring
from text_quality.gap_lengths import RULES


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus_folder):
    """Two models of one kind, one that never learnt to suspect, and a judge."""
    folder = tmp_path_factory.mktemp("sampling")
    made = []
    for name, changes in {
        "a": {"seed": 1}, "b": {"seed": 2}, "masked": {"recipe": "mdlm"}, "judge": {"mode": "gpt2"},
    }.items():  # fmt: skip
        config = Config(
            out_dir=str(folder / name), data=str(corpus_folder), device="cpu", block_size=16, batch_size=4,
            n_layer=1, n_head=2, n_embd=16, max_iters=2, warmup_iters=1, eval_interval=2, eval_iters=2,
            eval_batch_size=2, **changes,
        )  # fmt: skip
        train(config)
        made.append(config.out_dir)
    return made


def test_every_policy_is_measured_for_every_model_and_number_of_passes(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    a, b, _, judge = runs
    files = ["--json", str(tmp_path / "all.json"), "--plot", str(tmp_path / "all.png")]
    arguments = [a, b, "--judge", judge, "--passes", "4", "6", "--texts", "8", *files]
    assert bench_sampling.main(arguments) == 0
    result = json.loads((tmp_path / "all.json").read_text())
    ways = {(e["task"], e["way"], e["passes"], e["model"]) for e in result["writing"]}
    names = bench_sampling.WAYS
    assert ways == {(t, p, n, m) for t in ("free", "gaps") for p in names for n in (4, 6) for m in (0, 1)}
    for entry in result["writing"]:
        assert 1 <= entry["calls"] <= entry["passes"]
        assert entry["figures"]["judge_nll"] > 0
        assert ("restored" in entry["figures"]) == (entry["task"] == "gaps")
    assert len(result["repair"]) == 2 * 3 * 2 * 2
    assert len(result["lengths"]) == 2 * len(RULES) * 8
    out = capsys.readouterr().out
    assert "| remask, suspect 0.5 |" in out
    assert "| own, 15 % | 0.5 |" in out
    assert "| always the shortest | 0.125 ± 0.000 |" in out
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_a_part_alone_is_measured(runs, tmp_path, capsys):
    a, *_, judge = runs
    file = tmp_path / "lengths.json"
    arguments = [a, "--judge", judge, "--parts", "lengths", "--texts", "8", "--json", str(file)]
    assert bench_sampling.main(arguments) == 0
    result = json.loads(file.read_text())
    assert (result["writing"], result["repair"]) == ([], [])
    assert {e["cut"] for e in result["lengths"]} == set(range(1, 9))
    out = capsys.readouterr().out
    assert out.startswith("| the length by |")


def test_a_model_that_never_learnt_to_suspect_is_left_out_where_that_is_needed(runs, tmp_path, capsys):
    *_, masked, judge = runs
    file = tmp_path / "masked.json"
    arguments = [masked, "--judge", judge, "--passes", "4", "--texts", "4", "--json", str(file)]
    assert bench_sampling.main(arguments) == 0
    result = json.loads(file.read_text())
    assert {e["way"] for e in result["writing"]} == {
        "confidence", "margin", "entropy", "ancestral", "remask_untrained", "edit", "ancestral, blocks",
        "ancestral, blocks, approximate",
    }  # fmt: skip
    assert result["repair"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, judge: [a, "--judge", a], "is in diffusion mode; the judge alone is to be in gpt2 mode"),
        (lambda a, judge: [judge, "--judge", judge], "is in gpt2 mode; the judge alone is to be in gpt2 mode"),
        (lambda a, judge: [a, "--judge", judge, "--texts", "100000"], "--texts must be at most what the held-out text has"),
        (lambda a, judge: [a + "x", "--judge", judge], "is not a run folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_line(runs, change, message, capsys):
    a, _, _, judge = runs
    assert bench_sampling.main(change(a, judge)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_filled_are_the_gaps_and_the_passes_are_counted():
    model = ring(letters="abcde")
    x = (torch.arange(64) % 5).view(4, 16)
    masked = x.clone()
    masked[:, ::3] = 5
    filled, _, calls = bench_sampling.written(model, masked, "confidence", 4, 0.0)
    assert torch.equal(filled, x)
    assert calls == 4
