"""From a results file to docs/gpu.md and the goals' list; figures of the made-up sample alone."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the sample lists the contenders

import report
from reporting import goals, result_files
from reporting.result_files import ResultError
from sample_result import sample_result

ROOT = Path(__file__).resolve().parent.parent.parent


def real(**stages):
    """The sample as if it had been measured, with further stages."""
    document = sample_result()
    del document["sample"]
    document["stages"] |= stages
    return document


def test_a_sample_is_refused_for_the_page():
    with pytest.raises(ResultError, match="made.json is a sample: its figures are made up"):
        report.page_part(sample_result(), "made.json")


def test_without_a_result_one_sentence_says_so():
    part = report.page_part(None)
    assert part == "No GPU result exists yet: none of this has been timed on a GPU."
    assert report.page_part({"format": 1, "environment": {}, "stages": {}}) == part


def test_the_table_shows_the_files_own_figures_and_its_source():
    part = report.page_part(real(), "made.json")
    assert part.startswith("sample, no device (H100 in name alone), driver 0.0, torch 0.0, ")
    assert "(../benchmarks/results/made.json)" in part
    # 2 * 8192 * 50304 bytes at 1000 GB/s, and 1.05 times that.
    assert f"| 8192 x 50304 | {1.05 * 0.824180736:.3f} (95 %) | {1.05 * 1.648361472:.3f} (95 %) |" in part
    assert "24 met, 2 missed, 0 not measured" in part
    tables = re.findall(r"(?:^\|.*\n?)+", part, re.M)
    assert [len(table.strip().splitlines()) for table in tables] == [2 + 6, 2 + 3, 2 + 26]
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1


def test_what_was_not_timed_is_a_dash():
    document = real()
    entries = document["stages"]["loss"]["entries"]
    document["stages"]["loss"]["entries"] = [e for e in entries if e["contender"] != "eager reference"]
    row = next(
        line for line in report.page_part(document).splitlines() if line.startswith("| 8192 x 50304 |")
    )
    assert row.endswith("| - |")


def test_trainings_and_checks_stand_below():
    facts = sample_result()["environment"]
    runs = {
        "reference": {"tokens_per_second": 1000.4, "peak_memory_mib": 2000.0, "agreement": "agrees: 0 %"},
        "linear": {"failure": "RuntimeError: exit code 1"},
    }
    training = {"environment": facts, "what": "500 steps", "runs": runs}
    graphs = {"environment": facts, "summary": "5 of 5 losses replay bit for bit"}
    part = report.page_part(real(training=training, graphs=graphs))
    assert "| reference | 1,000 | 2,000 | agrees: 0 % |" in part
    assert "| linear | RuntimeError: exit code 1 | - | - |" in part
    assert part.endswith("graphs: 5 of 5 losses replay bit for bit (commit none).")


def test_only_what_stands_between_the_markers_changes():
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.updated(page, "new")
    assert new == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.updated(new, "new") == new
    with pytest.raises(ResultError, match="lacks the markers"):
        report.updated("before", "new")


def test_the_page_is_what_the_newest_result_makes():
    """`make report` keeps it so."""
    path = result_files.newest()
    part = report.page_part(result_files.read_result(path) if path else None, path.name if path else "")
    page = (ROOT / report.PAGE).read_text(encoding="utf-8")
    assert report.updated(page, part) == page
    assert (
        path is not None and "loss" in result_files.read_result(path)["stages"]
    ) == report.PICTURE.exists()


@pytest.fixture
def small_root(tmp_path, monkeypatch):
    """A page and a folder of results of their own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / report.PAGE).write_text(f"{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PICTURE", tmp_path / "loss.png")
    monkeypatch.setattr(report, "newest", lambda: result_files.newest(tmp_path))
    return tmp_path


def test_the_command_writes_page_and_picture(small_root, capsys):
    assert report.main([]) == 0
    assert report.NOTHING in (small_root / report.PAGE).read_text()
    (small_root / "made.json").write_text(json.dumps(sample_result()))
    assert report.main([]) == 0
    assert report.NOTHING in (small_root / report.PAGE).read_text(), "a sample does not count"
    assert not (small_root / "loss.png").exists()
    (small_root / "real.json").write_text(json.dumps(real()))
    assert report.main([]) == 0
    assert "results/real.json" in (small_root / report.PAGE).read_text()
    assert (small_root / "loss.png").exists()


def test_the_command_prints_goals_of_any_file_and_says_what_is_made_up(small_root, capsys):
    assert report.main(["--goals"]) == 0
    assert capsys.readouterr().out.strip() == report.NOTHING
    file = small_root / "made.json"
    file.write_text(json.dumps(sample_result()))
    assert report.main(["--goals", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "figures are made up: a sample"
    assert len(lines) == 1 + len(goals.GOALS)
    other = sample_result()
    other["stages"]["loss"]["environment"] = other["environment"] | {"device": "an H200"}
    file.write_text(json.dumps(other))
    report.main(["--goals", str(file)])
    assert "the goals are set for an H100; these figures are of an H200" in capsys.readouterr().out
    assert report.main(["--goals", str(small_root / "absent.json")]) == 1
    assert capsys.readouterr().err.startswith("no results file at ")
