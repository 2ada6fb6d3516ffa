"""`check --parity`, `--clipping` and `--continuations`: verdict and JSON file, the module of a fault, and bad input."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import save_recipe
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.pipeline.checking.opened_pair import recipe_of
from tests.support.planted_faults import changed, planted
from tests.support.tiny.cli_models import SMALL, call, write_inputs
from tests.support.tiny.models import tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model`, `corpus.txt`, `recipe.json` and `bundle`."""
    folder = write_inputs(tmp_path_factory.mktemp("parity"))
    checkpoint = open_checkpoint(str(folder / "model"))
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.05))
    save_recipe(recipe, folder / "recipe.json")
    save_recipe(recipe.model_copy(update={"alpha": 2.0}), folder / "other.json")
    export_bundle(checkpoint, recipe, ExportOptions("float32"), folder / "bundle")
    return folder


def arguments(folder: Path, bundle: str = "bundle") -> tuple[str | Path, ...]:
    reference = ("--reference", folder / "model")
    return ("check", folder / bundle, *reference, "--parity", "--corpus", folder / "corpus.txt", *SMALL)


def test_a_sound_bundle_passes_and_the_file_says_so(folder: Path, tmp_path: Path) -> None:
    done = call(*arguments(folder), "--out", tmp_path / "parity.json")
    assert (done.code, done.err) == (0, "")
    document = json.loads((tmp_path / "parity.json").read_text())
    assert (document["format"], document["passed"], document["windows"], document["tokens"]) == (1, True, 2, 32)
    assert [link["outside"] for link in document["links"]] == [[], [], []]
    assert [row["place"] for row in document["quantization"]][-1] == "logits"
    assert "passed, all " in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines() if line.startswith("  "))


def test_the_module_of_a_fault_is_named_and_the_gate_missed(folder: Path) -> None:
    module = "model.layers.1.mlp.down_proj"
    planted(folder / "bundle", folder / "faulty", changed(f"{module}.weight", lambda weight: np.flip(weight, 0)))
    done = call(*arguments(folder, "faulty"))
    assert (done.code, done.err) == (1, "")
    assert f"  {module} (product of the linear): " in done.out


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    whole = arguments(folder)
    assert "was made by another recipe; give that one" in call(*whole, "--recipe", folder / "other.json").error
    assert "no such file" in call(*whole, "--recipe", folder / "none.json").error.lower()
    assert "needs --reference MODEL" in call("check", folder / "bundle", "--parity").error
    assert "omit --recipe" in call(*(each for each in whole if each != "--parity"), "--recipe", "r").error
    (tmp_path / "note.json").write_text("{}")
    assert "--overwrite" in call(*whole, "--out", tmp_path / "note.json").error
    (tmp_path / "short.txt").write_text("short")
    assert (
        "short.txt: "
        in call(*(tmp_path / "short.txt" if each == folder / "corpus.txt" else each for each in whole)).error
    )


def test_a_missing_recipe_is_asked_for(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(folder / "bundle", target_is_directory=True)
    whole = (tmp_path / "bundle" if each == folder / "bundle" else each for each in arguments(folder))
    assert "is not there; name it with --recipe" in call(*whole).error


def test_what_a_text_clips_is_told_and_written(folder: Path, tmp_path: Path) -> None:
    whole = ("check", folder / "bundle", "--clipping", folder / "corpus.txt", "--length", "32")
    done = call(*whole, "--out", tmp_path / "clipping.json")
    assert (done.code, done.err) == (0, "")
    document = json.loads((tmp_path / "clipping.json").read_text())
    assert (document["format"], document["text"], document["length"]) == (1, "corpus.txt", 31)
    first = document["inputs"][0]
    assert first["share"] == first["clipped"] / first["values"] > 0
    assert f"  {first['module'].removeprefix('model.')} " in done.out
    assert ("anew on such text is due" in done.out) is document["due"]
    assert "omit --reference" in call(*whole, "--reference", folder / "model").error
    assert "none.txt" in call("check", folder / "bundle", "--clipping", "none.txt").error
    assert "give a text" in call("check", folder / "bundle", "--clipping", "builtin:own-text").error


def test_continuations_stand_one_above_the_other(folder: Path, tmp_path: Path) -> None:
    whole = ("check", folder / "bundle", "--reference", folder / "model", "--corpus", folder / "corpus.txt", *SMALL)
    done = call(*whole, "--continuations", "5", "--out", tmp_path / "found.json")
    assert (done.code, done.err) == (0, "")
    document = json.loads((tmp_path / "found.json").read_text())
    assert (document["format"], document["tokens"], len(document["continuations"])) == (1, 5, 4)
    assert f"{document['equal']} of 4 continuations of 5 tokens are equal" in done.out
    assert done.out.count("  bundle: ") == 4
    assert done.out.count("  model:  ") == 4 - document["equal"]
    assert "at least 1" in call(*whole, "--continuations", "0").error


def test_the_recipe_of_an_earlier_version_belongs_to_its_bundle(folder: Path, tmp_path: Path) -> None:
    """It has the keys of then: its hash is that of the file."""
    manifest = load_manifest(folder / "bundle")
    text = json.dumps(json.loads((folder / "recipe.json").read_text()))
    (tmp_path / "recipe.json").write_text(text)
    source = manifest.model.model_copy(update={"recipe_sha256": hashlib.sha256(text.encode()).hexdigest()})
    earlier = manifest.model_copy(update={"model": source})
    assert recipe_of(tmp_path / "bundle", earlier, None) is not None
    with pytest.raises(ArtifactError, match="was made by another recipe"):
        recipe_of(tmp_path / "bundle", earlier, folder / "recipe.json")
