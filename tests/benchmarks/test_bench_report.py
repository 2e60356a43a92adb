"""From a results file to docs/gpu.md, the picture and the goals; figures of the made-up sample alone."""

import json
import re
import struct
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the sample lists the contenders
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import goals
import plot_loss
import report
import results
from entries import ACCUMULATED, BOTH, FORWARD, TIMED
from results import ResultError

from sample_result import sample_result

ROOT = Path(__file__).resolve().parent.parent.parent

# Results ------------------------------------------------------------------------------------------

FACTS = {"device": "NVIDIA H100 80GB HBM3", "date": "2000-01-02T03:04:05+00:00"}


def test_a_file_is_named_by_gpu_and_date():
    assert results.default_path(FACTS) == ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3-2000-01-02.json"


def test_the_newest_result_is_the_latest_by_its_own_date_and_no_sample(tmp_path):
    assert results.newest(tmp_path) is None
    for name, date, sample in (
        ("b", "2000-01-01", False),
        ("a", "2000-01-03", False),
        ("c", "2000-01-09", True),
    ):
        document = {"format": 1, "environment": FACTS | {"date": date}, "stages": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document | ({"sample": True} if sample else {})))
    (tmp_path / "codegen.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    assert results.newest(tmp_path) == tmp_path / "a.json"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "stages": {}}', '{"format": 1}'])
def test_anything_else_is_refused_by_name_and_never_overwritten(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    for use in (results.read_result, lambda p: results.save_stage(p, "loss", {}, FACTS)):
        with pytest.raises(ResultError, match="other.json is not"):
            use(path)
    assert path.read_text() == text
    with pytest.raises(ResultError, match="no results file at .*absent.json"):
        results.read_result(tmp_path / "absent.json")


def test_no_figures_go_into_a_sample(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text(json.dumps(sample_result()))
    with pytest.raises(ResultError, match="is a sample"):
        results.save_stage(path, "loss", {}, FACTS)


# Goals --------------------------------------------------------------------------------------------


def entries_with(change):
    """The sample's loss entries, each passed through ``change`` (None: dropped)."""
    changed = (change(dict(e)) for e in sample_result()["stages"]["loss"]["entries"])
    return [e for e in changed if e is not None]


def verdict(what, shape, entries):
    (goal,) = (g for g in goals.GOALS if (g.what, g.shape) == (what, shape))
    (found,) = goals.evaluate([goal], entries)
    return found


def setting(contender, measure, **values):
    def change(entry):
        is_it = (entry["contender"], entry["measure"]) == (contender, measure)
        return entry | values if is_it else entry

    return change


def test_the_goals_are_the_agreed_ones():
    asked = {(g.what, g.shape): (g.asked, g.at_least) for g in goals.GOALS}
    assert len(asked) == len(goals.GOALS) == 26
    sizes = {50304: 90, 50305: 90, 128256: 85, 151936: 85, 262144: 75}
    for vocab_size, share in sizes.items():
        assert asked["forward", (8192, vocab_size)] == (90, True)
        assert asked["loss and gradient", (8192, vocab_size)] == (share, True)
        assert asked["upstream 1/8 slower than 1", (8192, vocab_size)] == (5, False)
    assert asked["loss and gradient", (262144, 66)] == (50, True)
    assert asked["best peer with the same loss", (8192, 50304)] == (2, True)
    assert asked["best peer with the same loss", (8192, 128256)] == (1.3, True)
    assert asked["eager", (8192, 50304)] == (6, True)
    assert asked["torch.compile, tensor penalties", (8192, 50304)] == (2.5, True)
    assert asked["cost of the weights, loss and gradient", (8192, 50304)] == (2, False)
    assert asked["linear", (8192, 768, 50304)] == (1.25, False)
    assert asked["linear", (8192, 4096, 128256)] == (1.10, False)
    assert asked["linear, memory beside inputs and gradients", (8192, 4096, 128256)] == (1.25 * 1024, False)
    assert asked["linear, memory beside inputs and gradients", (65536, 768, 50304)] == (512, False)


@pytest.mark.parametrize(
    ("what", "shape", "change", "value", "outcome"),
    [
        ("forward", (8192, 50305), setting("ours", FORWARD, percent_of_limit=90.0), 90, "met: 90 % of the limit"),
        ("forward", (8192, 50305), setting("ours", FORWARD, percent_of_limit=87.5), 87.5,
         "missed by 2.5 % of the limit: 87.5 % of the limit"),
        ("loss and gradient", (262144, 66), setting("ours, upstream stated", BOTH, percent_of_limit=49.0), 49,
         "missed by 1 % of the limit: 49 % of the limit"),
        ("upstream 1/8 slower than 1", (8192, 50304),
         lambda e: setting("ours, upstream stated", ACCUMULATED, ms=1.1)(setting("ours, upstream stated", BOTH, ms=1.0)(e)),
         10, "missed by 5 %: 10 %"),
        ("eager", (8192, 50304),
         lambda e: setting("eager reference", BOTH, ms=7.0)(setting("ours, upstream stated", BOTH, ms=1.0)(e)),
         7, "met: 7 x our time"),
        ("cost of the weights, forward", (8192, 50304),
         lambda e: setting("plain cross-entropy, our kernel", FORWARD, ms=1.0)(setting("ours", FORWARD, ms=1.03)(e)),
         3, "missed by 1 %: 3 %"),
        ("linear", (8192, 768, 50304), setting("ours linear", BOTH, times_the_products=1.5), 1.5,
         "missed by 0.25 x its products: 1.5 x its products"),
        ("linear, memory beside inputs and gradients", (65536, 768, 50304),
         setting("ours linear", BOTH, peak_mib=900.0, gradients_mib=400.0), 500, "met: 500 MiB"),
    ],
)  # fmt: skip
def test_a_goal_is_met_or_missed_by_a_figure(what, shape, change, value, outcome):
    found = verdict(what, shape, entries_with(change))
    assert found.value == pytest.approx(value)
    assert found.outcome == outcome
    assert found.is_met == outcome.startswith("met")


def test_the_best_peer_is_the_fastest_that_computes_the_whole_loss_and_is_not_ours():
    key = "best peer with the same loss", (8192, 50304)

    def times(e):
        ms = {"ours, upstream stated": 1.0, "plain cross-entropy, our kernel": 0.5, "Liger cross-entropy": 3.0,
              "eager reference": 5.0, "torch.compile, float penalties": 2.5}.get(e["contender"], 9.0)  # fmt: skip
        return e | {"ms": ms} if e["outcome"] == TIMED else e

    entries = entries_with(times)
    liger = next(e for e in entries if (e["contender"], e["measure"]) == ("Liger cross-entropy", BOTH))
    plain = liger | {"contender": "plain", "lacks": "no weights", "ms": 0.1}
    found = verdict(*key, [*entries, plain])
    assert found.value == 2.5
    assert (
        found.note == "torch.compile, float penalties; without QuACK cross-entropy, QuACK, over the logits"
    )
    # Without another library among them it is no comparison with peers.
    without = entries_with(lambda e: None if e["contender"] == "Liger cross-entropy" else times(e))
    found = verdict(*key, without)
    assert found.value is None
    assert found.outcome.startswith("not measured (QuACK cross-entropy: not installed: ")


def test_a_contender_that_was_wrong_or_absent_leaves_its_goals_not_measured():
    def wrong(e):
        is_it = e["contender"] == "ours, upstream stated"
        return e | {"outcome": "wrong: loss off by 1", "ms": None, "measure": ""} if is_it else e

    found = verdict("loss and gradient", (8192, 50304), entries_with(wrong))
    assert found.outcome == "not measured (ours, upstream stated: wrong: loss off by 1)"
    assert not found.is_met
    found = verdict("forward", (8192, 50304), [])
    assert found.outcome == "not measured (no entry for ours)"
    other = entries_with(lambda e: e | {"dtype": "fp32"})
    assert verdict("forward", (8192, 50304), other).value is None, "goals are for bf16"


# The page -----------------------------------------------------------------------------------------


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
    path = results.newest()
    part = report.page_part(results.read_result(path) if path else None, path.name if path else "")
    page = (ROOT / report.PAGE).read_text(encoding="utf-8")
    assert report.updated(page, part) == page
    assert (path is not None and "loss" in results.read_result(path)["stages"]) == report.PICTURE.exists()


@pytest.fixture
def small_root(tmp_path, monkeypatch):
    """A page and a folder of results of their own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / report.PAGE).write_text(f"{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PICTURE", tmp_path / "loss.png")
    monkeypatch.setattr(report, "newest", lambda: results.newest(tmp_path))
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


# Picture ------------------------------------------------------------------------------------------


def test_every_shape_is_a_panel_and_every_contender_a_bar_or_a_reason(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: figures.append(self) or save(self, *args))
    entries = sample_result()["stages"]["loss"]["entries"]
    file = plot_loss.plot_entries(entries, tmp_path / "folder" / "chart.png", "sample")
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24])[0] == 1200
    panels = [ax for ax in figures[0].axes if ax.get_title(loc="left")]
    assert len(panels) == 9
    shape = [8192, 50304]
    (ax,) = (ax for ax in panels if ax.get_title(loc="left") == "N x V = 8192 x 50304, bf16")
    both = {e["contender"]: e["ms"] for e in entries if e["shape"] == shape and e["measure"] == BOTH}
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx(sorted(both.values()))
    assert len(ax.get_yticklabels()) == 12
    texts = [text.get_text() for text in ax.texts]
    assert "not installed: No module named 'quack'" in texts
    assert "1.73 ms, 95 %" in texts
    assert [bar.get_hatch() for bar in ax.patches].count("////") == 1, "one computes less"
    (limit,) = (line for line in ax.get_lines() if line.get_linestyle() == ":")
    assert limit.get_xdata()[0] == pytest.approx(1.648361472)


def test_no_text_of_the_picture_lies_over_another(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    boxes = []

    def measure(figure, *_):
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        texts = [t for ax in figure.axes if ax.axison for t in (*ax.texts, *ax.get_yticklabels())]
        boxes.extend(t.get_window_extent(renderer) for t in texts if t.get_text())
        width = figure.get_window_extent().width
        assert all(box.x0 >= 0 and box.x1 <= width for box in boxes)

    monkeypatch.setattr(Figure, "savefig", measure)
    plot_loss.plot_entries(sample_result()["stages"]["loss"]["entries"], tmp_path / "x.png", "sample")
    assert len(boxes) > 150
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlaps == []


def test_nothing_timed_is_nothing_to_draw(tmp_path):
    entries = [
        e | {"ms": None, "outcome": "out of memory"} for e in sample_result()["stages"]["loss"]["entries"]
    ]
    with pytest.raises(ResultError, match="nothing was timed"):
        plot_loss.plot_entries(entries, tmp_path / "x.png", "sample")


def test_a_missing_matplotlib_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResultError, match="pip install 'difftrain\\[bench\\]'"):
        plot_loss.plot_entries(sample_result()["stages"]["loss"]["entries"], tmp_path / "x.png", "sample")
