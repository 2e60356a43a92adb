"""Write the tree of docs/architecture.md: a line a file, from git and the first line of each docstring.

    python docs/tree.py          # rewrites the page between its markers

tests/house/test_architecture.py holds the page to what this prints.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
MARKS = re.compile(r"(?s)(<!-- tree -->\n).*(<!-- end of tree -->)")
ROOMS = ("kernels", "difftrain", "benchmarks", "examples", "docs", "tests/support", "tests")
COLUMN = 46


def tracked(root: Path = ROOT) -> list[str]:
    """Paths of the Python files and pages that git tracks, in the order of the page."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *ROOMS], cwd=root, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split("\0") if name.endswith((".py", ".md"))]
    # Of the tests only what a person starts, and what they share: each test names itself.
    names = [n for n in names if not n.startswith("tests/") or n.count("/") == 1 or "/support/" in n]
    return sorted(names, key=lambda n: ([n.startswith(room) for room in ROOMS].index(True), _order(n)))


def _order(name: str) -> tuple:
    """Files of a folder before its folders, a package's own file first."""
    *folders, file = name.split("/")
    return *((1, part) for part in folders), (0, "" if file == "__init__.py" else file)


def summary(path: Path) -> str:
    """What the first line of a file says: of its docstring, or of a page's heading."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    docstring = ast.get_docstring(ast.parse(text))
    if not docstring:
        raise SystemExit(f"{path.relative_to(ROOT)} must begin with a docstring")
    return docstring.splitlines()[0].rstrip(".").replace("``", "")


def tree(names: list[str], root: Path = ROOT) -> str:
    """The tree as text."""
    lines, opened = ["```"], ""
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder != opened:
            lines.append(f"{folder}/")
            opened = folder
        lines.append(f"  {file}".ljust(COLUMN - 16) + f" {summary(root / name)}")
    return "\n".join([*lines, "```"])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda m: f"{m[1]}{tree(tracked())}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
