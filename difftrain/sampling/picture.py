"""Watching a text settle as a moving picture: the frames of showing.py as a GIF."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from difftrain.appearing import write_whole
from difftrain.errors import import_extra
from difftrain.sampling.showing import BACK, COLUMNS, FRESH, MASKED, SETTLED, Frame, laid_out

INKS = {MASKED: "#b8bec6", FRESH: "#0a7d32", BACK: "#c62828", SETTLED: "#1f2328"}
PAPER = "#ffffff"
SIZE, MARGIN, LEADING = 15, 14, 1.3  # pixels of a letter, pixels around the text, lines apart
PASS_MS, LAST_MS = 130, 3000


def write_gif(frames: list[Frame], path: Path) -> None:
    """The frames as a GIF that plays for ever and rests on the last.

    Raises:
        UserError: the extra "plot" is missing, whose Pillow draws it in the fixed-width letters of its matplotlib.
    """
    image, draw = import_extra("PIL.Image", "plot"), import_extra("PIL.ImageDraw", "plot")
    letters = load_letters()
    width, height = letters.getlength("0"), round(SIZE * LEADING)
    lines = [list(laid_out(frame, COLUMNS)) for frame in frames]
    columns = max((sum(len(t) for t, _ in line) for page in lines for line in page), default=1)
    size = (
        2 * MARGIN + max(1, round(columns * width)),
        2 * MARGIN + max(len(page) for page in lines) * height,
    )
    pictures, palette = [], image.new("P", (1, 1))
    palette.putpalette([part for colour in _colours() for part in colour])
    for page in lines:
        picture = image.new("RGB", size, PAPER)
        pen = draw.Draw(picture)
        for row, line in enumerate(page):
            column = 0
            for text, what in line:
                place = (MARGIN + column * width, MARGIN + row * height)
                pen.text(place, text, font=letters, fill=INKS[what])
                column += len(text)
        pictures.append(picture.quantize(palette=palette, dither=image.Dither.NONE))
    durations = [PASS_MS] * (len(pictures) - 1) + [LAST_MS]
    out = io.BytesIO()
    pictures[0].save(
        out, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )
    write_whole(path, out.getvalue())


def _colours() -> list[tuple[int, ...]]:
    """The paper, and every ink in eight shades up to its own, as the edges of letters have them."""
    paper, *inks = ([int(ink[i : i + 2], 16) for i in (1, 3, 5)] for ink in (PAPER, *INKS.values()))
    shades = [
        tuple(round(p + (c - p) * n / 8) for p, c in zip(paper, ink, strict=True))
        for ink in inks
        for n in range(1, 9)
    ]
    return [tuple(paper), *shades]


def load_letters() -> Any:
    """The font; raises UserError where the extra is missing."""
    fonts = import_extra("matplotlib", "plot").get_data_path()
    return import_extra("PIL.ImageFont", "plot").truetype(f"{fonts}/fonts/ttf/DejaVuSansMono.ttf", SIZE)
