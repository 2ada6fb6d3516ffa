"""Documents nested deeper than a parser can follow: one line, not a fault of the program."""

import shutil
from pathlib import Path

import pytest

from tests.support.tiny.cli_models import call, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    model = write_model(folder / "model")
    assert call("export", model, "--no-quantize", "--dtype", "float32", "--out", folder / "bundle").code == 0
    return folder


CASES = {
    "model/config.json": ("export", "model", "--no-quantize", "--out", "other"),
    "model/model.safetensors.index.json": ("export", "model", "--no-quantize", "--out", "other"),
    "bundle/generation_config.json": ("generate", "bundle", "--prompt", "12", "--max-new-tokens", "1"),
    "bundle/manifest.json": ("generate", "bundle", "--prompt", "12", "--max-new-tokens", "1"),
    "run/check.json": ("report", "run"),
    "run/spikes.json": ("report", "run"),
    "run/recipe.json": ("inspect", "run"),
}


@pytest.mark.parametrize("file", CASES)
def test_a_deep_document_is_one_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    shutil.copytree(place, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    Path(file).parent.mkdir(exist_ok=True)
    if file.endswith("index.json"):
        (weights,) = Path("model").glob("*.safetensors")
        weights.rename("model/part.safetensors")
    Path(file).write_text(DEEP, encoding="utf-8")
    # A report leaves out what it cannot read; here nothing is left.
    named = "run: nothing to report" if CASES[file][0] == "report" else Path(file).name
    assert named in call(*CASES[file]).error


def test_a_deep_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f"a = {DEEP}", encoding="utf-8")
    assert "job.toml: not a TOML file" in call("model", "--out", "x.plan", "--config", tmp_path / "job.toml").error
