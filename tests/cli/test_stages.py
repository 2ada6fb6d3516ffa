"""Each stage as a command of its own, the configuration file, and the help."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import load_recipe
from spike_export.artifacts.results.check_document import load_check
from spike_export.artifacts.results.command_log import COMMANDS_FILE, load_commands
from spike_export.engines.plan.backend import TENSORRT_RTX
from spike_export.engines.plan.sidecar import load_sidecar
from tests.support.tiny.cli_models import LENGTH, SMALL, artifacts, call, write_corpus, write_model

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "matplotlib", "onnx_ir", "tensorrt", "tensorrt_rtx"}

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = ("--length", str(LENGTH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, a calibrated work directory and its bundle."""
    folder = tmp_path_factory.mktemp("stages")
    model, corpus = write_model(folder / "model"), write_corpus(folder / "corpus.txt")
    calibrated = call(
        "calibrate", model, "--work-dir", folder / "run", "--corpus", corpus, *SMALL, "--dtype", "float32"
    )
    assert calibrated.code == 0, calibrated.err
    (folder / "calibrated.txt").write_text(calibrated.out)
    exported = call("export", model, "--recipe", folder / "run" / "recipe.json", "--out", folder / "bundle", "--quiet")
    assert (exported.code, exported.out, exported.err) == (0, "", "")
    return folder


def test_calibrate_writes_statistics_and_recipe_and_says_where(folder: Path) -> None:
    assert {path.name for path in (folder / "run").iterdir()} == {
        ".stages",
        "spikes.json",
        "spikes.safetensors",
        "spikes_prefixed.json",
        "spikes_prefixed.safetensors",
        "prefix.json",
        "smoothing.json",
        "spikes_smoothed.json",
        "spikes_smoothed.safetensors",
        "recipe.json",
        "commands.json",
    }
    lines = (folder / "calibrated.txt").read_text().splitlines()
    recipe = load_recipe(folder / "run" / "recipe.json")
    assert lines[0] == "[1/6] spikes: started"
    assert lines[-2].startswith(f"{len(recipe.kept())} of {len(recipe.modules)} linears in float32, prefix [0")
    assert lines[-1] == f"recipe: {folder / 'run' / 'recipe.json'}"


def test_a_run_records_the_commands_that_worked_in_it(folder: Path, tmp_path: Path) -> None:
    log = load_commands(folder / "run" / COMMANDS_FILE).commands
    assert [each.words[:3] for each in log[:2]] == [
        ("spike-export", "calibrate", str(folder / "model")),
        ("spike-export", "export", str(folder / "model")),
    ]
    run = tmp_path / "run"
    (run / ".stages").mkdir(parents=True)
    bundle = shutil.copytree(folder / "bundle", run / "bundle")
    assert call("check", bundle, "--lint").code == 0
    assert [each.words for each in load_commands(run / COMMANDS_FILE).commands] == [
        ("spike-export", "check", str(bundle), "--lint")
    ]
    (run / COMMANDS_FILE).unlink()
    (run / COMMANDS_FILE).mkdir()
    assert call("check", bundle, "--lint").code == 0, "a log that cannot be written takes nothing from the result"
    assert call("check", folder / "bundle", "--lint").code == 0
    assert not (folder / COMMANDS_FILE).exists()


def test_export_takes_the_precision_from_the_recipe(folder: Path) -> None:
    assert load_manifest(folder / "bundle").dtype == "float32"


def test_export_writes_the_same_bytes_again_and_another_precision_when_told(folder: Path, tmp_path: Path) -> None:
    recipe = folder / "run" / "recipe.json"
    assert call("export", folder / "model", "--recipe", recipe, "--out", tmp_path / "b").code == 0
    assert artifacts(tmp_path / "b") == artifacts(folder / "bundle")
    # The same folder again: a bundle may be replaced by another.
    other = call("export", folder / "model", "--recipe", recipe, "--out", tmp_path / "b", "--dtype", "float16")
    assert other.code == 0
    assert other.out.splitlines()[-1] == f"bundle: {tmp_path / 'b'}"
    assert load_manifest(tmp_path / "b").dtype == "float16"


def test_export_obeys_an_edited_recipe(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "run" / "recipe.json").read_text())
    before = load_manifest(folder / "bundle").linears["int8"].modules
    document["modules"]["model.layers.0.mlp.up_proj"] = {"precision": "float32"}
    document["prefix"] = None
    (tmp_path / "edited.json").write_text(json.dumps(document))
    assert call("export", folder / "model", "--recipe", tmp_path / "edited.json", "--out", tmp_path / "b").code == 0
    manifest = load_manifest(tmp_path / "b")
    assert manifest.linears["int8"].modules == before - 1
    assert manifest.prefix is None


@pytest.mark.parametrize(("options", "dtype"), [((), "float16"), (("--dtype", "bfloat16"), "bfloat16")])
def test_export_without_quantization(folder: Path, tmp_path: Path, options: tuple[str, ...], dtype: str) -> None:
    assert call("export", folder / "model", "--no-quantize", *options, "--out", tmp_path / "b").code == 0
    manifest = load_manifest(tmp_path / "b")
    assert manifest.dtype == dtype
    assert set(manifest.linears) == {dtype}
    assert manifest.model.recipe_sha256 is None


