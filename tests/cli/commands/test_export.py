"""`spike-export export --format compressed-tensors`: the command, and what it refuses."""

import json
from pathlib import Path

import pytest

from spike_export.artifacts.recipe import save_recipe
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.cli_models import call
from tests.support.tiny.models import tiny_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint = open_checkpoint(str(write_hf(folder / "model", random_llama())))
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.03125), prefix=(0, 5))
    save_recipe(recipe, folder / "recipe.json")
    return folder


def test_it_writes_a_checkpoint_and_replaces_its_own(tmp_path: Path, inputs: Path) -> None:
    command = ("export", inputs / "model", "--recipe", inputs / "recipe.json", "--out", tmp_path / "out")
    for _ in range(2):
        outcome = call(*command, "--format", "compressed-tensors", "--dtype", "bfloat16")
        assert outcome.code == 0, outcome.err
        assert "linears: " in outcome.out
        assert outcome.out.splitlines()[-1] == f"checkpoint: {tmp_path / 'out'}"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["dtype"] == "bfloat16"
    (tmp_path / "out/notes.txt").write_text("mine")
    assert "is not a checkpoint that spike-export wrote" in call(*command, "--format", "compressed-tensors").error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-quantize",), "needs --recipe FILE"),
        (("--recipe", "RECIPE", "--logits", "last"), "--logits, --prefix-in and --number-format are of ONNX graphs"),
        (("--recipe", "RECIPE", "--kv-cache", "static", "--capacity", "9"), "are of ONNX graphs"),
        (("--recipe", "RECIPE", "--prefix-in", "attention"), "are of ONNX graphs"),
        (("--recipe", "RECIPE", "--number-format", "fp8"), "are of ONNX graphs"),
    ],
)
def test_options_of_a_graph_are_refused(tmp_path: Path, inputs: Path, options: tuple[str, ...], message: str) -> None:
    filled = [str(inputs / "recipe.json") if option == "RECIPE" else option for option in options]
    out = ("--out", tmp_path / "out", "--format", "compressed-tensors")
    assert message in call("export", inputs / "model", *filled, *out).error
    assert not (tmp_path / "out").exists()
