"""The recipe's file: what a hand may change, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.recipe import (
    AttentionPlan,
    CorpusSource,
    CurvePoint,
    HadamardPlan,
    ModelSource,
    ModulePlan,
    Prefix,
    PrefixCandidate,
    Recipe,
    RotationPlan,
    Scheme,
    Search,
    SmoothingPlan,
    load_recipe,
    recipe_text,
    save_recipe,
)

UP = "model.layers.0.mlp.up_proj"
GATE = "model.layers.0.mlp.gate_proj"
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
    assert max(len(line) for line in text.splitlines()) < 125
    document = json.loads(text)
    assert list(document)[:7] == ["format", "model", "corpus", "scheme", "alpha", "criterion", "prefix"]
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


ATTENTION = "model.layers.0.self_attn"


def full_recipe() -> Recipe:
    """Every optional part in use."""
    changes = {
        "scheme": Scheme(excluded_weights="int8", unquantized="bfloat16"),
        "modules": {
            UP: ModulePlan(precision="int8", activations="per-token", ratio=3.1),
            DOWN: ModulePlan(precision="bfloat16", weights="int8", ratio=2134.1, reason="ratio > alpha"),
        },
        "attention": {ATTENTION: AttentionPlan(query=0.25, key=1 / 3, value=0.5)},
        "rotation": RotationPlan(kind="hadamard", seed=5),
        "smoothing": {UP: SmoothingPlan(form="smoothquant", parameter=0.5, exponents="AAj4")},
        "value_rotation": {f"{ATTENTION}.o_proj": 64},
        "input_hadamard": {UP: 32},
    }
    return Recipe.model_validate(recipe().model_dump() | changes)


def test_every_part_round_trips_a_line_per_entry(tmp_path: Path) -> None:
    save_recipe(full_recipe(), tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json") == full_recipe()
    lines = (tmp_path / "recipe.json").read_text(encoding="utf-8").splitlines()
    assert f'  "{UP}": {{"precision": "int8", "activations": "per-token", "ratio": 3.1}},' in lines
    assert f'  "{UP}": {{"form": "smoothquant", "parameter": 0.5, "exponents": "AAj4"}}' in lines
    assert any(line.startswith(f'  "{ATTENTION}": {{"query": 0.25, "key": 0.333') for line in lines)


def test_only_static_int8_needs_scales() -> None:
    document = full_recipe().model_dump()
    document["modules"][UP]["activations"] = "static"
    with pytest.raises(ValidationError, match="precision int8 with static activations needs an activation_scale"):
        Recipe.model_validate(document)
    document["modules"][UP]["activation_scale"] = 0.5
    Recipe.model_validate(document)


def test_the_kind_alone_decides_whether_a_scale_is_used() -> None:
    both = ModulePlan(precision="int8", activations="per-token", activation_scale=0.5)
    assert (both.per_token, both.static_scale) == (True, None)
    static = both.model_copy(update={"activations": "static"})
    assert (static.per_token, static.static_scale) == (False, 0.5)
    kept = both.model_copy(update={"precision": "float16"})
    assert (kept.per_token, kept.static_scale) == (False, None)
    assert ModulePlan(precision="fp8", activation_scale=0.5).activations == "static"
    mixed = recipe().model_copy(update={"modules": {UP: both, DOWN: static, GATE: kept}})
    assert mixed.activations() == "1 static, 1 per-token"
    assert mixed.model_copy(update={"modules": {UP: both}}).activations() == "per-token"
    assert mixed.model_copy(update={"modules": {UP: kept}}).activations() == "unquantized"


def first_format(activations: str | None, modules: dict[str, Any]) -> str:
    """A document as the first format wrote it."""
    document = recipe().model_dump(mode="json") | {"format": 1, "modules": modules}
    if activations is not None:
        document["scheme"]["activations"] = activations
    return json.dumps(document)


def test_a_recipe_of_the_first_format_keeps_its_meaning(tmp_path: Path) -> None:
    """There the scheme said it of all modules; without a scale, a module of a dynamic scheme had one per token."""
    path = tmp_path / "recipe.json"
    scaled, unscaled = {"precision": "int8", "activation_scale": 0.5}, {"precision": "int8"}
    modules = {UP: scaled, DOWN: unscaled, GATE: {"precision": "float16"}}
    path.write_text(first_format("int8-per-token-dynamic", modules))
    read = load_recipe(path)
    assert [plan.activations for plan in read.modules.values()] == ["static", "per-token", None]
    save_recipe(read, path)
    assert load_recipe(path) == read
    assert json.loads(path.read_text())["format"] == 2
    for scheme in ("int8-per-tensor-static", None):
        path.write_text(first_format(scheme, {UP: scaled}))
        assert load_recipe(path).modules[UP].static_scale == 0.5
    path.write_text(first_format("int8-per-tensor-static", {UP: unscaled}))
    with pytest.raises(RecipeError, match=f"modules.{UP}: .* needs an activation_scale"):
        load_recipe(path)


def test_where_transforms_stand_is_told_in_words() -> None:
    down = HadamardPlan(block=64)
    transforms = [(None, {}), (down, {}), (None, {UP: 32}), (down, {UP: 32, DOWN: 32})]
    told = [
        recipe().model_copy(update={"hadamard": plan, "input_hadamard": inputs}).hadamard_places()
        for plan, inputs in transforms
    ]
    assert told == [
        "none",
        "blocks of 64 at down_proj",
        "inputs of attention and feed-forward blocks: 1",
        "blocks of 64 at down_proj, inputs of attention and feed-forward blocks: 2",
    ]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d["attention"][ATTENTION].pop("key"), f"attention.{ATTENTION}.key: Field required"),
        (lambda d: d["attention"][ATTENTION].update(query=0), f"attention.{ATTENTION}.query: "),
        (
            lambda d: d["value_rotation"].update({f"{ATTENTION}.o_proj": 48}),
            f"value_rotation.{ATTENTION}.o_proj: Value error, block is 48; expected a power of two such as 64",
        ),
        (lambda d: d["input_hadamard"].update({UP: 1}), f"input_hadamard.{UP}: Input should be greater than 1"),
        (lambda d: d["rotation"].update(kind="fourier"), "rotation.kind: Input should be 'hadamard' or 'orthogonal'"),
        (lambda d: d["smoothing"][UP].update(form="x"), f"smoothing.{UP}.form: Input should be 'smoothquant', "),
        (lambda d: d["smoothing"][UP].update(scales=[1]), f"smoothing.{UP}.scales: Extra inputs"),
        (lambda d: d["modules"][DOWN].update(weights="int4"), f"modules.{DOWN}.weights: Input should be 'int8'"),
        (lambda d: d["scheme"].update(activations="static"), "scheme.activations: Extra inputs"),
        (lambda d: d["modules"][UP].update(activations="int8"), f"modules.{UP}.activations: Input should be 'static'"),
    ],
)
def test_a_slip_in_an_optional_part_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], place: str
) -> None:
    document = json.loads(recipe_text(full_recipe()))
    change(document)
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.json")
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.json'}: {place}")


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
        (lambda d: d["modules"][UP].update(precision=["int8"]), f"modules.{UP}.precision: Input should be 'int8'"),
        (
            lambda d: d.update(
                format=1, scheme={"activations": "int8-per-token-dynamic"}, modules={UP: {"precision": []}}
            ),
            f"modules.{UP}.precision: Input should be 'int8'",
        ),
        (lambda d: d["modules"][UP].pop("activation_scale"), f"modules.{UP}: Value error, precision int8"),
        (lambda d: d["modules"][UP].update(activation_scale=0), f"modules.{UP}.activation_scale: "),
        (lambda d: d["modules"][UP].update(activation_scale=-1.0), f"modules.{UP}.activation_scale: "),
        (lambda d: d["modules"][UP].update(activation_scale=math.nan), f"modules.{UP}.activation_scale: "),
        (lambda d: d["modules"][UP].update(activation_scale=math.inf), f"modules.{UP}.activation_scale: "),
        (lambda d: d["prefix"].update(token_ids=[]), "prefix.token_ids: "),
        (lambda d: d["prefix"].update(token_ids=["a"]), "prefix.token_ids.0: "),
        (lambda d: d.update(format=3), "format: Input should be 2"),
        (lambda d: d.update(format=1, scheme={"activations": "int4"}), "scheme.activations: Extra inputs"),
        (lambda d: d.update(format=1, scheme=[], modules=3), "scheme: "),
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
