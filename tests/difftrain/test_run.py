"""``difftrain.Run``: a run's folder read, whatever state it is in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import difftrain
from difftrain import Run, UserError
from difftrain.reporting.columns import Columns
from made_records import make_run


@pytest.fixture
def trained(tiny):
    return difftrain.train(tiny())


def test_figures_are_columns_that_fit_each_other(trained):
    records = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    train, evals = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    assert trained.training["step"].tolist() == list(range(12))
    assert trained.training["step"].dtype == np.int64
    assert trained.training["loss"].tolist() == [r["loss"] for r in train]
    assert trained.evaluations["masked_nll.15"].tolist() == [r["masked_nll"]["15"] for r in evals]
    n = trained.evaluations["cases.masked.n"]
    assert (n.tolist(), n.dtype) == ([r["cases"]["masked"]["n"] for r in evals], np.int64)
    assert trained.evaluations["cases.masked.nll_sums.mask"].dtype == np.float64
    assert set(trained.training["validation_id"].tolist()) == {evals[0]["validation_id"]}
    assert "kind" not in trained.training
    assert {len(column) for column in trained.evaluations.values()} == {4}


def test_what_a_record_lacks_is_nan_and_words_are_text():
    columns = Columns(
        [
            {"kind": "train", "step": 0, "loss": 1, "name": "a", "odd": [1], "deep": {"x": {"y": None}}},
            {"kind": "train", "step": 1, "loss": None, "large": 10**400, "deep": {"x": {"y": 2}}},
            {"kind": "train", "step": 2**70, "name": 3, "late": "b", "flag": True},
        ]
    )
    assert list(columns) == ["step", "loss", "name", "deep.x.y", "large", "late", "flag"]
    np.testing.assert_array_equal(columns["step"], [0.0, 1.0, 2.0**70])
    np.testing.assert_array_equal(columns["loss"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(
        columns["name"], [np.nan, np.nan, 3]
    )  # a figure, where any record has one
    np.testing.assert_array_equal(columns["deep.x.y"], [np.nan, 2, np.nan])
    np.testing.assert_array_equal(columns["large"], [np.nan] * 3)
    assert columns["late"].tolist() == ["", "", "b"]
    np.testing.assert_array_equal(columns["flag"], [np.nan, np.nan, 1])
    with pytest.raises(KeyError, match="no column 'los'; did you mean loss"):
        columns["los"]
    assert "los" not in columns
    assert columns.get("los") is None
    assert repr(columns).startswith("<3 records: step, loss, name")
    assert repr(Columns([])) == "<0 records: no columns>"


def test_a_data_frame_has_the_columns_where_pandas_is_there(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda columns: columns))
    assert list(trained.training.to_pandas()) == list(trained.training)


def test_pandas_takes_them(trained):
    pytest.importorskip("pandas")
    frame = trained.evaluations.to_pandas()
    assert frame["masked_nll.15"].tolist() == trained.evaluations["masked_nll.15"].tolist()


def test_a_run_under_way_is_read_with_its_broken_lines_and_stays_what_it_was(tmp_path):
    folder = make_run(tmp_path / "run", until=25, max_bad_steps=3)
    start = {"event": "start", "step": 0, "pid": os.getpid(), "host": os.uname().nodename}
    (folder / "sessions.jsonl").write_text(json.dumps(start) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\xff\n[1]\n{"step": 26, "kind"')
    run = Run(folder)
    assert (run.state, run.step) == ("under way", 25)
    assert run.training["step"].tolist() == list(range(25))
    assert run.evaluations["step"].tolist() == [0, 10, 20]
    assert run.config.max_bad_steps == 3
    assert isinstance(run.warnings, list)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(': "train", "loss": 2.0}\n')
    assert len(run.training["step"]) == 25
    assert Run(folder).training["loss"][-1] == 2.0


def test_a_run_without_a_record_yet_is_one_and_other_folders_are_none(tmp_path):
    config = difftrain.Config(out_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.to_toml())
    run = Run(tmp_path / "run")
    assert (run.state, run.step, run.checkpoints, run.verify()) == ("not finished", 0, [], {})
    assert list(run.training) == list(run.evaluations) == run.warnings == []
    assert repr(run) == f"<Run {tmp_path / 'run'}: not finished, 0 steps>"
    (tmp_path / "run" / "config.toml").write_text(config.to_toml() + "no_such_option = 1\n")
    with pytest.raises(UserError, match="has no configuration that this version of difftrain knows"):
        Run(tmp_path / "run").config  # noqa: B018
    for place, told in (
        (tmp_path, "is not a run folder"),
        (tmp_path / "x", "is not a run"),
        (3, "path must be"),
    ):
        with pytest.raises(UserError, match=told):
            Run(place)


def test_a_run_that_was_moved_goes_on_where_it_is(trained, tmp_path):
    moved = Path(shutil.move(trained.path, tmp_path / "moved"))
    assert Run(moved).config.out_dir == str(moved)
    longer = difftrain.train(Run(moved).config, resume=True)
    assert longer.path == moved


def test_checkpoints_are_listed_verified_and_loaded(trained):
    steps = [saved.step for saved in trained.checkpoints]
    assert steps[-1] == 12
    assert [saved.is_latest for saved in trained.checkpoints] == [step == 12 for step in steps]
    assert sum(saved.is_best for saved in trained.checkpoints) == 1
    assert difftrain.load(trained.checkpoints[0], device="cpu").step == steps[0]
    assert difftrain.load(trained, "latest", device="cpu").step == 12
    assert trained.verify() == {}
    weights = trained.checkpoints[0].path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (trained.checkpoints[-1].path / "state.json").unlink()
    problems = trained.verify()
    assert list(problems) == [steps[0], 12]
    assert problems[steps[0]].endswith("model.safetensors is damaged: its digest does not match")
    assert problems[12].endswith("state.json is missing, so step-00000012 is no whole checkpoint")


def test_a_checkpoint_that_goes_while_it_is_verified_is_no_damage(trained, monkeypatch):
    from difftrain import run as run_module

    first = trained.checkpoints[0]

    def vanish(folder):
        if folder == first.path:
            shutil.rmtree(folder)
            raise FileNotFoundError(folder)
        return ""

    monkeypatch.setattr(run_module, "damage_of", vanish)
    assert trained.verify() == {}
    monkeypatch.setattr(run_module, "damage_of", lambda _: Path("/no/such/file").read_bytes())
    assert set(trained.verify()) == {saved.step for saved in trained.checkpoints}


def test_a_run_is_read_without_torch(tmp_path):
    folder = make_run(tmp_path / "run")
    code = (
        "import sys, difftrain; run = difftrain.Run(sys.argv[1]); run.training, run.warnings, run.verify(); "
        "assert 'torch' not in sys.modules; assert run.state == 'finished'"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
