"""The recipe's file: what a hand may change, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spike_export.calibration.errors import ArtifactError, RecipeError
from spike_export.calibration.recipe import (
    CorpusSource,
    CurvePoint,
    ModelSource,
    ModulePlan,
    Prefix,
    PrefixCandidate,
    Recipe,
    Scheme,
    Search,
    load_recipe,
    recipe_text,
    save_recipe,
)

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def recipe() -> Recipe:
    candidate = PrefixCandidate(token_ids=(), text="", worst_module=DOWN, ratio=900.0, verdict="higher perplexity")
    return Recipe(
        model=ModelSource(source="tiny", architecture="llama", sha256="ab"),
        corpus=CorpusSource(name="c", sha256="cd", samples=2, length=8, seed=0),
        scheme=Scheme(),
        alpha=21.25,
        prefix=Prefix(token_ids=(0, 5, 12), text="<s>é\n", ratio=3.5),
        modules={
            UP: ModulePlan(precision="int8", activation_scale=0.03125, ratio=3.1),
            DOWN: ModulePlan(precision="float16", ratio=2134.1, reason="ratio > alpha"),
        },
        search=Search(
            reference_perplexity=11.5,
            curve=(CurvePoint(fp16_modules=0, alpha=2134.1, perplexity=25.0),),
            prefixes=(candidate,),
        ),
    )


def test_the_file_round_trips_and_is_readable(tmp_path: Path) -> None:
    save_recipe(recipe(), tmp_path / "recipe.json")
    text = (tmp_path / "recipe.json").read_text(encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.json") == recipe()
    assert text == recipe_text(recipe())
    assert "<s>é" in text  # letters, not escapes
    assert max(len(line) for line in text.splitlines()) < 120
    document = json.loads(text)
    assert list(document)[:6] == ["format", "model", "corpus", "scheme", "alpha", "prefix"]
    assert document["modules"][UP]["activation_scale"] == 0.03125
    assert list(document["modules"]) == [UP, DOWN]


@pytest.mark.parametrize("scale", [1 / 3, 1e-8, 8.0000001, 0.1])
def test_a_scale_keeps_every_bit(tmp_path: Path, scale: float) -> None:
    changed = recipe().model_copy(update={"modules": {UP: ModulePlan(precision="int8", activation_scale=scale)}})
    save_recipe(changed, tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json").modules[UP].activation_scale == scale


def test_a_diverged_perplexity_round_trips(tmp_path: Path) -> None:
    point = CurvePoint(fp16_modules=0, alpha=1.0, perplexity=math.inf)
    save_recipe(recipe().model_copy(update={"search": Search(curve=(point,))}), tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json").search.curve == (point,)


def test_what_is_kept_and_the_prefix() -> None:
    assert recipe().kept() == (DOWN,)
    assert recipe().prefix_ids == (0, 5, 12)
    assert recipe().model_copy(update={"prefix": None}).prefix_ids == ()


def test_a_recipe_does_not_change_under_its_reader() -> None:
    with pytest.raises(ValidationError):
        recipe().alpha = 3.0  # type: ignore[misc]


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(recipe_text(recipe()))
    change(document)
    return json.dumps(document)


def test_a_hand_edit_is_obeyed(tmp_path: Path) -> None:
    def keep_it(document: dict[str, Any]) -> None:
        document["modules"][UP] = {"precision": "bfloat16", "reason": "I say so"}
        document["prefix"] = None

    (tmp_path / "recipe.json").write_text(edited(keep_it))
    read = load_recipe(tmp_path / "recipe.json")
    assert read.kept() == (UP, DOWN)
    assert read.prefix_ids == ()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(alhpa=3), "alhpa: Extra inputs are not permitted"),
        (lambda d: d["modules"][UP].update(activation_scal=1), f"modules.{UP}.activation_scal: Extra inputs"),
        (lambda d: d["scheme"].update(weight="x"), "scheme.weight: Extra inputs"),
        (lambda d: d["prefix"].update(tokens=[1]), "prefix.tokens: Extra inputs"),
        (lambda d: d["modules"][UP].update(precision="int4"), f"modules.{UP}.precision: Input should be 'int8'"),
        (lambda d: d["modules"][UP].pop("activation_scale"), f"modules.{UP}: Value error, precision int8 needs an"),
        (lambda d: d["modules"][UP].update(activation_scale=0), f"modules.{UP}.activation_scale: "),
        (lambda d: d["modules"][UP].update(activation_scale=-1.0), f"modules.{UP}.activation_scale: "),
        (lambda d: d["modules"][UP].update(activation_scale=math.nan), f"modules.{UP}.activation_scale: "),
        (lambda d: d["modules"][UP].update(activation_scale=math.inf), f"modules.{UP}.activation_scale: "),
        (lambda d: d["prefix"].update(token_ids=[]), "prefix.token_ids: "),
        (lambda d: d["prefix"].update(token_ids=["a"]), "prefix.token_ids.0: "),
        (lambda d: d.update(format=2), "format: Input should be 1"),
        (lambda d: d.pop("model"), "model: Field required"),
        (lambda d: d.update(modules=[]), "modules: "),
    ],
)
def test_a_slip_of_the_hand_is_refused_and_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], place: str
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(edited(change))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {place}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe: No such file"):
        load_recipe(tmp_path / "recipe.json")


def test_a_recipe_that_cannot_be_written_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError):
        save_recipe(recipe(), tmp_path / "file" / "recipe.json")
