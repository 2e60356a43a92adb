"""Watching a text settle: what each pass wrote and sent back, in the terminal or as a page on its own."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from difftrain.appearing import write_whole
from difftrain.data.vocabulary import Vocabulary

MASKED, FRESH, BACK, SETTLED = "masked", "fresh", "back", "settled"
WRONG, CAPTION = "wrong", "caption"  # in pictures of a trial: a planted error, and a line above the text
COLOURS = {MASKED: "\x1b[2m", FRESH: "\x1b[1;92m", BACK: "\x1b[91m", SETTLED: ""}
DELAY = 0.08  # seconds a pass stays in sight
COLUMNS = 80  # at most; narrower terminals get less


Frame = list[tuple[str, str]]
"""Runs of words with what has become of them: [(text, what)]."""


class Frames:
    """The passes of one text, as runs of words that share what has become of them.

    Attributes:
        frames: of each pass [(text, what)], where what is "masked", "fresh" (just written), "back" (just sent back to
            [MASK]) or "settled".
    """

    def __init__(self, sign: str):
        self.sign = sign
        self.frames: list[Frame] = []
        self._before: list[int] = []

    def __call__(self, ids: list[int], vocabulary: Vocabulary) -> None:
        """Take in the next pass."""
        mask_id, before = vocabulary.mask_id, self._before or ids
        self._before = ids
        what = [
            _what(now == mask_id, was == mask_id, now == was) for now, was in zip(ids, before, strict=True)
        ]
        runs = groupby(zip(ids, what, strict=True), key=lambda pair: pair[1])
        self.frames.append(
            [(vocabulary.decode([i for i, _ in run], mask=self.sign), key) for key, run in runs]
        )


class Terminal(Frames):
    """Frames that are drawn over one another on standard output while they come."""

    def __init__(self, sign: str):
        super().__init__(sign)
        self._height = 0

    def __call__(self, ids: list[int], vocabulary: Vocabulary) -> None:
        super().__call__(ids, vocabulary)
        size = shutil.get_terminal_size((COLUMNS, 24))
        width, height = max(1, min(COLUMNS, size.columns - 1)), max(1, size.lines - 1)
        lines = list(coloured_lines(self.frames[-1], width))[-height:]
        print(self._above() + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        self._height = len(lines)
        time.sleep(DELAY)

    def clear(self) -> None:
        """Take the last frame away, for the text itself."""
        print(self._above() + "\x1b[J", end="", flush=True)
        self._height = 0

    def _above(self) -> str:
        return f"\x1b[{self._height}A\r" if self._height else ""


def _what(is_masked: bool, was_masked: bool, is_same: bool) -> str:
    if is_masked:
        return MASKED if was_masked else BACK
    return SETTLED if is_same else FRESH


def laid_out(frame: Frame, width: int) -> Iterator[Frame]:
    """The frame's lines of at most ``width`` characters; what cannot be shown is U+FFFD."""
    line, n = [], 0
    for text, what in frame:
        pieces = text.expandtabs(4).split("\n")
        for i, piece in enumerate(pieces):
            if i:
                yield line
                line, n = [], 0
            while piece:
                if n == width:
                    yield line
                    line, n = [], 0
                part, piece = piece[: width - n], piece[width - n :]
                line.append(
                    ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in part), what)
                )
                n += len(part)
    yield line


def coloured_lines(frame: Frame, width: int) -> Iterator[str]:
    """Lines of at most ``width`` characters, coloured; each ends plain, so that any may stand alone."""
    for line in laid_out(frame, width):
        yield "".join(f"{COLOURS[what]}{text}\x1b[0m" if COLOURS[what] else text for text, what in line)


def write_page(frames: list[Frame], path: Path, title: str) -> None:
    """The frames as one HTML page that plays them and fetches nothing."""
    data = json.dumps(frames, ensure_ascii=True).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title), "FRAMES": data}
    page = re.sub(
        "TITLE|FRAMES", lambda name: parts[name[0]], PAGE
    )  # at once: a title may hold either word
    write_whole(path, page.encode("utf-8", "replace"))


def mask_sign() -> str:
    """What stands for [MASK] on the terminal: a shade where it can be shown, else a hash."""
    try:
        "\u2591".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "\u2591"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --fresh: #0a7d32; --back: #c62828; }
@media (prefers-color-scheme: dark) { :root { --fresh: #5fd38d; --back: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 15px/1.45 ui-monospace, monospace; min-height: 12rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.masked { opacity: .35; } .fresh { color: var(--fresh); font-weight: 700; } .back { color: var(--back); }
input { width: 100%; }
</style>
<h1>TITLE</h1>
<pre id="text"></pre>
<label>Pass <output id="pass"></output><input id="at" type="range" min="0" value="0"></label>
<p><button id="play">Pause</button> <span class="masked">&#9617; masked</span>, <span class="fresh">just written</span>,
<span class="back">&#9617; sent back</span></p>
<script>
const frames = FRAMES;
const [text, pass, at, play] = ["text", "pass", "at", "play"].map(id => document.getElementById(id));
at.max = frames.length - 1;
function show() {
  text.replaceChildren(...frames[at.value].map(([words, what]) => {
    const span = document.createElement("span");
    span.className = what;
    span.textContent = words;
    return span;
  }));
  pass.textContent = `${at.value} of ${at.max}`;
}
let timer = null;
function run(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => { at.value = (+at.value + 1) % frames.length; show(); }, 250) : null;
  play.textContent = on ? "Pause" : "Play";
}
play.onclick = () => run(!timer);
at.oninput = () => { run(false); show(); };
show();
run(!matchMedia("(prefers-reduced-motion: reduce)").matches);
</script>
</html>
"""
