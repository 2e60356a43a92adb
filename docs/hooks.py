"""Hooks of `make docs`: they turn pages written for a code host into a site that stands alone.

A page links to files where they lie in the repository. On the site README.md is the home page, and
what a page links to outside docs/ lies in files/. The built pages fetch nothing from the network: the
browser is told so, and the build fails where a page would.
"""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME, DOCS, OTHERS = "README.md", "docs/", "files/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^()\s#]+")  # what a Markdown link names, without its anchor
ROLE = re.compile(r":(?:func|class|meth|attr|mod):(?=<code>)")
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' data: blob:">"""


def on_files(files, config):
    """Take the files outside docs/ that pages link to into the site, and what these link to."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = [source_of(file.src_uri) for file in files.documentation_pages()]
    for page in pages:  # which grows on the way
        for target in linked_files(page):
            if (ROOT / target).is_file() and files.get_file_from_path(address_of(target)) is None:
                path = str(ROOT / target)
                files.append(
                    File.generated(
                        config, address_of(target), abs_src_path=path, inclusion=InclusionLevel.NOT_IN_NAV
                    )
                )
                pages += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown, page, **_):
    """The page's text, with links to where their files lie on the site; the README's for the home page."""
    source, folder = source_of(page.file.src_uri), posixpath.dirname(page.file.src_uri)
    if source == HOME:
        markdown = (ROOT / HOME).read_text(encoding="utf-8")
    return LINK.sub(lambda m: posixpath.relpath(address_of(resolve(source, m[0])), folder or "."), markdown)


def on_page_content(html, **_):
    """Without the roles of reStructuredText, which docstrings hold for editors."""
    return ROLE.sub("", html).replace("::</p>", ":</p>")


def on_post_page(output, **_):
    """With the policy by which a browser loads nothing from elsewhere."""
    return output.replace("<head>", f"<head>\n{POLICY}", 1)


def on_post_template(output_content, **_):
    """The same for the page that says that there is no such page."""
    return on_post_page(output_content)


def on_post_build(config):
    """Fail where a built page, style sheet or script names something to fetch from the network."""
    from mkdocs.exceptions import PluginError

    for path in sorted(Path(config.site_dir).rglob("*")):
        if loads := remote_loads(path):
            raise PluginError(f"{path} would fetch {', '.join(loads)} from the network")


def source_of(address: str) -> str:
    """Where a page of the site lies in the repository."""
    if address == "index.md":
        return HOME
    return address.removeprefix(OTHERS) if address.startswith(OTHERS) else DOCS + address


def address_of(source: str) -> str:
    """Where a file of the repository lies on the site, before pages become HTML."""
    if source == HOME:
        return "index.md"
    return source.removeprefix(DOCS) if source.startswith(DOCS) else OTHERS + source


def resolve(source: str, link: str) -> str:
    """The file in the repository that a link of ``source`` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def linked_files(source: str) -> list[str]:
    """The files in the repository that a page's links name."""
    return [resolve(source, link) for link in LINK.findall((ROOT / source).read_text(encoding="utf-8"))]


class _Loads(HTMLParser):
    """Collects what a browser fetches when it opens a page; where a click leads to is none of it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "srcset", "poster", "data") or (tag, name) == ("link", "href"):
                parts = (value or "").split(",")  # of a srcset, each with a size behind it
                self.found += [part.split()[0] for part in parts if part.strip()]


STYLE_LOAD = re.compile(r"(?:url\(|@import\s+(?!url\())\s*[\"']?([^\"')\s]+)")
SCRIPT_LOAD = re.compile(r"(?:(?<!@)\bimport|importScripts|fetch)\s*\(?\s*[\"'`]([^\"'`]+)")


def remote_loads(path: Path) -> list[str]:
    """The addresses in the network that a built file makes a browser fetch."""
    if path.suffix not in (".html", ".css", ".js", ".svg") or not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    found = STYLE_LOAD.findall(text)
    if path.suffix != ".css":
        page = _Loads()
        page.feed(text if path.suffix != ".js" else "")
        found += page.found + SCRIPT_LOAD.findall(text)
    return [address for address in found if re.match(r"(?:https?:)?//", address, re.IGNORECASE)]
