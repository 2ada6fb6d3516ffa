"""The documentation site builds without a warning, and its build fails on what is broken."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="MkDocs is not installed: pip install '.[docs]'"
)

WRITTEN = ("docs", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""What the site is made of; everything else is only linked to."""


def copied_project(folder: Path) -> Path:
    """Return a copy of the project in which pages can be changed."""
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for entry in ROOT.iterdir():
        if entry.name in WRITTEN and entry.is_file():
            shutil.copy(entry, folder)
        elif entry.name not in (*WRITTEN, ".git", ".venv", "build"):
            (folder / entry.name).symlink_to(entry)
    return folder


def build(project: Path) -> tuple[int, list[str]]:
    """Run what `make docs` runs; return its exit code and the lines that are more than information."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(project / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in lines if line and not line.startswith("INFO")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is; its build has no warning."""
    project = copied_project(tmp_path_factory.mktemp("site"))
    assert build(project) == (0, [])
    return project / "site"


def test_the_front_page_is_the_readme(site: Path) -> None:
    assert "<h1" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "source" / "LICENSE.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        tags = page.read_text(encoding="utf-8").split("<")[1:]
        loaded = [tag.partition(">")[0] for tag in tags if tag.startswith(("script", "link", "img", "iframe"))]
        assert [tag for tag in loaded if "//" in tag] == [], page


FAULTS = (
    ("docs/plans.md", "[x](nowhere1.md)", "nowhere1.md"),
    ("docs/plans.md", "[x](formats.md#nowhere2)", "#nowhere2"),
    ("docs/plans.md", "[x](../engines/nowhere3.py)", "nowhere3.py"),
    ("docs/plans.md", "[x][spike_export.nowhere4]", "spike_export.nowhere4"),
    ("README.md", "[x](docs/nowhere5.md)", "nowhere5.md"),
    ("docs/nowhere6.md", "# A page that the navigation lacks", "nowhere6.md"),
)
"""Page, line that is added to the page, and what the build has to name."""


def test_every_broken_link_is_named_and_fails_the_build(tmp_path: Path) -> None:
    project = copied_project(tmp_path)
    (project / "docs" / "python-api.md").write_text("# Python interface\n", encoding="utf-8")  # takes the most time
    for page, line, _ in FAULTS:
        with (project / page).open("a", encoding="utf-8") as text:
            text.write(f"\n{line}\n")
    code, said = build(project)
    assert code != 0
    assert [name for *_, name in FAULTS if not any(name in line for line in said)] == []


def test_a_documented_name_that_does_not_exist_fails_the_build(tmp_path: Path) -> None:
    project = copied_project(tmp_path)
    (project / "docs" / "python-api.md").write_text("::: spike_export.nowhere\n", encoding="utf-8")
    code, said = build(project)
    assert code != 0
    assert any("spike_export.nowhere" in line for line in said)
