"""The comparison's picture: everything on it, nothing over anything else."""

import struct
import sys

import pytest

pytest.importorskip("triton")  # the sample lists the contenders

from comparison.entries import BOTH
from reporting import plot_loss
from reporting.result_files import ResultError
from sample_result import sample_result


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
    assert len(ax.get_yticklabels()) == 14
    texts = [text.get_text() for text in ax.texts]
    assert "not installed: No module named 'quack'" in texts
    assert "1.73 ms, 95 %" in texts
    assert [bar.get_hatch() for bar in ax.patches].count("////") == 2, "two compute less"
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
