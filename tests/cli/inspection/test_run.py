"""`inspect`: what a run decided and why, for reading and as JSON."""

import json
from pathlib import Path

import pytest

from spike_export.artifacts.recipe import Recipe, load_recipe
from tests.support.tiny.checkpoints import PLANTED_MODULE
from tests.support.tiny.cli_models import SMALL, call, write_corpus, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's method on the planted model: its spike is kept in 16 bit, without a prefix."""
    folder = tmp_path_factory.mktemp("inspect")
    model, corpus = write_model(folder / "model"), write_corpus(folder / "corpus.txt")
    method = ("--no-smoothing", "--activation-range", "max", "--no-qfep", "--max-fp16-modules", "1")
    done = call("calibrate", model, "--work-dir", folder / "run", "--corpus", corpus, *SMALL, *method)
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="module")
def automatic(run: Path) -> Path:
    """The default method: prefix, smoothing, clips."""
    folder = run.parent
    options = ("--corpus", folder / "corpus.txt", *SMALL, "--attribution-windows", "1")
    assert call("calibrate", folder / "model", "--work-dir", folder / "automatic", *options).code == 0
    return folder / "automatic"


@pytest.fixture
def recipe(run: Path) -> Recipe:
    return load_recipe(run / "recipe.json")


def lines(run: Path, *options: str) -> list[str]:
    done = call("inspect", run, *options)
    assert (done.code, done.err) == (0, "")
    return done.out.splitlines()


def test_the_summary_says_what_was_decided(run: Path) -> None:
    text = lines(run)
    assert text[:2] == [
        "model: model (llama)",
        "scheme: weights int8-per-channel, activations 16 static, 4 per-token, range max",
    ]
    assert "linears: 1 float16, 20 int8" in text
    assert "prefix: none" in text
    assert "smoothing: 0 inputs" in text
    kept = next(line for line in text if PLANTED_MODULE in line)
    assert "float16" in kept
    assert "score > alpha" in kept


