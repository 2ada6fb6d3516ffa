"""What is installed, what it needs, and which part may know which."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.licences import LicenceError, licence_of, licences, table

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: Mapping[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]

ROOT_FOLDER = "api"
"""The folder that is installed as `spike_export` itself."""

NOT_INSTALLED = {"tests", "benchmarks", "docs", "build", "dist"}
PINNED_EXTRAS = ("rtx", "corpora", "dev", "docs")


def folders_with_code() -> set[str]:
    """Folders, relative to the root, that hold Python files and are no tool's or test's."""
    tops = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    modules = [path for top in tops if top.name not in NOT_INSTALLED for path in top.rglob("*.py")]
    return {path.parent.relative_to(ROOT).as_posix() for path in modules}


def package_files() -> set[str]:
    """Path in the wheel of every file that the package is made of."""
    suffixes = {".py", ".j2", ".css", ".html", ".typed"}
    files = [path for folder in FOLDERS.values() for path in (ROOT / folder).iterdir()]
    kept = [path for path in files if path.suffix in suffixes or path.name == "py.typed"]
    return {f"spike_export/{path.relative_to(ROOT).as_posix().removeprefix(f'{ROOT_FOLDER}/')}" for path in kept}


def test_every_folder_with_code_is_a_listed_package() -> None:
    assert set(FOLDERS.values()) == folders_with_code()
    inner = [folder for folder in FOLDERS.values() if folder != ROOT_FOLDER]
    assert set(FOLDERS) == {"spike_export", *(f"spike_export.{folder.replace('/', '.')}" for folder in inner)}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_every_package_is_typed_and_seen_by_type_checkers(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()
    assert (ROOT / folder / "py.typed").is_file()
    seen = ROOT / ".links" / "spike_export" / ("" if folder == ROOT_FOLDER else folder) / "__init__.py"
    assert seen.resolve() == ROOT / folder / "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that no build leftovers land in the work tree or come from it."""
    place = tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, place / folder, ignore=ignored, dirs_exist_ok=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, place)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(place / "dist")]
    finished = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (built,) = (place / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_file(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name for name in names if name.startswith("spike_export/")} == package_files()
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_installs_one_name_only(wheel: zipfile.ZipFile) -> None:
    """Top-level packages named `export` or `cli` exist elsewhere and would be overwritten."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    metadata = f"spike_export-{PYPROJECT['project']['version']}.dist-info"
    assert tops == {"spike_export", metadata}


def test_the_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "spike-export = spike_export.cli.main:main" in wheel.read(name).decode()


def pins() -> dict[str, str]:
    """Canonical name → version of every line of constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pinned = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert pinned, f"{line}: expected name==version, without hosts, paths or local version tags"
            assert canonicalize_name(pinned[1]) not in found, f"{line}: pinned twice"
            found[canonicalize_name(pinned[1])] = pinned[2]
    return found


def direct_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = [line for extra in PINNED_EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


@pytest.mark.parametrize("extra", ["corpora", "serve", "polygraphy"])
def test_dev_brings_what_the_tests_of_an_extra_need(extra: str) -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras[extra]) <= set(extras["dev"])


def test_constraints_satisfy_the_declared_ranges() -> None:
    pinned = pins()
    for requirement in direct_requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pinned {version}"


def test_constraints_pin_all_that_is_installed_with_the_project() -> None:
    """A dependency of a dependency that is not pinned would make two installations differ."""
    pinned = pins()
    needed = closure(direct_requirements())
    assert sorted(needed - set(pinned)) == []
    assert sorted(set(pinned) - needed) == []


def closure(requirements: list[Requirement]) -> set[str]:
    """Canonical names of the requirements and of whatever they require, here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += required_by(name, extras)
    return {name for name, _ in seen}


def required_by(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed, so that its own requirements are unknown")
    for requirement in map(Requirement, lines):
        environments = [dict(default_environment()) | {"extra": extra} for extra in extras or {""}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def test_every_dependency_has_an_accepted_licence_and_the_page_lists_it() -> None:
    try:
        found = licences()
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed, so that its licence is unknown")
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    assert page.endswith(table(found)), "run make licences"


@pytest.mark.parametrize(
    ("package", "metadata", "expression"),
    [
        ("a", {"License-Expression": ["MIT AND BSD-3-Clause"]}, "MIT AND BSD-3-Clause"),
        ("a", {"License": ["Copyright ..."], "Classifier": ["License :: OSI Approved :: MIT License"]}, "MIT"),
        ("tensorrt-rtx-cu13", {"License": ["Proprietary"]}, "LicenseRef-NVIDIA-Proprietary"),
        ("a", {"License": ["Proprietary"]}, None),
        ("a", {"License-Expression": ["MIT AND AGPL-3.0"]}, None),
        ("a", {"Classifier": ["Programming Language :: Python"]}, None),
        ("a", {}, None),
    ],
)
def test_an_unknown_licence_is_refused(package: str, metadata: dict[str, list[str]], expression: str | None) -> None:
    if expression is not None:
        assert licence_of(package, metadata) == expression
        return
    with pytest.raises(LicenceError, match="a: its metadata say"):
        licence_of(package, metadata)


def check_imports(links: Path) -> subprocess.CompletedProcess[str]:
    """Run the import contracts of pyproject.toml over the packages below `links`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(links)}
    return subprocess.run([*command, *config], cwd=links, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A copy of all packages, as one tree."""
    for folder in sorted(FOLDERS.values(), key=lambda folder: folder.count("/")):
        place = tmp_path / "spike_export" / ("" if folder == ROOT_FOLDER else folder)
        shutil.copytree(ROOT / folder, place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return tmp_path


def test_imports_go_down_only() -> None:
    finished = check_imports(ROOT / ".links")
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize(
    ("module", "upward"),
    [
        ("artifacts/recipe.py", "from spike_export.checkpoint.modules import split_name"),
        ("calibration/decoder/heap.py", "def f():\n    from spike_export.calibration.statistics import spikes"),
        ("engines/plan/paths.py", "if TYPE_CHECKING:\n    from spike_export.engines.audit import verdict"),
        ("engines/lint/finding.py", "import spike_export.engines.plan.header"),
        ("export/graph/norm.py", "import spike_export.cli.main"),
    ],
)
def test_an_upward_import_is_found(packages: Path, module: str, upward: str) -> None:
    file = packages / "spike_export" / module
    file.write_text(f"{file.read_text(encoding='utf-8')}\n{upward}\n", encoding="utf-8")
    finished = check_imports(packages)
    assert finished.returncode == 1, finished.stdout
    assert f"spike_export.{module.removesuffix('.py').replace('/', '.')}" in finished.stdout


def test_a_loop_between_siblings_is_found(packages: Path) -> None:
    file = packages / "spike_export" / "checkpoint" / "checkpoint.py"
    upward = "from spike_export.checkpoint import gguf_file"
    file.write_text(f"{file.read_text(encoding='utf-8')}\n{upward}\n", encoding="utf-8")
    finished = check_imports(packages)
    assert finished.returncode == 1, finished.stdout


def imported_names(source: str) -> set[str]:
    """The top-level names that a module imports anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_what_is_installed_imports_neither_tests_nor_benchmarks(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert not imported_names(path.read_text(encoding="utf-8")) & NOT_INSTALLED, path


MACHINE_PATH = re.compile(r"""(?<![\w.~$}/:])/(?:home|root|tmp|opt|work|Users|mnt)/\w""")


def project_files() -> list[Path]:
    """Files that are or would be committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        pytest.skip("not a git work tree")
    files = [ROOT / name for name in finished.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def test_no_file_names_a_place_on_one_machine() -> None:
    wrong = []
    for file in project_files():
        text = file.read_bytes().decode(errors="replace")
        wrong += [
            f"{file.relative_to(ROOT)}: {line.strip()}" for line in text.splitlines() if MACHINE_PATH.search(line)
        ]
    assert wrong == []


@pytest.mark.parametrize("line", ['open("%s/x")', "cd %s/y", "PATH=%s/z"])
@pytest.mark.parametrize("folder", ["home", "root", "tmp"])
def test_a_machine_path_is_found(line: str, folder: str) -> None:
    assert MACHINE_PATH.search(line % f"/{folder}")
    assert not MACHINE_PATH.search(f"docs/{folder}/x")