@pytest.fixture(scope="module")
def poor(folder: Path) -> Path:
    """A bundle whose activation scales are far too coarse."""
    document = json.loads((folder / "run" / "recipe.json").read_text())
    for plan in document["modules"].values():
        plan["activation_scale"] = 1e3
    (folder / "poor.json").write_text(json.dumps(document))
    assert call("export", folder / "model", "--recipe", folder / "poor.json", "--out", folder / "poor").code == 0
    return folder / "poor"


@pytest.mark.parametrize(("limit", "code"), [("1000", 0), ("0", 1)])
def test_check_compares_with_the_model_and_holds_the_limit(
    folder: Path, poor: Path, tmp_path: Path, limit: str, code: int
) -> None:
    place = tmp_path / "c.json"
    reference = ("--reference", folder / "model", "--corpus", folder / "corpus.txt", *WINDOWS)
    same = ("--text", folder / "corpus.txt")  # which is judged on anyway: no further text
    done = call("check", poor, *reference, *same, "--max-ppl-increase", limit, "--out", place)
    check = load_check(place)
    (variant,) = check.variants
    assert done.code == code
    assert done.err == ("" if code == 0 else "spike-export: the accuracy limit was missed; see the check\n")
    assert variant.cost is not None
    assert [(gate.limit, gate.value, gate.passed) for gate in check.gates] == [
        (float(limit), variant.cost.increase.high, code == 0)
    ]
    assert (variant.name, variant.shipped, check.dtype) == ("shipped", True, "float32")
    assert variant.int8_linears == load_manifest(folder / "bundle").linears["int8"].modules
    assert check.corpus.length == LENGTH - 1
    assert done.out.splitlines()[-1] == f"check: {place}"


def test_check_writes_beside_the_bundle_by_default(folder: Path) -> None:
    reference = ("--reference", folder / "model", "--corpus", folder / "corpus.txt", *WINDOWS)
    assert call("check", folder / "bundle", *reference, "--quiet").out == ""
    assert load_check(folder / "bundle.check.json").gates == ()
    assert set(artifacts(folder / "bundle")) & {"bundle.check.json", "check.json"} == set()


@pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)
def test_build_writes_plan_and_description(folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "new" / "engine.plan"
    options = ("--backend", "tensorrt-rtx", "--target", "SM86", "--profiles", "decode")
    done = call("build", folder / "bundle", "--out", plan, *options)
    assert done.code == 0, done.err
    sidecar = load_sidecar(plan)
    assert [profile.name for profile in sidecar.profiles] == ["decode"]
    assert done.out.splitlines()[-1] == f"plan: {plan} (as asked for)"


def test_report_of_a_calibration_alone(folder: Path) -> None:
    done = call("report", folder / "run")
    assert (done.code, done.out) == (0, f"report: {folder / 'run' / 'report.html'}\n")
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "No engine has been built yet." in page
    (folder / "run" / "report.html").unlink()


def test_the_configuration_file_is_read_and_the_command_line_overrides_it(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    corpus = json.dumps(str(folder / "corpus.txt"))
    # The keys outside of the table are those of the main job, and no concern of `calibrate`.
    listed = f"[{corpus}]\ncorpus-weight = [3]"
    for position, text in ((("--config", config), corpus), ((f"--config={config}",), listed)):
        config.write_text(f"length = 9\n[calibrate]\ncorpus = {text}\nsamples = 3\nlength = 24\nqfep = false\n")
        done = call("calibrate", folder / "model", "--work-dir", tmp_path / "run", "--samples", "2", *position)
        assert done.code == 0, done.err
        recipe = load_recipe(tmp_path / "run" / "recipe.json")
        assert (recipe.corpus.samples, recipe.corpus.length, recipe.prefix) == (2, 24, None)
    assert done.stages_run == ()


def test_the_main_job_reads_its_options_from_the_top_of_the_file(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("samples = 0\n[calibrate]\nsamples = 3\n")
    arguments = (folder / "model", "--out", tmp_path / "e.plan", "--config", config)
    assert "--samples is 0" in call(*arguments).error
    assert "--samples is -1" in call(*arguments, "--samples=-1").error


def test_a_configuration_file_is_forgotten_after_its_call(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("samples = 0\n")
    arguments = (folder / "model", "--out", tmp_path / "e.plan", "--corpus", tmp_path / "none.txt")
    assert "--samples is 0" in call(*arguments, "--config", config).error
    assert "none.txt" in call(*arguments).error


MOST_MODULES = 480
"""Modules that a command's help may load: about 400 now, most of them the parser's, the terminal's and Python's own."""

_HELP = """
import contextlib, io, json, sys
from spike_export.cli.main import run
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = run(sys.argv[1:])
print(json.dumps([code, out.getvalue(), sorted(sys.modules)]))
"""


@pytest.mark.parametrize("arguments", [("--help",), ("calibrate", "--help"), ("--version",)])
def test_help_answers_at_once(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", _HELP, *arguments], capture_output=True, text=True, check=True)
    code, text, modules = json.loads(done.stdout)
    assert code == 0
    assert "spike-export" in text or arguments == ("--version",)
    # What is loaded is what takes the time, on every processor and beside any load.
    assert HEAVY.isdisjoint(modules)
    assert len(modules) < MOST_MODULES


def test_the_main_help_names_every_option_group_and_command() -> None:
    text = call("--help").out
    for word in (
        "calibrate",
        "merge",
        "inspect",
        "export",
        "check",
        "build",
        "report",
        "--no-qfem",
        "--no-quantize",
        "--config",
    ):
        assert word in text, word
