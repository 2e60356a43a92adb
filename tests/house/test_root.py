"""The root is a table of contents: what lies there is on a written list, and nothing tracked is large."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"kernels", "difftrain", "benchmarks", "tests", "examples", "docs", ".ci"}
FILES = {
    "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "CONTRIBUTING.md", "Makefile",
    "pyproject.toml", "constraints.txt", "mkdocs.yml", ".gitignore", ".pre-commit-config.yaml",
}  # fmt: skip
LARGEST_FILE = 1 << 20  # bytes
MOST_LINES = 350  # of a module


@pytest.fixture(scope="module")
def tracked():
    """What git tracks, as paths relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name]


def test_the_root_holds_only_what_is_on_the_list(tracked):
    assert {path.parts[0] for path in tracked} - FOLDERS - FILES == set()


def test_no_tracked_file_is_larger_than_a_mebibyte(tracked):
    sizes = {str(path): (ROOT / path).stat().st_size for path in tracked if (ROOT / path).is_file()}
    assert {path: size for path, size in sizes.items() if size > LARGEST_FILE} == {}


def test_a_module_is_short_enough_to_read_from_top_to_bottom(tracked):
    modules = [path for path in tracked if path.suffix == ".py" and path.parts[0] != "tests"]
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}
