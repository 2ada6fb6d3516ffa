"""Hooks of the documentation site: pages from the project's root, and links that lead out of `docs/`.

README, CONTRIBUTING, CHANGELOG and SECURITY lie at the root, where code hosts and PyPI look for them. The site shows
the same files. A link to a file of the project that is no page leads to a copy of that file; MkDocs reports a link to
nothing.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""File at the root → its page."""

_LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, and a copy of every file of the project that some page links to."""
    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page in files.documentation_pages():
        for target in map(_project_path, _targets(page)):
            copy = _copy_of(target)
            if copy and files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page's text with links as the site needs them."""
    return _LINK.sub(lambda link: _site_link(page.file, link["target"]) + (link["anchor"] or ""), markdown)


def _targets(page: File) -> list[tuple[File, str]]:
    return [(page, link["target"]) for link in _LINK.finditer(page.content_string)]


def _project_path(link: tuple[File, str]) -> str:
    """Return what a link of a page means, as a path from the project's root."""
    page, target = link
    place = "" if page.src_uri in ROOT_PAGES.values() else posixpath.join(DOCS, posixpath.dirname(page.src_uri))
    return posixpath.normpath(posixpath.join(place, target))


def _copy_of(target: str) -> str | None:
    """Return where the site has a copy of a file of the project; None for pages, and for what does not exist."""
    outside = not target.startswith(f"{DOCS}/") and target not in ROOT_PAGES
    return f"source/{target}.txt" if outside and (ROOT / target).is_file() else None


def _site_link(page: File, target: str) -> str:
    meant = _project_path((page, target))
    place = _copy_of(meant) or ROOT_PAGES.get(meant) or meant.removeprefix(f"{DOCS}/")
    return posixpath.relpath(place, posixpath.dirname(page.src_uri) or ".")
