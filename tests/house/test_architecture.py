"""docs/architecture.md against the house: its tree, its order of rooms, the files it names."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE = runpy.run_path(str(ROOT / "docs" / "tree.py"))
IMPORTS = runpy.run_path(str(ROOT / "tests" / "house" / "test_imports.py"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_tree_is_what_git_tracks_with_each_files_first_line():
    shown = PAGE.split("<!-- tree -->\n")[1].split("\n<!-- end of tree -->")[0]
    assert shown == TREE["tree"](TREE["tracked"]()), "run make tree"


def test_the_rooms_stand_on_the_page_in_the_order_that_imports_follow():
    listed = re.search(r"none imports a later one:\s+([\w,\s]+?)\.", PAGE)[1]
    rooms = [room for room in IMPORTS["TRAINER"] if not room.startswith("__") and room != "hf_kernel"]
    assert re.split(r",\s+", listed) == rooms


def test_every_file_that_the_page_names_exists():
    text = PAGE.split("## The tree")[0]
    names = re.findall(r"`((?:kernels|difftrain|tests|benchmarks|docs)/[\w./]*)`", text)
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists(), name
