"""Watching a text settle as a moving picture: the frames of showing.py as a GIF."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from difftrain.appearing import write_whole
from difftrain.errors import UserError, import_extra
from difftrain.reporting.page.writing import check_place
from difftrain.sampling.showing import (
    BACK,
    CAPTION,
    COLUMNS,
    FRESH,
    MASKED,
    SETTLED,
    WRONG,
    Frame,
    laid_out,
)

INKS = {
    MASKED: "#b8bec6",
    FRESH: "#0a7d32",
    BACK: "#c62828",
    SETTLED: "#1f2328",
    WRONG: "#8a4b00",
    CAPTION: "#57606a",
}
PAPER = "#ffffff"
GROUNDS = {FRESH: "#d2f4dc", BACK: "#ffdcd9", WRONG: "#ffe7a8"}  # behind words, since some are blanks
SIZE, MARGIN, LEADING = 15, 14, 1.3  # pixels of a letter, pixels around the text, lines apart
PASS_MS, LAST_MS = 130, 3000


def check_gif(path: Path) -> None:
    """That a picture can be written there, before the work.

    Raises:
        UserError: it is no .gif, it has no place, or the extra "plot" is missing.
    """
    check_place(path)
    if path.suffix != ".gif":
        raise UserError(f"gif must be a .gif file, got {path}")
    load_letters()


def write_gif(frames: list[Frame], path: Path, durations: list[int] | None = None) -> None:
    """The frames as a GIF that plays for ever.

    Args:
        durations: milliseconds for which each stays; None: the same for all but the last, on which it rests.

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
                if what in GROUNDS:
                    end = MARGIN + (column + len(text)) * width, place[1] + height - 1
                    pen.rectangle((place, end), fill=GROUNDS[what])
                pen.text(place, text, font=letters, fill=INKS[what])
                column += len(text)
        pictures.append(picture.quantize(palette=palette, dither=image.Dither.NONE))
    durations = durations or [PASS_MS] * (len(pictures) - 1) + [LAST_MS]
    out = io.BytesIO()
    pictures[0].save(
        out, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )
    write_whole(path, out.getvalue())


def _colours() -> list[tuple[int, ...]]:
    """Every ink in eight shades from its ground up to its own, as the edges of letters have them."""
    return [
        tuple(
            round(p + (c - p) * n / 8)
            for p, c in zip(_parts(GROUNDS.get(what, PAPER)), _parts(ink), strict=True)
        )
        for what, ink in INKS.items()
        for n in range(9)
    ]


def _parts(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def load_letters() -> Any:
    """The font; raises UserError where the extra is missing."""
    fonts = import_extra("matplotlib", "plot").get_data_path()
    return import_extra("PIL.ImageFont", "plot").truetype(f"{fonts}/fonts/ttf/DejaVuSansMono.ttf", SIZE)
