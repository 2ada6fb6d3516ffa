"""The accuracy tables' command agrees with a script that shares no code with it."""

import ast
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy.unseen_text import AS_CHOSEN, Judge, evaluate
from spike_export.artifacts.recipe import HadamardPlan, ModulePlan, Recipe, save_recipe
from spike_export.calibration.decoder.equivalent.smoothing import smoothing_plan
from tests.independent import fake_quantization
from tests.support.tiny.models import TinyModel, input_scales, model_with_bos, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1
CONTENT = np.random.default_rng(0).integers(3, 99, (3, 24))
SMOOTHED = {"self_attn.q_proj": 48, "self_attn.o_proj": 32, "mlp.up_proj": 48, "mlp.down_proj": 80}
"""Linear that names an input → channels with scales of their own: two value heads of 16 for attention's output."""

PLANS: Mapping[str, Mapping[str, Any]] = {
    "model.layers.0.mlp.down_proj": {"activations": "per-token"},
    "model.layers.1.self_attn.o_proj": {"activations": "per-token"},
    "model.layers.1.mlp.down_proj": {"precision": "float32", "activation_scale": None, "reason": "kept"},
    "model.layers.0.self_attn.v_proj": {"precision": "float32", "weights": "int8", "activations": None},
}
"""What is not INT8 with a constant scale."""


@pytest.fixture(scope="module")
def model() -> TinyModel:
    tiny = tiny_llama()
    tiny.reference.config.bos_token_id = BOS
    return model_with_bos(tiny, BOS)


def recipe_of(model: TinyModel, prefix: tuple[int, ...]) -> Recipe:
    """Return a recipe of every kind of plan, whose scales cover a part of what the inputs reach."""
    draw = np.random.default_rng(1)
    scales = {name: scale * 0.4 for name, scale in input_scales(model, CONTENT).items()}
    plain = tiny_recipe(model.checkpoint, scales, prefix=prefix)
    plans: dict[str, ModulePlan] = {
        name: plan.model_copy(update=PLANS.get(name, {})) for name, plan in plain.modules.items()
    }
    smoothing = {
        f"model.layers.{layer}.{name}": smoothing_plan(
            "smoothquant", 0.5, np.exp2(draw.normal(0, 0.5, channels)).astype(np.float32)
        )
        for layer in (0, 1)
        for name, channels in SMOOTHED.items()
    }
    return plain.model_copy(update={"modules": plans, "smoothing": smoothing})


def document(recipe: Recipe, folder: Path) -> dict[str, Any]:
    save_recipe(recipe, folder / "recipe.json")
    found: dict[str, Any] = json.loads((folder / "recipe.json").read_text())
    return found


def increase(model: TinyModel, recipe: dict[str, Any]) -> float:
    plain, quantized = fake_quantization.compared(copy.deepcopy(model.reference), recipe, CONTENT)
    return quantized / plain - 1


@pytest.mark.parametrize(("prefix", "block"), [((), None), ((BOS, 5), 16), ((5,), None)])
def test_both_compute_the_same_cost(
    model: TinyModel, tmp_path: Path, prefix: tuple[int, ...], block: int | None
) -> None:
    recipe = recipe_of(model, prefix)
    if block is not None:
        rotated = {f"model.layers.{layer}.self_attn.o_proj": block // 2 for layer in (0, 1)}
        spread = {"model.layers.0.self_attn.q_proj": block, "model.layers.1.mlp.up_proj": block // 2}
        changes = {"hadamard": HadamardPlan(block=block), "value_rotation": rotated, "input_hadamard": spread}
        recipe = recipe.model_copy(update=changes)
    judge = Judge(model.checkpoint, {"text": CONTENT})
    ((*_, measured),) = evaluate(judge, {"recipe": recipe}, [AS_CHOSEN])
    found = increase(model, document(recipe, tmp_path))
    assert found == pytest.approx(measured.increase.mean, rel=1e-3)
    assert abs(found) > 0.005, "a cost that shows"


def test_faults_show(model: TinyModel, tmp_path: Path) -> None:
    """One doubled scale, two swapped ones and a wrong prefix each change the cost by more than the two may differ."""
    recipe = document(recipe_of(model, (BOS, 5)), tmp_path)
    sound = increase(model, recipe)

    def changed(**plans: float) -> dict[str, Any]:
        modules = {**recipe["modules"]}
        for name, scale in plans.items():
            modules[name] = {**modules[name], "activation_scale": scale}
        return {**recipe, "modules": modules}

    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    of = {name: recipe["modules"][name]["activation_scale"] for name in (q, up)}
    prefix = {**recipe, "prefix": {**recipe["prefix"], "token_ids": [BOS, 6]}}
    for fault in (changed(**{q: 2 * of[q]}), changed(**{q: of[up], up: of[q]}), prefix):
        assert abs(increase(model, fault) - sound) > 1e-2 * abs(sound)


def test_the_script_imports_nothing_of_the_project() -> None:
    tree = ast.parse(Path(fake_quantization.__file__).read_text())
    names = [each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names}.isdisjoint({"spike_export", "benchmarks", "tests"})
