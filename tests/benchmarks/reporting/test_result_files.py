"""The results file: named by GPU and day, filled by stages, never mistaken for something else."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the sample lists the contenders

from reporting import result_files
from reporting.result_files import ResultError
from sample_result import sample_result

ROOT = Path(__file__).resolve().parents[3]
FACTS = {"device": "NVIDIA H100 80GB HBM3", "date": "2000-01-02T03:04:05+00:00"}


def test_a_file_is_named_by_gpu_and_date():
    assert (
        result_files.default_path(FACTS)
        == ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3-2000-01-02.json"
    )


def test_the_newest_result_is_the_latest_by_its_own_date_and_no_sample(tmp_path):
    assert result_files.newest(tmp_path) is None
    for name, date, sample in (
        ("b", "2000-01-01", False),
        ("a", "2000-01-03", False),
        ("c", "2000-01-09", True),
    ):
        document = {"format": 1, "environment": FACTS | {"date": date}, "stages": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document | ({"sample": True} if sample else {})))
    (tmp_path / "codegen.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    assert result_files.newest(tmp_path) == tmp_path / "a.json"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "stages": {}}', '{"format": 1}'])
def test_anything_else_is_refused_by_name_and_never_overwritten(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    for use in (result_files.read_result, lambda p: result_files.save_stage(p, "loss", {}, FACTS)):
        with pytest.raises(ResultError, match="other.json is not"):
            use(path)
    assert path.read_text() == text
    with pytest.raises(ResultError, match="no results file at .*absent.json"):
        result_files.read_result(tmp_path / "absent.json")


def test_a_rehearsals_file_says_so_and_is_never_the_newest_or_a_devices(tmp_path):
    path, rehearsed = tmp_path / "r.json", FACTS | {"device": "rehearsal on the CPU"}
    result_files.save_stage(path, "graphs", {"ok": True}, rehearsed)
    assert json.loads(path.read_text())["rehearsal"] is True
    assert result_files.newest(tmp_path) is None
    with pytest.raises(ResultError, match="holds figures of rehearsal on the CPU, these are of NVIDIA"):
        result_files.save_stage(path, "graphs", {}, FACTS)
    result_files.save_stage(tmp_path / "a.json", "graphs", {}, FACTS)
    with pytest.raises(ResultError, match="holds figures of NVIDIA"):
        result_files.save_stage(tmp_path / "a.json", "graphs", {}, rehearsed)


def test_a_step_counts_as_begun_until_its_record_is_whole(tmp_path):
    path = tmp_path / "a.json"
    for expected in (1, 2):
        result_files.note_begun(path, "loss", FACTS)
        assert result_files.read_result(path)["begun"] == {"loss": expected}
    result_files.save_stage(path, "loss", {"entries": []}, FACTS)
    assert result_files.read_result(path)["begun"] == {"loss": 2}
    result_files.save_stage(path, "loss", {"entries": [], "ok": True}, FACTS)
    assert result_files.read_result(path)["begun"] == {}


def test_a_stage_of_other_kernels_is_not_the_current_one(tmp_path):
    path, ours = tmp_path / "a.json", FACTS | {"kernels": "ours"}
    assert result_files.current_stage(path, "loss", ours) is None
    result_files.save_stage(path, "loss", {"entries": []}, FACTS | {"kernels": "theirs"})
    assert result_files.current_stage(path, "loss", ours) is None
    result_files.save_stage(path, "loss", {"entries": []}, ours)
    assert result_files.current_stage(path, "loss", ours)["entries"] == []


def test_no_figures_go_into_a_sample(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text(json.dumps(sample_result()))
    with pytest.raises(ResultError, match="is a sample"):
        result_files.save_stage(path, "loss", {}, FACTS)
