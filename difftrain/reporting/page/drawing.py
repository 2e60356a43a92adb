"""Drawing: lines or bands over steps as SVG, with both axes that a reader can switch between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 412, 8, 204  # where lines are drawn
MOST_POINTS = 600  # of a line; of more, the least and the greatest of each group are drawn
MOST_DOTS = 40  # points that are marked each by itself
TABLE_ROWS = 24

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Line:
    """Values over steps.

    Attributes:
        label: what it shows.
        points: (step, value) each, steps ascending, values finite.
        colour: number of the colour, 0 to 7; the page says which that is.
        style: "line", "dash", "dot" (dotted), or "faint" for what is noisy and lies behind the others.
        is_smooth: whether the page's smoothing is for it.
    """

    label: str
    points: Points
    colour: int
    style: str = "line"
    is_smooth: bool = False


@dataclass(frozen=True)
class Picture:
    """Lines over steps, or bands that lie on each other.

    Attributes:
        title: what it shows.
        unit: of the values.
        lines: what is drawn; of bands the lowest first, all over the same steps.
        note: one sentence for the reader.
        low, high: the ends of the axis of values, where the values do not choose them.
        is_stacked: whether the lines are bands.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    note: str = ""
    low: float | None = None
    high: float | None = None
    is_stacked: bool = False