def test_the_summary_shows_what_competed(automatic: Path) -> None:
    recipe = load_recipe(automatic / "recipe.json")
    text = "\n".join(lines(automatic))
    for title in (
        "prefix candidates",
        "smoothing, rotation and Hadamard candidates, all linears in INT8",
        "sets of inputs with a scale per token",
        "sets of modules in 16 bit",
    ):
        assert title in text
    shares = json.loads("\n".join(lines(automatic, "--json")))["noise shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) == 12  # inputs of three layers, none of which is kept
    noisiest = max(shares, key=shares.__getitem__)
    row = next(line for line in text.splitlines() if noisiest in line and line.strip().endswith("%"))
    assert row.split()[-1] == f"{shares[noisiest]:.1%}"
    assert text.count("chosen") == 3  # a prefix, a transform and a set of inputs
    assert f"smoothing: {len(recipe.smoothing)} inputs" in text
    assert f"prefix: {list(recipe.prefix_ids)}" in text
    assert "unquantized perplexity on the search windows: " in text
    assert "\x1b" not in text


def test_a_kept_module_is_explained(run: Path, recipe: Recipe) -> None:
    name, *text = lines(run, "--explain", PLANTED_MODULE)
    ratio = recipe.modules[PLANTED_MODULE].ratio
    assert name == PLANTED_MODULE
    assert text[0] == "  precision: float16"
    assert text[1] == f"  why: its ratio {ratio:.4g} exceeds alpha = {recipe.alpha:.4g}"
    assert text[2] == f"  max-median ratio: {ratio:.1f} (rank 1 of 21 linears)"
    assert text[-1].startswith("  largest tokens without a prefix: ")
    assert r"'\n'" in text[-1] or r"'\\n'" in text[-1]
    assert "(window " in text[-1]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj", "layers.0.mlp.gate_proj", "0.mlp.gate_proj"])
def test_a_sibling_is_explained_by_its_own_name(run: Path, recipe: Recipe, name: str) -> None:
    plan = recipe.modules["model.layers.0.mlp.gate_proj"]
    text = lines(run, "--explain", name)
    assert text[0] == "model.layers.0.mlp.gate_proj"
    assert text[1] == "  precision: int8"
    assert text[2] == f"  why: its ratio {plan.ratio:.4g} does not exceed alpha = {recipe.alpha:.4g}"
    scale = plan.activation_scale
    assert scale is not None
    assert f"  activation scale: {scale:.4g}: magnitudes up to {127 * scale:.4g}" in text
    assert text[-1].startswith("  largest tokens")  # those of the input that it shares with up_proj


def test_smoothing_clip_and_noise_are_explained(automatic: Path) -> None:
    recipe = load_recipe(automatic / "recipe.json")
    # An input behind a norm may have no plan of its own name, but shares one; these have.
    name = next(iter(recipe.smoothing))
    plan, smoothing = recipe.modules[name], recipe.smoothing[name]
    text = lines(automatic, "--explain", name)
    assert f"  smoothing: {smoothing.form} {smoothing.parameter} on the input of {name}" in text
    assert any(line.startswith(f"  estimated noise of INT8: {plan.noise:.2e} of the residual stream") for line in text)
    assert any(line.startswith("  largest tokens behind the prefix: ") for line in text)


def test_what_each_input_causes_is_shown_until_the_recipe_is_edited(automatic: Path, tmp_path: Path) -> None:
    measured = json.loads("\n".join(lines(automatic, "--json")))["divergence"]
    assert len(measured["inputs"]) == 12
    worst = max(measured["inputs"], key=lambda name: measured["inputs"][name]["alone"])
    alone, without = measured["inputs"][worst].values()
    title = f"divergence in nats per token, {measured['divergence']:.2e} in all, on 1 held-out windows"
    assert title in lines(automatic)
    row = next(line for line in lines(automatic) if worst in line and f"{alone:.2e}" in line)
    assert row.split()[0] == worst.rpartition(".")[2]
    (figures,) = (line for line in lines(automatic, "--explain", worst) if "nats alone" in line)
    assert f"{alone:.2e} nats alone" in figures
    assert f"{measured['divergence'] - without:.2e} less" in figures
    document = json.loads((automatic / "recipe.json").read_text())
    document["modules"][worst]["clip"] = 0.45
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    (tmp_path / "attribution.json").write_bytes((automatic / "attribution.json").read_bytes())
    assert not any("divergence in nats" in line for line in lines(tmp_path))
    (tmp_path / "attribution.json").write_text("{")
    damaged = call("inspect", tmp_path)
    assert damaged.code == 2
    assert "attribution.json: cannot read what each input causes; run again with --force" in damaged.err


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        (0.45, "45% of what calibration saw; the rest saturates"),
        (1.243, "1.24 times the calibrated range, for other kinds of text"),
    ],
)
def test_a_scale_says_what_it_covers(run: Path, tmp_path: Path, clip: float, told: str) -> None:
    document = json.loads((run / "recipe.json").read_text())
    document["modules"]["model.layers.0.mlp.gate_proj"]["clip"] = clip
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    (scale,) = (line for line in lines(tmp_path, "--explain", "0.mlp.gate_proj") if "activation scale" in line)
    assert scale.endswith(f", {told}")


def test_several_modules_are_explained_in_the_order_given(run: Path) -> None:
    text = lines(run, "--explain", "2.mlp.down_proj", "--explain", "0.self_attn.o_proj")
    assert [line for line in text if not line.startswith(" ")] == [
        "model.layers.2.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
    ]


def test_json_is_for_programs(run: Path, automatic: Path, recipe: Recipe) -> None:
    summary = json.loads(call("inspect", run, "--json").out)
    assert summary["linears"] == "1 float16, 20 int8"
    assert list(summary["not quantized"]) == [PLANTED_MODULE]
    assert json.loads(call("inspect", automatic, "--json").out)["search"]["prefixes"]
    explained = json.loads(call("inspect", run, "--json", "--explain", "1.mlp.down_proj").out)
    assert list(explained) == [PLANTED_MODULE]
    assert explained[PLANTED_MODULE]["precision"] == "float16"


@pytest.mark.parametrize("name", ["model.layers.9.mlp.down_proj", "mlp.down_proj", "down_proj", "nonsense", ""])
def test_an_unknown_module_is_named_with_likely_ones(run: Path, name: str) -> None:
    line = call("inspect", run, "--explain", name).error
    assert f"{name}: the recipe has no such module; it has model.layers.0." in line
    if "down_proj" in name:
        assert "it has model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in line


def test_a_folder_that_is_neither_a_run_nor_a_bundle(tmp_path: Path) -> None:
    line = call("inspect", tmp_path).error
    assert f"{tmp_path}: holds neither recipe.json, as a run that calibrated does, nor manifest.json" in line


def test_statistics_that_are_gone_are_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    assert not any("largest tokens" in line for line in lines(tmp_path, "--explain", PLANTED_MODULE))
