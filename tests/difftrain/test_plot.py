import struct
from pathlib import Path

import pytest

from difftrain.errors import UserError
from difftrain.reporting.log import FILE
from difftrain.reporting.plot import plot_run
from difftrain.training.loop import train


def size_of(png):
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("mode", ["diffusion", "gpt2"])
def test_a_run_becomes_one_png_1200_pixels_wide(tiny, mode):
    config = tiny(mode=mode, max_iters=5)
    train(config)
    png = plot_run(Path(config.out_dir))
    assert png == Path(config.out_dir) / "plots" / "curves.png"
    assert size_of(png) == (1200, 800)


def test_every_curve_is_drawn_with_the_runs_numbers(tiny, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    config = tiny(max_iters=8)
    train(config)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: figures.append(self))
    plot_run(Path(config.out_dir), tmp_path / "x.png")
    lines = {line.get_label(): line for ax in figures[0].axes for line in ax.get_lines()}
    for label in ("at the step's penalties", "at the final penalties", "no weights", "15 % masked", "50 % masked",
                  "85 % masked", "as in training", "unigram entropy", "masked: filled in right",
                  "correct word: answered [MASK]", "wrong word: flagged [MASK]"):  # fmt: skip
        assert len(lines[label].get_xdata()) >= 2, label
    pk = lines["pk: masked position answered [MASK]"]
    assert (pk.get_xdata()[0], pk.get_ydata()[0]) == (0, 1.0)
    assert pk.get_ydata()[-1] == 0.25
    assert all(ax.get_title() and ax.get_ylabel() for ax in figures[0].axes)


def test_a_folder_without_metrics_is_refused_and_a_nan_loss_is_drawn_around(tiny, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        plot_run(tmp_path)
    config = tiny(max_iters=3)
    train(config)
    path = Path(config.out_dir) / FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"loss": ', '"loss": null, "was": '), *lines[1:]]) + "\n")
    assert plot_run(Path(config.out_dir)).exists()