@dataclass(frozen=True)
class Axis:
    """From a value to a place: ``at`` gives the share of the way from the low end to the high one."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends, at most so many."""
        if not self.is_log:
            return _linear_ticks(self.low, self.high, most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
            ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high * (1 + 1e-12)]
            if len(ticks) <= most:
                break
        else:
            ticks = ticks[:: -(-len(ticks) // most)]
        return ticks if len(ticks) > 1 else _linear_ticks(self.low, self.high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10, 20) if power * f >= rough)
    first = math.ceil(low / step - 1e-9)
    ticks = [(first + i) * step for i in range(most + 2)]
    return [tick for tick in ticks if tick <= high + 1e-9 * step]


def axis_of(
    values: Sequence[float], low: float | None, high: float | None, *, is_log: bool = False
) -> Axis:
    """An axis that shows all values; ``low`` and ``high`` are its ends where they are given."""
    least = min(values) if low is None else low
    most = max(values) if high is None else high
    if not least < most or most - least < 1e-9 * max(abs(least), abs(most)):
        room = 0.5 * abs(most) or 1.0
        least, most = (most / 2, 2 * most) if is_log else (least - room * (low is None), most + room)
    elif is_log:
        ratio = (most / least) ** 0.04
        least, most = least / ratio, most * ratio
    else:
        room = 0.04 * (most - least)
        least, most = least - room * (low is None), most + room * (high is None)
    return Axis(least, most, is_log)


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most so many points: of each group of neighbours the least and the greatest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        kept += sorted({min(group, key=lambda i: points[i][1]), max(group, key=lambda i: points[i][1])})
    return [points[i] for i in kept]


def rounded(value: float) -> float | int:
    """Five digits, which a picture never shows more of."""
    value = float(f"{value:.5g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def as_text(value: float | None) -> str:
    """A number for readers: four digits, thousands set apart."""
    if value is None:
        return "–"
    if abs(value) >= 1e4 and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def draw(picture: Picture, number: int) -> tuple[str, dict[str, Any]]:
    """A picture as HTML, and what the page's script needs to answer questions about it."""
    lines = [line for line in picture.lines if line.points]
    if not lines:
        return "", {}
    if picture.is_stacked:
        lines = _thin_bands(lines)
    else:
        lines = [Line(l.label, thinned(l.points), l.colour, l.style, l.is_smooth) for l in lines]  # noqa: E741
    values = [value for line in lines for _, value in line.points]
    steps = [step for line in lines for step, _ in line.points]
    x = Axis(min(steps), max(steps)) if max(steps) > min(steps) else Axis(min(steps) - 1, max(steps) + 1)
    y = axis_of(values, picture.low, picture.high)
    has_log = not picture.is_stacked and min(values) > 0
    log = axis_of(values, None, None, is_log=True) if has_log else None
    marks = (
        _bands(lines, x, y)
        if picture.is_stacked
        else [_line(line, i, x, y) for i, line in enumerate(lines)]
    )
    axes = [_grid(y, "linear"), *([_grid(log, "log")] if log else []), _steps(x)]
    name = escape(picture.title)
    html = f"""<figure id="picture-{number}" data-picture="{number}">
<figcaption><h3>{name}</h3>{'<button type="button" class="scale" aria-pressed="false" hidden>log axis</button>' if log else ""}</figcaption>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{name}, {escape(picture.unit)}, over steps. Arrow keys read the values; they stand as a table below, too.">
{"".join(axes)}
<text class="unit" x="{LEFT}" y="{HEIGHT - 4}">{escape(picture.unit)}</text>
<g class="marks">{"".join(marks)}</g>
<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>
</svg>
{_legend(lines, picture.is_stacked)}
<p class="readout" aria-live="polite">{escape(picture.note)}</p>
{_table(picture, lines)}
</figure>"""
    return html, {
        "id": number, "x": [x.low, x.high], "y": [y.low, y.high], "log": [log.low, log.high] if log else None,
        "stacked": picture.is_stacked, "note": picture.note,
        "lines": [
            {"label": l.label, "steps": [s for s, _ in l.points], "values": [rounded(v) for _, v in l.points],
             "smooth": l.is_smooth}
            for l in lines  # noqa: E741
        ],
    }  # fmt: skip


def _place(x: Axis, y: Axis, step: int, value: float) -> str:
    left = LEFT + x.at(step) * (RIGHT - LEFT)
    return f"{left:.1f} {BOTTOM - y.at(value) * (BOTTOM - TOP):.1f}"


def _line(line: Line, index: int, x: Axis, y: Axis) -> str:
    places = [_place(x, y, *point) for point in line.points]
    path = f'<path class="stroke {line.style}" d="M{"L".join(places)}"/>'
    if len(places) <= MOST_DOTS and line.style != "faint":
        path += f'<path class="dots" d="{"".join(f"M{place}h0" for place in places)}"/>'
    return f'<g class="c{line.colour}" data-line="{index}">{path}</g>'


def _thin_bands(lines: Sequence[Line]) -> list[Line]:
    """Bands over every n-th step, the first and the last among them."""
    count = len(lines[0].points)
    every = math.ceil(count / (MOST_POINTS // 2))
    kept = sorted({*range(0, count, every), count - 1})
    return [Line(line.label, [line.points[i] for i in kept], line.colour, line.style) for line in lines]


def _bands(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    below = [0.0] * len(lines[0].points)
    steps = [step for step, _ in lines[0].points]
    bands = []
    for i, line in enumerate(lines):
        above = [low + value for low, (_, value) in zip(below, line.points, strict=True)]
        there = [_place(x, y, *point) for point in zip(steps, above, strict=True)]
        back = [_place(x, y, *point) for point in zip(steps, below, strict=True)][::-1]
        if len(steps) == 1:  # a band needs a width
            there, back = ([f"{end} {place.split()[1]}" for end in ends] for place, ends in
                           ((there[0], (LEFT, RIGHT)), (back[0], (RIGHT, LEFT))))  # fmt: skip
        bands.append(
            f'<g class="c{line.colour} {line.style}" data-line="{i}"><path class="band" d="M{"L".join(there + back)}Z"/></g>'
        )
        below = above
    return bands


def _grid(y: Axis, kind: str) -> str:
    parts = []
    for tick in y.ticks():
        at = f"{BOTTOM - y.at(tick) * (BOTTOM - TOP):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{at}" dy=".35em">{_tick(tick)}</text>')
    return f'<g class="{kind}">{"".join(parts)}</g>'


def _steps(x: Axis) -> str:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>']
    for tick in x.ticks(5):
        if tick.is_integer():
            at = LEFT + x.at(tick) * (RIGHT - LEFT)
            end = " end" if at > RIGHT - 12 else ""
            parts.append(
                f'<text class="tick middle{end}" x="{min(at, RIGHT):.1f}" y="{BOTTOM + 15}">{_tick(tick)}</text>'
            )
    return "".join([*parts, f'<text class="unit end" x="{RIGHT}" y="{HEIGHT - 4}">step</text>'])


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1g}"


def _legend(lines: Sequence[Line], is_stacked: bool) -> str:
    if len(lines) < 2:
        return ""
    kind = "swatch-band" if is_stacked else "swatch"
    order = (
        list(enumerate(lines))[::-1] if is_stacked else enumerate(lines)
    )  # bands from the top, as they lie
    entries = [
        f'<li><button type="button" aria-pressed="true" data-line="{i}" class="c{line.colour} {line.style}">'
        f'<svg class="{kind}" viewBox="0 0 24 10" aria-hidden="true"><path d="M1 5h22"/></svg>{escape(line.label)}</button></li>'
        for i, line in order
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _table(picture: Picture, lines: Sequence[Line]) -> str:
    """The numbers at some steps, for who does not see the picture: of each line the last value up to there."""
    steps = sorted({step for line in lines for step, _ in line.points})
    count = min(len(steps), TABLE_ROWS)
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})
    head = "".join(f'<th scope="col">{escape(line.label)}</th>' for line in lines)
    rows = []
    for step in chosen:
        cells = []
        for line in lines:
            known = [value for at, value in line.points if at <= step]
            cells.append(f"<td>{as_text(known[-1] if known else None)}</td>")
        rows.append(f'<tr><th scope="row">{step:,}</th>{"".join(cells)}</tr>')
    return (
        f'<details><summary>numbers</summary><div class="scroll"><table><caption>{escape(picture.title)}, '
        f'{escape(picture.unit)}</caption><thead><tr><th scope="col">step</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
