"""From a results file to docs/gpu.md and the goals' list; figures of the made-up sample alone."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the sample lists the contenders

import report
from measuring.checkout import kernels_digest
from reporting import goals, pages, result_files
from reporting.result_files import ResultError
from sample_result import sample_result

ROOT = Path(__file__).resolve().parent.parent.parent


def real(**stages):
    """The sample as if it had been measured with these kernels, with further stages."""
    document = sample_result()
    del document["sample"]
    document["stages"] |= stages
    for stage in document["stages"].values():
        stage["environment"] = stage["environment"] | {"kernels": kernels_digest()}
    return document


def test_a_sample_is_refused_for_the_page():
    with pytest.raises(ResultError, match="made.json is a sample: its figures are made up"):
        report.page_part(sample_result(), "made.json")


def test_a_rehearsal_is_refused_for_the_page_however_it_is_named():
    for change in ({"rehearsal": True}, {"environment": {"device": "rehearsal on the CPU"}}):
        with pytest.raises(ResultError, match="made.json is a rehearsal: its figures are no measurements"):
            report.page_part(real() | change, "made.json")
        with pytest.raises(ResultError, match="is a rehearsal"):
            report.readme_part(real() | change, "made.json")


def test_figures_of_other_kernels_are_not_shown():
    document = real(graphs={"environment": sample_result()["environment"], "summary": "5 of 5"})
    old = document["stages"]["loss"]["environment"] | {"kernels": "0123"}
    document["stages"]["loss"]["environment"] = old
    part = report.page_part(document)
    assert part == "graphs: 5 of 5 (commit none)."
    document["stages"]["graphs"]["environment"] = old
    assert report.page_part(document) == report.readme_part(document) == report.OUTDATED
    assert "ms" not in report.OUTDATED


def test_the_digest_is_of_every_source_of_the_kernels(tmp_path):
    folder = tmp_path / "kernels" / "a"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text("1")
    digests = {kernels_digest(tmp_path)}
    for path, text in ((folder / "one.py", "2"), (folder / "two.py", ""), (folder / "note.md", "x")):
        path.write_text(text)
        digests.add(kernels_digest(tmp_path))
    (folder / "two.py").rename(folder / "three.py")
    digests.add(kernels_digest(tmp_path))
    assert len(digests) == 4, "a note changes nothing"


def test_without_a_result_one_sentence_says_so():
    part = report.page_part(None)
    assert part == "No GPU result exists yet: none of this has been timed on a GPU."
    assert report.page_part({"format": 1, "environment": {}, "stages": {}}) == part
    assert report.readme_part(None) == part


def test_the_table_shows_the_files_own_figures_and_its_source():
    part = report.page_part(real(), "made.json")
    assert part.startswith("sample, no device (H100 in name alone), driver 0.0, torch 0.0, ")
    assert "(../benchmarks/results/made.json)" in part
    # 2 * 8192 * 50304 bytes at 1000 GB/s, and 1.05 times that.
    assert f"| 8192 x 50304 | {1.05 * 0.824180736:.3f} (95 %) | {1.05 * 1.648361472:.3f} (95 %) |" in part
    assert "24 met, 2 missed, 0 not measured" in part
    tables = re.findall(r"(?:^\|.*\n?)+", part, re.M)
    assert [len(table.strip().splitlines()) for table in tables] == [2 + 6, 2 + 3, 2 + 26]
    readme = report.readme_part(real(), "made.json")
    assert f"| 8192 x 50304 | {1.05 * 0.824180736:.3f} (95 %) |" in readme
    assert "(benchmarks/results/made.json)" in readme
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


def test_measured_times_stand_beside_the_predicted_ones_of_that_device():
    document = real()
    assert "Measured beside what" not in report.page_part(document), "nothing is predicted of a sample"
    facts = document["stages"]["loss"]["environment"]
    document["stages"]["loss"]["environment"] = facts | {"device": "NVIDIA H100 80GB HBM3"}
    part = report.page_part(document).split("Measured beside what")[1]
    # The sample moves 1000 GB/s, the prediction 3015 where a tile keeps it busy.
    row = next(line for line in part.splitlines() if line.startswith("| 8192 x 50304 | stated"))
    assert row.endswith(f"| {1.05 * 1.648361472:.3f} (95 %) | 2.39 |")


def test_steps_by_tokens_and_memory_by_positions_are_tables():
    facts = sample_result()["environment"]
    sizes = [
        {"tokens": 4096, "impl": "linear", "failure": None, "ms": 12.34, "peak_mib": 2000.0},
        {"tokens": 65536, "impl": "reference", "failure": "RuntimeError: exit code 1: out of memory"},
    ]
    memory = [
        {"positions": 4096, "contender": "ours linear", "gradients_mib": 10.0, "peak_mib": 310.0},
        {
            "positions": 65536,
            "contender": "eager reference",
            "gradients_mib": 10.0,
            "failure": "out of memory",
        },
    ]
    part = report.page_part(real(sizes={"environment": facts, "rows": sizes}, memory={"environment": facts, "rows": memory}))  # fmt: skip
    assert "| 4,096 | linear | 12.3 | 2,000 |" in part
    assert "| 65,536 | reference | RuntimeError: exit code 1: out of memory | - |" in part
    assert "| 4,096 | ours linear | 300 |" in part
    assert "| 65,536 | eager reference | out of memory |" in part
    failed = {"ok": False, "environment": facts, "summary": "hung: given up after 510 s"}
    assert "given up" not in report.page_part(real(sizes=failed, memory=failed, training=failed))


def test_only_what_stands_between_the_markers_changes():
    page = "before\n<a>\nold\n</a>\nafter\n"
    new = pages.updated(page, "<a>", "</a>", "new")
    assert new == "before\n<a>\nnew\n</a>\nafter\n"
    assert pages.updated(new, "<a>", "</a>", "new") == new
    with pytest.raises(ResultError, match="lacks the markers"):
        pages.updated("before", "<a>", "</a>", "new")


def test_the_pages_are_what_the_newest_result_makes():
    """`make report` keeps them so."""
    path = result_files.newest()
    document, name = (result_files.read_result(path), path.name) if path else (None, "")
    for page, part in ((report.PAGE, report.page_part), (report.README, report.readme_part)):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert pages.updated(text, report.BEGIN, report.END, part(document, name)) == text
    try:
        stages = report.shown_stages(document, name) if document else {}
    except result_files.ResultError:  # of other kernels
        stages = {}
    assert report.PICTURE.exists() == ("loss" in stages)


@pytest.fixture
def small_root(tmp_path, monkeypatch):
    """A page and a folder of results of their own."""
    (tmp_path / "docs").mkdir()
    for page in (report.PAGE, report.README):
        (tmp_path / page).write_text(f"{report.BEGIN}\n{report.END}\n")
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
    for page in (report.PAGE, report.README):
        assert "results/real.json" in (small_root / page).read_text()
    assert (small_root / "loss.png").exists()
    capsys.readouterr()
    old = real()
    old["stages"]["loss"]["environment"]["kernels"] = "0123"
    (small_root / "real.json").write_text(json.dumps(old))
    assert report.main([]) == 1
    assert "real.json is of other kernels (0123; these are" in capsys.readouterr().err
    assert report.OUTDATED in (small_root / report.README).read_text()


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
