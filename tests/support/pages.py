"""The pages that people read, README.md and docs/*.md: their blocks of code, code words and links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]

HIDDEN = r"^<!-- run\n(?P<hidden>.*?)^-->$"
FENCE = r"^(?:<!-- (?P<mark>run|not run: .+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$"
BLOCK = re.compile(f"{HIDDEN}|{FENCE}", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE_WORDS = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
LINK = re.compile(r'\]\((?P<target>[^()\s]+)(?: "(?P<title>[^"]*)")?\)')


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden one: ``mark`` is "run", "not run: ..." or empty; ``line`` counts from 1."""

    page: str
    line: int
    language: str
    code: str
    mark: str


def blocks_of(page: str, text: str) -> list[Block]:
    """All blocks of a page in reading order."""
    blocks = []
    for match in BLOCK.finditer(text):
        group = "code" if match["hidden"] is None else "hidden"
        line = text.count("\n", 0, match.start(group)) + 1
        language = match["language"] if group == "code" else "python"
        mark = (match["mark"] or "") if group == "code" else "run"
        blocks.append(Block(page, line, language, match[group], mark))
    return blocks


def prose_of(text: str) -> str:
    """A page without its blocks and comments."""
    return COMMENT.sub("", BLOCK.sub("", text))


def code_words_of(text: str) -> list[str]:
    """What stands in single backticks in the prose."""
    return [" ".join(words.split()) for words in CODE_WORDS.findall(prose_of(text))]


def links_of(text: str) -> list[tuple[str, str]]:
    """Target and title of each link and picture in the prose."""
    prose = CODE_WORDS.sub("", prose_of(text))
    return [(link["target"], link["title"] or "") for link in LINK.finditer(prose)]


def anchors_of(text: str) -> set[str]:
    """The anchors that a code host gives a page's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", BLOCK.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        repeats = 0
        while name in anchors:
            repeats += 1
            name = f"{anchor}-{repeats}"
        anchors.add(name)
    return anchors
