"""Export: the same bytes in every process, one line for every fault, and nothing half-written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.artifacts.recipe import Prefix, Recipe, load_recipe, save_recipe
from spike_export.calibration.decoder.equivalent.smoothing import smoothing_plan
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import planted_spike_llama, state, write_weights
from tests.support.tiny.cli_models import artifacts, call, write_model
from tests.support.tiny.models import tiny_recipe

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a recipe with a prefix, smoothing and a module in 16 bit."""
    folder = tmp_path_factory.mktemp("robust")
    checkpoint = open_checkpoint(str(write_model(folder / "model")))
    recipe = tiny_recipe(
        checkpoint, dict.fromkeys(linears(checkpoint.config), 0.5), kept={DOWN: "float16"}, prefix=(1, 3)
    )
    width = checkpoint.config.intermediate_size
    scales = np.exp2(np.random.default_rng(0).uniform(-2, 2, width)).astype(np.float32)
    smoothing = {"model.layers.0.mlp.down_proj": smoothing_plan("smoothquant", 0.5, scales)}
    save_recipe(recipe.model_copy(update={"smoothing": smoothing}), folder / "recipe.json")
    return folder


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables


_EXPORTS = """
import sys
from pathlib import Path
from spike_export.artifacts.recipe import load_recipe, save_recipe
from spike_export.cli.main import run

whole = load_recipe(Path("recipe.json"))
recipes = {
    "whole": whole,
    "plain": whole.model_copy(update={"prefix": None, "smoothing": {}}),
    "prefix": whole.model_copy(update={"smoothing": {}}),
    "smoothing": whole.model_copy(update={"prefix": None}),
}
for name, recipe in recipes.items():
    save_recipe(recipe, Path(name + ".json"))
for out, options in {
    "int8": ["--recipe", "plain.json"],
    "fp8": ["--recipe", "plain.json", "--number-format", "fp8"],
    "prefix": ["--recipe", "prefix.json"],
    "smoothing": ["--recipe", "smoothing.json"],
    "whole-fp8": ["--recipe", "whole.json", "--number-format", "fp8"],
    "unquantized": ["--no-quantize"],
}.items():
    code = run(["export", "model", "--out", str(Path("out") / out), "--quiet", *options])
    assert code == 0, (out, code)
"""


