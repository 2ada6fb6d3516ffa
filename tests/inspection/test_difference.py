"""Two runs compared: choices, modules, and accuracy paired over the windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.recipe import ModulePlan, Prefix, Recipe, save_recipe
from spike_export.checkpoint.modules import linears
from spike_export.inspection.difference import difference
from tests.support.check_costs import cost_document
from tests.support.tiny.cli_models import call
from tests.support.tiny.models import tiny_llama, tiny_recipe

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    checkpoint = tiny_llama().checkpoint
    return tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.05))


def run(folder: Path, recipe: Recipe, losses: list[float] | None = None, windows: str = "a") -> Path:
    """Write a run's recipe and, with the losses of its windows, its check."""
    folder.mkdir()
    save_recipe(recipe, folder / "recipe.json")
    if losses is not None:
        corpus = {"name": "text", "windows": len(losses), "windows_sha256": windows}
        variant = {"name": "shipped", "perplexity": 2.0, "shipped": True}
        cost = cost_document(0.02, 0.01, 0.9, 0.05, losses=losses)
        document: dict[str, Any] = {"format": 2, "corpus": corpus, "reference": {"perplexity": 2.0}}
        (folder / "check.json").write_text(json.dumps({**document, "variants": [{**variant, "cost": cost}]}))
    return folder


def test_equal_runs_differ_in_nothing(recipe: Recipe, tmp_path: Path) -> None:
    found = difference(run(tmp_path / "a", recipe), run(tmp_path / "b", recipe))
    assert (found.choices, found.modules, found.accuracy, found.ratio) == ((), (), (), 1.0)
    assert found.compared == 14


def test_prefix_precision_and_ratio_are_told(recipe: Recipe, tmp_path: Path) -> None:
    kept = {**recipe.modules, DOWN: ModulePlan(precision="float16", ratio=13.0, reason="ratio > alpha")}
    other = recipe.model_copy(
        update={"modules": kept, "prefix": Prefix(token_ids=(1, 5), text="a\n", ratio=3.0), "alpha": 9.0}
    )
    found = difference(run(tmp_path / "a", recipe), run(tmp_path / "b", other))
    assert found.choices == (
        ("prefix", "none", r"[1, 5] 'a\n'"),
        ("threshold", "none", "ratio above 9"),
        ("modules kept", "0", "1"),
    )
    (module,) = found.modules
    assert (module.module, module.first, module.second) == (DOWN, "int8, static", "float16")
    assert (module.ratio, module.scale) == (4.0, None)


def test_the_change_of_the_perplexity_is_paired_over_the_windows(recipe: Recipe, tmp_path: Path) -> None:
    """The windows differ by far more than the runs do: only the pairs show the difference."""
    losses = np.array([1.0, 3.0, 2.0, 4.0])
    steps = np.array([0.010, 0.012, 0.008, 0.010])
    first = run(tmp_path / "a", recipe, losses.tolist())
    (found,) = difference(first, run(tmp_path / "b", recipe, (losses + steps).tolist())).accuracy
    assert found.change is not None
    assert found.change.mean == pytest.approx(np.expm1(0.01))
    assert found.change.margin == pytest.approx(3.1824 * steps.std(ddof=1) / 2 * np.exp(0.01), rel=1e-4)
    shuffled = run(tmp_path / "c", recipe, (losses + steps)[::-1].tolist())
    (unpaired,) = difference(first, shuffled).accuracy
    assert unpaired.change is not None
    assert unpaired.change.margin > 100 * found.change.margin, "a wrong pairing shows"


def test_other_windows_are_not_paired(recipe: Recipe, tmp_path: Path) -> None:
    first = run(tmp_path / "a", recipe, [1.0, 2.0])
    (found,) = difference(first, run(tmp_path / "b", recipe, [1.0, 2.0], windows="b")).accuracy
    assert found.change is None
    (older,) = difference(first, run(tmp_path / "c", recipe, [])).accuracy
    assert older.change is None


def test_the_command_prints_tables_and_json(recipe: Recipe, tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", recipe, [1.0, 2.0]), run(tmp_path / "b", recipe, [1.1, 2.1])
    done = call("diff", first, second)
    assert (done.code, done.err) == (0, "")
    assert "made the same choices" in done.out
    assert "+10.52 +/- 0.00 %" in done.out
    document = json.loads(call("diff", first, second, "--json").out)
    assert document["accuracy"][0]["change"]["mean"] == pytest.approx(np.expm1(0.1))
    assert sorted(document) == ["accuracy", "choices", "compared", "format", "modules", "ratio"]


def test_bad_input_is_one_line(recipe: Recipe, tmp_path: Path) -> None:
    first = run(tmp_path / "a", recipe)
    assert "has no recipe.json; give a folder that calibrate wrote" in call("diff", first, tmp_path).error
    fewer = {name: plan for name, plan in recipe.modules.items() if name != DOWN}
    with pytest.raises(ArtifactError, match=rf"different models: only one of them has the module {DOWN}"):
        difference(first, run(tmp_path / "b", recipe.model_copy(update={"modules": fewer})))
