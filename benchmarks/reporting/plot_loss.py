"""The comparison as one picture: a panel for each shape, a bar for each contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparison.entries import BOTH, FORWARD, LIBRARY, OURS, TORCH
from reporting.result_files import ResultError

COLOURS = {OURS: "#1b7837", TORCH: "#5b7fa6", LIBRARY: "#c2702b"}
ROW_INCHES = 0.27  # height of one contender


def pyplot() -> Any:
    """matplotlib's drawing functions, without a screen; raises ResultError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ResultError("drawing needs matplotlib: pip install 'difftrain[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_entries(entries: list[dict[str, Any]], file: Path, title: str) -> Path:
    """Draw forward + backward (bar) and forward (tick) of every contender on every shape.

    Args:
        entries: of stage loss, as in a results file.
        file: the PNG to write, 1200 pixels wide.
        title: device and date.

    Raises:
        ResultError: nothing was timed, or matplotlib is missing.
    """
    plt = pyplot()
    shapes = list(dict.fromkeys((tuple(e["shape"]), e["dtype"]) for e in entries))
    panels = {s: _bars([e for e in entries if (tuple(e["shape"]), e["dtype"]) == s]) for s in shapes}
    if not any(bar["ms"] for bars in panels.values() for bar in bars):
        raise ResultError("nothing was timed, so there is nothing to draw")
    heights = [max(len(b) for b in list(panels.values())[i : i + 2]) + 3 for i in range(0, len(panels), 2)]
    figure, axes = plt.subplots(
        len(heights), 2, figsize=(12, ROW_INCHES * sum(heights) + 1.0), dpi=100, squeeze=False,
        height_ratios=heights, constrained_layout=True,
    )  # fmt: skip
    for ax, ((shape, dtype), bars) in zip(axes.flat, panels.items(), strict=False):
        _draw(ax, shape, dtype, bars)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    figure.suptitle(
        f"Loss and gradient: {title}\nbar: forward + backward, tick: forward alone; "
        "hatched: computes less than the whole loss",
        fontsize=11,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
    return file


def _bars(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One bar per contender, fastest first; those not timed come last with their reason."""
    bars = []
    for name in dict.fromkeys(e["contender"] for e in entries):
        mine = [e for e in entries if e["contender"] == name]
        times = {e["measure"]: e for e in mine}
        both, forward = times.get(BOTH, {}), times.get(FORWARD, {})
        bar = {k: mine[0][k] for k in ("contender", "family", "lacks", "outcome")}
        bars.append(
            bar
            | {k: both.get(k) for k in ("ms", "percent_of_limit", "times_the_products")}
            | {"forward_ms": forward.get("ms")}
        )
    return sorted(bars, key=lambda b: (b["ms"] is None, b["ms"] or 0.0))


def _draw(ax: Any, shape: tuple[int, ...], dtype: str, bars: list[dict[str, Any]]) -> None:
    timed = [b for b in bars if b["ms"]]
    widest = max((b["ms"] for b in timed), default=1.0)
    limits = [_limit(b) for b in timed]
    for row, bar in enumerate(bars):
        if bar["ms"] is None:
            ax.text(0.01 * widest, row, bar["outcome"][:58], va="center", fontsize=7, color="#777777")
            continue
        colour = COLOURS[bar["family"]]
        hatch = {"hatch": "////", "alpha": 0.55} if bar["lacks"] else {}
        ax.barh(row, bar["ms"], height=0.66, color=colour, edgecolor="white", **hatch)
        if bar["forward_ms"]:
            ax.plot([bar["forward_ms"]] * 2, [row - 0.33, row + 0.33], color="black", lw=1.2)
        ax.text(bar["ms"] + 0.012 * widest, row, _label(bar), va="center", fontsize=7.5)
    if limits:
        what = "limit" if len(shape) == 2 else "its products"
        ax.plot([limits[0]] * 2, [-0.55, len(timed) - 0.5], color="black", ls=":", lw=1)
        ax.text(limits[0], -0.62, what, fontsize=7.5, ha="center")
    ax.set_yticks(range(len(bars)), [b["contender"] for b in bars], fontsize=8)
    ax.set_ylim(len(bars) - 0.4, -1.3)
    ax.set_xlim(0, 1.32 * widest)  # room for the labels
    names = "N x V" if len(shape) == 2 else "N x D x V"
    ax.set_title(f"{names} = {' x '.join(map(str, shape))}, {dtype}", fontsize=9.5, loc="left")
    ax.set_xlabel("ms", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _limit(bar: dict[str, Any]) -> float:
    """The time of a bar that was at the limit, or took what the products take."""
    if bar["percent_of_limit"] is not None:
        return bar["ms"] * bar["percent_of_limit"] / 100
    return bar["ms"] / bar["times_the_products"]


def _label(bar: dict[str, Any]) -> str:
    ms = f"{bar['ms']:.3g}" if bar["ms"] < 1000 else f"{bar['ms']:,.0f}"
    if bar["percent_of_limit"] is not None:
        return f"{ms} ms, {bar['percent_of_limit']:.0f} %"
    return f"{ms} ms, {bar['times_the_products']:.2f} x"