@pytest.mark.usefixtures("one_thread")
def test_processes_with_other_hash_seeds_in_other_folders_write_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the processes is this one, whose hashes have another seed, or a random one."""
    here, elsewhere = (shutil.copytree(folder, tmp_path / place) for place in ("here", "some/where/else"))
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    done = subprocess.run(
        [sys.executable, "-c", _EXPORTS],
        cwd=elsewhere,
        env=environment(PYTHONHASHSEED=seed, TMPDIR=str(elsewhere)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    exec(_EXPORTS, {})
    found = [artifacts(work / "out") for work in (here, elsewhere)]
    first, second = found
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    # And they are different bundles, none of which says where it was made.
    weights = {name: hashlib.sha256(first[f"{name}/model.onnx.data"]).hexdigest() for name in ("int8", "fp8")}
    graphs = {content for name, content in first.items() if name.endswith("model.onnx")}
    assert len(set(weights.values())) == 2
    assert len(graphs) == 6
    assert not [name for name, content in first.items() if str(tmp_path).encode() in content]


def other_weights(folder: Path) -> None:
    write_weights(folder / "model", state(planted_spike_llama(7)))


def unknown_module(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.json")
    modules = {**recipe.modules, "model.layers.7.mlp.up_proj": recipe.modules[DOWN]}
    save_recipe(recipe.model_copy(update={"modules": modules}), folder / "recipe.json")


def unknown_rope(folder: Path) -> None:
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 10000.0}
    path.write_text(json.dumps(config))


def missing_tensor(folder: Path) -> None:
    tensors = state(planted_spike_llama())
    del tensors[f"{DOWN}.weight"]
    write_weights(folder / "model", tensors)


def infinite_tensor(folder: Path) -> None:
    """Found only while the bundle is written."""
    tensors = state(planted_spike_llama())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.full_like(tensors[name], torch.inf)
    write_weights(folder / "model", tensors)
    recipe: Recipe = load_recipe(folder / "recipe.json")
    checkpoint = open_checkpoint(str(folder / "model"))
    source = recipe.model.model_copy(update={"sha256": checkpoint.tensors.sha256()})
    save_recipe(recipe.model_copy(update={"model": source, "prefix": None}), folder / "recipe.json")


def foreign_prefix(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.json")
    prefix = Prefix(token_ids=(99_999,), text="?", ratio=1.0)
    save_recipe(recipe.model_copy(update={"prefix": prefix}), folder / "recipe.json")


FAULTS: Mapping[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "weights": (other_weights, ("the recipe was made for tiny", "sha256", "calibrate this model")),
    "module": (unknown_module, ("model.layers.7.mlp.up_proj", "no linear of this decoder; remove it")),
    "rope": (unknown_rope, ("config.json", "spiral", "supported")),
    "tensor": (missing_tensor, (f"tensor {DOWN}.weight is missing", "incomplete")),
    "infinity": (infinite_tensor, ("tensor model.layers.0.mlp.up_proj.weight", "NaN or infinity", "download it again")),
    "prefix": (foreign_prefix, ("token 99999", "vocabulary", "prefix.token_ids")),
}

PREVIOUS_BUNDLE = '{"format": 1, "model": {}, "kv_cache": "dynamic", "linears": {}}'
"""A manifest with the mark of one that export wrote."""


@pytest.mark.parametrize("name", FAULTS)
def test_one_line_says_what_is_wrong(folder: Path, tmp_path: Path, name: str) -> None:
    spoil, parts = FAULTS[name]
    work = shutil.copytree(folder, tmp_path / "work")
    (work / "bundle").mkdir()
    (work / "bundle" / "manifest.json").write_text(PREVIOUS_BUNDLE)
    spoil(work)
    before = artifacts(work)
    line = call("export", work / "model", "--recipe", work / "recipe.json", "--out", work / "bundle", "--quiet").error
    for part in parts:
        assert part in line
    assert artifacts(work) == before


_ON_A_FULL_DISK = """
import os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
from spike_export.cli.main import run
from tests.support.tiny.cli_models import artifacts

disk = Path("disk")
command = ["export", "model", "--recipe", "recipe.json", "--out", str(disk / "bundle"), "--quiet"]
assert run(command) == 0
before = artifacts(disk)
free = shutil.disk_usage(disk).free
(disk / "filling").write_bytes(bytes(free - 100_000))
assert run(command) == 2
# A disk that fills up meanwhile: the look at it beforehand found room.
shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 40)
for number_format in ("int8", "fp8"):
    assert run([*command, "--number-format", number_format]) == 2
(disk / "filling").unlink()
assert artifacts(disk) == before
assert [path.name for path in disk.iterdir()] == ["bundle"]
"""


def test_a_full_disk_keeps_the_previous_bundle(folder: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to mount a small disk with")
    shutil.copytree(folder, tmp_path / "work")
    (tmp_path / "work" / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=70m none disk || exit 77; exec "$@"'
    unshared = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    options: Any = {"cwd": tmp_path / "work", "capture_output": True, "text": True, "check": False}
    if subprocess.run([*unshared, "true"], **options).returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    root = Path(__file__).parents[2]
    paths = environment(PYTHONPATH=os.pathsep.join([str(root), *filter(None, sys.path)]))
    done = subprocess.run([*unshared, sys.executable, "-c", _ON_A_FULL_DISK], env=paths, **options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert lines[0].startswith("spike-export: error: disk/bundle: the bundle needs ")
    assert lines[0].endswith(" are free; free space there or choose another place")
    for line in lines[1:]:
        assert line.startswith("spike-export: error: disk/bundle: cannot write: ")
        assert line.endswith("full: free space there or choose another place") or "the disk is full; free" in line
