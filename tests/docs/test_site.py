"""The built site: what would fetch something from the network fails the build, and so does a broken link."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from pages import ROOT

spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://example.org/a.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//example.org/a.css">'),
        ("a.html", '<img alt="" srcset="a.png 1x, https://example.org/b.png 2x">'),
        ("a.html", '<style>@import "https://example.org/a.css";</style>'),
        ("a.html", '<p style="background: url(https://example.org/a.png)">'),
        ("a.html", '<script>import("https://example.org/a.js")</script>'),
        ("a.css", "@font-face { src: url('https://example.org/a.woff2') }"),
        ("a.css", "@import url(https://example.org/a.css);"),
        ("a.js", 'importScripts("https://example.org/a.js")'),
        ("a.js", "const a = await fetch(`https://example.org/a`)"),
    ],
)
def test_what_would_be_fetched_from_the_network_is_seen(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (address,) = hooks.remote_loads(tmp_path / name)
    assert "//example.org/" in address


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<a href="https://example.org">there</a> <script src="a.js"></script>'),
        (
            "a.css",
            "a { background: url(data:image/svg+xml;charset=utf-8,<svg xmlns=http://www.w3.org/2000/svg>) }",
        ),
        ("a.js", '/*! see https://example.org */ fetch("search_index.json")'),
        ("a.md", '<script src="https://example.org/a.js"></script>'),
    ],
)
def test_what_is_local_or_takes_a_click_is_not(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert hooks.remote_loads(tmp_path / name) == []


@pytest.mark.parametrize(
    ("source", "link", "address"),
    [
        ("README.md", "docs/loss.md", "loss.md"),
        ("docs/loss.md", "../README.md", "index.md"),
        ("docs/loss.md", "compile.md", "compile.md"),
        ("docs/gpu.md", "../benchmarks/NOTES.md", "files/benchmarks/NOTES.md"),
        ("benchmarks/NOTES.md", "results/a.json", "files/benchmarks/results/a.json"),
    ],
)
def test_a_link_of_the_repository_has_its_place_on_the_site(source, link, address):
    assert hooks.address_of(hooks.resolve(source, link)) == address
    assert hooks.source_of(hooks.address_of(source)) == source


# Builds, where make docs has installed what they take -------------------------------------------------

needs_mkdocs = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="needs the extra docs",
)


def build(folder, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", str(site)],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@needs_mkdocs
def test_the_site_is_built_and_every_page_forbids_the_network(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {"index.html", "api.html", "loss.html"} <= {page.name for page in pages}
    assert all(hooks.POLICY in page.read_text(encoding="utf-8") for page in pages)
    home, api = ((tmp_path / name).read_text(encoding="utf-8") for name in ("index.html", "api.html"))
    assert "The loss as a drop-in" in home
    assert 'id="difftrain.fused_linear_diffusion_loss"' in api
    for left in (":func:", ":class:", ":meth:", "::</p>", "<blockquote>"):
        assert left not in api
    for picture in ("demo-curves.png", "demo-repair.gif"):
        assert (tmp_path / "files/benchmarks/results" / picture).is_file()


@needs_mkdocs
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[x](no_such_page.md)", "'no_such_page.md', but the target is not found"),
        ("[x](options.md#no-such-heading)", "does not contain an anchor '#no-such-heading'"),
        ("::: difftrain.no_such_name", "difftrain.no_such_name could not be found"),
        ('<img alt="" src="https://example.org/a.png">', "would fetch https://example.org/a.png"),
    ],
)
def test_a_broken_page_fails_the_build(tmp_path, text, reason):
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "site")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    with (tmp_path / "copy/docs/gpu.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{text}\n")
    done = build(tmp_path / "copy", tmp_path / "site")
    assert done.returncode != 0
    assert reason in done.stderr
