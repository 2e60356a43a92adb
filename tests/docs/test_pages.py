"""What the pages must hold: the README's size, the list of pages, the options, the settings that are tested."""

import re

import pytest

from difftrain.config import options_table
from difftrain.reporting.health import KINDS, PAGE
from pages import NAMES, ROOT, anchors_of, links_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKS_WITH = (ROOT / "docs/works-with.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in WORKS_WITH.splitlines() if line.startswith("|")][2:]


def test_the_readme_has_at_most_200_lines():
    assert README.count("\n") <= 200


def test_the_readme_lists_every_page():
    listed = {target for target, _ in links_of(README.split("\n## Documentation\n")[1])}
    assert set(NAMES) - {"README.md", "docs/index.md"} <= listed


def test_the_options_page_holds_the_generated_table():
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    between = re.search(r"<!-- options -->\n(.*)\n<!-- end of options -->", page, re.DOTALL)
    assert between[1] == options_table(), "make options writes it"


@pytest.mark.parametrize(
    "setting",
    [
        "torch.library", "fullgraph", "Inductor", "floats", "eager calls", "dynamic shapes", "--compile step",
        "waits", "CUDA graphs", "autocast", "GradScaler", "DDP, FSDP2", "checkpointing", "vocabulary parallel",
        "DTensor", "no triton", "`kernels`, `transformers`", "get_local_kernel", "`Trainer`", "nanoGPT", "LLaDA",
    ],
)  # fmt: skip
def test_works_with_has_a_row_for_each_setting(setting):
    assert any(setting in row[0] for row in ROWS)


def test_every_row_of_works_with_names_a_test():
    """That the test exists, test_links.py sees."""
    assert len(ROWS) > 20
    for row in ROWS:
        assert any(title.startswith("test_") for _, title in links_of(row[-1])), row[0]


def test_the_changelog_keeps_its_form():
    """Keep a Changelog 1.1.0: versions, the newest first, and six kinds of changes in them."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in text.split("\n## ")[1:]:
        headings = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert set(headings) <= kinds
        assert len(set(headings)) == len(headings)
        for part in section.split("\n### ")[1:]:
            assert re.fullmatch(r"\w+\n\n(- .+\n(  .+\n)*)+\n?", part + "\n"), part.splitlines()[0]


def test_every_warning_of_a_run_has_a_section_that_says_what_to_do():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert {kind.anchor for kind in KINDS.values()} <= anchors_of(text)
    sections = text.split("\n## ")[1:]
    for kind in KINDS.values():
        (section,) = (s for s in sections if s.split("\n")[0].lower().replace(" ", "-") == kind.anchor)
        assert "\n> " in section  # the warning as it is told
        assert "\n- " in section  # what to do
