"""Files that spike-export did not write stay as they are, and a recipe edited by hand is kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny.cli_models import SMALL, artifacts, call, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return write_inputs(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """The work directory of a calibration, with a bundle of its recipe beside it."""
    assert call("calibrate", *calibrate(inputs, inputs / "run")).code == 0
    bundle = inputs / "run.bundle"
    recipe = inputs / "run" / "recipe.json"
    assert call("export", inputs / "model", "--recipe", recipe, "--out", bundle, "--dtype", "float32").code == 0
    return inputs / "run"


def calibrate(inputs: Path, run: Path) -> tuple[str | Path, ...]:
    return (inputs / "model", "--work-dir", run, "--corpus", inputs / "corpus.txt", *SMALL, "--dtype", "float32")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the calibrated work directory."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def foreign_project(folder: Path) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "years.js").write_text("let years", encoding="utf-8")
    (folder / "manifest.json").write_text('{"name": "years", "version": "1.0"}', encoding="utf-8")


def foreign_file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def foreign_json(path: Path) -> None:
    path.write_text('{"notes": ["mine"]}', encoding="utf-8")


PLACES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "export over another tool's manifest.json": (
        "web",
        foreign_project,
        ("export", "MODEL", "--no-quantize", "--out", "PLACE"),
    ),
    "export over a file": ("web", foreign_file, ("export", "MODEL", "--no-quantize", "--out", "PLACE")),
    "build over a model": ("model.gguf", foreign_file, ("build", "BUNDLE", "--out", "PLACE", "--target", "SM86")),
    "main job over a model": ("model.gguf", foreign_file, ("MODEL", "--out", "PLACE", *SMALL)),
    "the check's result over notes": (
        "notes.json",
        foreign_json,
        ("check", "BUNDLE", "--reference", "MODEL", "--corpus", "CORPUS", *SMALL, "--out", "PLACE"),
    ),
    "the linter's result over notes": ("notes.json", foreign_json, ("check", "BUNDLE", "--lint", "--out", "PLACE")),
}


def outcome_of(inputs: Path, command: tuple[str, ...], place: Path, *more: str) -> object:
    names = {
        "MODEL": inputs / "model",
        "BUNDLE": inputs / "run.bundle",
        "CORPUS": inputs / "corpus.txt",
        "PLACE": place,
    }
    return call(*(names.get(argument, argument) for argument in command), *more)


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", PLACES)
def test_a_foreign_file_stays(inputs: Path, tmp_path: Path, case: str, force: bool) -> None:
    name, write, command = PLACES[case]
    write(tmp_path / name)
    before = artifacts(tmp_path)
    outcome = outcome_of(inputs, command, tmp_path / name, *(["--force"] if force else []))
    assert f"{name}: exists and is not " in outcome.error  # type: ignore[attr-defined]
    assert "--overwrite" in outcome.error  # type: ignore[attr-defined]
    assert artifacts(tmp_path) == before


@pytest.mark.usefixtures("finished")
def test_the_graph_is_not_replaced_by_its_findings(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "run.bundle", tmp_path / "bundle")
    before = artifacts(tmp_path)
    outcome = call("check", tmp_path / "bundle", "--lint", "--out", tmp_path / "bundle" / "model.onnx")
    assert "model.onnx: exists and is not the linter's result" in outcome.error
    assert artifacts(tmp_path) == before


@pytest.mark.usefixtures("finished")
def test_a_sidecar_takes_no_foreign_name(inputs: Path, tmp_path: Path) -> None:
    foreign_json(tmp_path / "notes.json")
    outcome = call("build", inputs / "run.bundle", "--out", tmp_path / "notes.plan", "--target", "SM86")
    assert "notes.json: exists and is not the description of a plan that spike-export wrote" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.usefixtures("finished")
def test_overwriting_is_possible_and_ours_needs_no_permission(inputs: Path, tmp_path: Path) -> None:
    foreign_project(tmp_path / "web")
    command = ("export", inputs / "model", "--no-quantize", "--dtype", "float32", "--out", tmp_path / "web")
    assert call(*command, "--overwrite").code == 0
    assert not (tmp_path / "web" / "src").exists()
    assert call(*command).code == 0
    (tmp_path / "web" / "my_notes.txt").write_text("mine", encoding="utf-8")
    assert "web: exists and is not a bundle that spike-export wrote" in call(*command).error
    findings = tmp_path / "findings.json"
    for _ in range(2):
        assert call("check", tmp_path / "web", "--lint", "--out", findings).code in (0, 1)


def test_a_folder_with_a_foreign_report_is_no_work_directory(inputs: Path, tmp_path: Path) -> None:
    foreign_file(tmp_path / "report.html")
    outcome = call("calibrate", *calibrate(inputs, tmp_path))
    assert "report.html: exists and is not part of a run that spike-export wrote" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def edit(run: Path) -> str:
    """Keep one more linear in 16 bit, as a hand would; return the text."""
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    name = next(name for name, plan in recipe["modules"].items() if plan["precision"] == "int8")
    recipe["modules"][name] = {"precision": "float32", "reason": "mine"}
    text = json.dumps(recipe)
    (run / "recipe.json").write_text(text, encoding="utf-8")
    return text


@pytest.mark.parametrize("more", [(), ("--tolerance", "0.006"), ("--force",)])
def test_an_edited_recipe_is_kept_and_used(inputs: Path, run: Path, more: tuple[str, ...]) -> None:
    text = edit(run)
    outcome = call("calibrate", *calibrate(inputs, run), *more)
    assert outcome.code == 0, outcome.err
    assert "recipe: unchanged (edited by hand, and kept; --recompute recipe discards it)" in outcome.out
    assert "1 of" in outcome.out
    assert (run / "recipe.json").read_text(encoding="utf-8") == text


def test_a_recipe_of_ours_follows_the_options(inputs: Path, run: Path) -> None:
    before = (run / "recipe.json").read_bytes()
    outcome = call("calibrate", *calibrate(inputs, run), "--max-fp16-modules", "1")
    assert "edited" not in outcome.out
    assert (run / "recipe.json").read_bytes() != before


def test_an_edited_recipe_is_discarded_when_asked_for(inputs: Path, finished: Path, run: Path) -> None:
    text = edit(run)
    assert call("calibrate", *calibrate(inputs, run), "--recompute", "recipe").code == 0
    assert (run / "recipe.json.old").read_text(encoding="utf-8") == text
    assert (run / "recipe.json").read_bytes() == (finished / "recipe.json").read_bytes()


def test_a_recipe_in_a_folder_without_stamps_is_used(inputs: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "recipe.json", tmp_path)
    text = edit(tmp_path)
    outcome = call("calibrate", *calibrate(inputs, tmp_path))
    assert "edited by hand, and kept" in outcome.out
    assert (tmp_path / "recipe.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["spikes.safetensors", "spikes.json", "prefix.json", "smoothing.json"])
def test_a_damaged_statistic_is_made_again(inputs: Path, finished: Path, run: Path, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:40])
    assert call("calibrate", *calibrate(inputs, run)).code == 0
    assert (run / name).read_bytes() == (finished / name).read_bytes()
