"""Links in README.md and docs/*.md lead to files, headings and tests that exist, and so do paths named there."""

import re

import pytest

from pages import NAMES, PAGES, ROOT, anchors_of, code_words_of, links_of

PATH = re.compile(r"(?:benchmarks|difftrain|docs|examples|kernels|tests)/[\w./-]*")


def problems_of(page, text):
    """What is wrong with the links and paths of a page that lies at ``page``."""
    problems = []
    for target, title in links_of(text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.is_file() or not path.is_relative_to(ROOT):
            problems.append(f"no file {target}")
            continue
        content = text if path == page else path.read_text(encoding="utf-8") if anchor or title else ""
        if anchor and anchor not in anchors_of(content):
            problems.append(f"no heading {target}")
        if title and f"def {title}(" not in content:
            problems.append(f"no test {title} in {name}")
    for words in code_words_of(text):
        if PATH.fullmatch(words) and not (ROOT / words).exists():
            problems.append(f"no file `{words}`")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_paths_lead_to_what_exists(page):
    assert problems_of(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[x](docs/no_such_page.md)", "no file docs/no_such_page.md"),
        ("![x](benchmarks/results/no.png)", "no file benchmarks/results/no.png"),
        ("[x](../README.md)", "no file ../README.md"),
        ("[x](docs)", "no file docs"),
        ("[x](docs/loss.md#no-such-heading)", "no heading docs/loss.md#no-such-heading"),
        ("# Here\n[x](#there)", "no heading #there"),
        (
            '[x](tests/docs/test_links.py "test_no_such")',
            "no test test_no_such in tests/docs/test_links.py",
        ),
        ("see `benchmarks/no.py`", "no file `benchmarks/no.py`"),
        ("# Here, `x`: all!\n[x](#here-x-all) [y](https://example.org) `docs/loss.md`", None),
        ("```python\n[x](no)\n```\n<!-- [x](no) --> `[x](no)`", None),
    ],
)
def test_a_dead_link_is_seen_and_a_living_one_is_not(text, problem):
    assert problems_of(ROOT / "README.md", text) == ([problem] if problem else [])


def test_headings_that_repeat_get_numbers():
    assert anchors_of("# A b\n## A b\n```\n# c\n```\n### A-b") == {"a-b", "a-b-1", "a-b-2"}
