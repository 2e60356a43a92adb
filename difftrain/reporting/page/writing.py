"""Writing the report: a run, or several side by side, as one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from difftrain import __version__
from difftrain.appearing import write_whole
from difftrain.errors import UserError
from difftrain.progress import progress
from difftrain.reporting.lines import REPORT
from difftrain.reporting.page.drawing import BOTTOM, LEFT, RIGHT, TOP, Picture, draw
from difftrain.reporting.page.pictures import comparison_of, pictures_of
from difftrain.reporting.page.texts import (
    comparison_parts,
    facts_part,
    opening_part,
    samples_part,
    warnings_part,
)
from difftrain.reporting.runs import RunFolder, read_run

COMPARISON = "comparison.html"


def write_report(
    run_dirs: Sequence[Path], out: Path | None = None, *, allow_different_validation: bool = False
) -> Path:
    """Write what one run did, or how several compare, as one HTML file; returns its path.

    The runs may be under way. The page is below 2 MB whatever their length: of a line at most 600 points
    are drawn, the least and the greatest of each group of neighbours.

    Args:
        run_dirs: the runs' folders.
        out: the file; by default ``report.html`` in the one run's folder, for several ``comparison.html`` here.
        allow_different_validation: draw runs together that were measured on different validation sets.

    Raises:
        UserError: not a run folder, no records yet, a file that is no .html, or runs whose figures do not compare.
    """
    if out is not None and out.suffix != ".html":
        raise UserError(f"out must be a .html file, got {out}")
    if len({run_dir.resolve() for run_dir in run_dirs}) < len(run_dirs):
        raise UserError("each run must be named once")
    runs = [read_run(run_dir) for run_dir in progress(run_dirs, what="reading runs", unit="run")]
    if len(runs) == 1:
        title, sections = f"Run {runs[0].name}", pictures_of(runs[0])
        before = [opening_part(runs[0]), warnings_part(runs[0])]
        after = [samples_part(runs[0]), facts_part(runs[0])]
        out = out or run_dirs[0] / REPORT
    else:
        _check_validation(runs, allow_different_validation)
        names = _names(runs)
        title, sections = f"Comparison of {len(runs)} runs", comparison_of(runs, names)
        before, after = comparison_parts(runs, names)
        out = out or Path(COMPARISON)
    drawn, data = _draw(sections)
    page = _page(title, "\n".join([*before, *drawn, *after]), data)
    write_whole(out, page.encode("utf-8", "replace"))  # a name may hold what UTF-8 does not
    return out


def _check_validation(runs: Sequence[RunFolder], is_allowed: bool) -> None:
    """Raise UserError where runs were not measured on one validation set, and are not to be compared so."""
    ids = {run.name: run.validation_ids[-1:] for run in runs}
    first, *rest = runs
    for run in rest:
        if run.validation_ids[-1:] != first.validation_ids[-1:] and not is_allowed:
            a, b = ("".join(ids[r.name]) or "none" for r in (first, run))
            raise UserError(
                f"{first.path} and {run.path} were measured on different validation sets ({a} and {b}), so that "
                "their figures do not compare; --allow_different_validation draws them together nevertheless"
            )


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its folder's, or its whole path where two folders have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _draw(sections: dict[str, list[Picture]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The sections as HTML, without what has nothing to show, and what the script knows of each picture."""
    parts, data = [], []
    with progress(what="drawing", unit="picture", total=sum(map(len, sections.values()))) as bar:
        for heading, pictures in sections.items():
            figures = []
            for picture in pictures:
                html, known = draw(picture, len(data))
                bar.update()
                if html:
                    figures.append(html)
                    data.append(known)
            if figures:
                parts.append(
                    f'<section><h2>{heading}</h2><div class="pictures">{"".join(figures)}</div></section>'
                )
    return parts, data


def _page(title: str, body: str, pictures: list[dict[str, Any]]) -> str:
    folder = resources.files("difftrain.reporting.page")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    box = {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    data = json.dumps({"box": box, "pictures": pictures}, allow_nan=False, separators=(",", ":"))
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        body=body,
        # In a script's text only these could end it.
        data=data.replace("<", "\\u003c").replace(">", "\\u003e"),
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M"),
    )


def _digest(text: str) -> str:
    """By which the page's policy lets this script or style run, and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def check_place(out: Path) -> None:
    """Raise UserError where no page can be written, before the work that it is to show."""
    home = next(folder for folder in out.absolute().parents if folder.exists())
    if out.is_dir() or not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        what = "is a folder" if out.is_dir() else f"lies in {home}, which cannot be written to"
        raise UserError(f"a page must have a place of its own, and {out} {what}")
