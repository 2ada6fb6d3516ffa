"""The main job as a user starts it: a process of its own, artifacts, a second run, a kill and Ctrl-C on the way."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import load_recipe
from spike_export.artifacts.results.check_document import load_check
from spike_export.calibration.statistics.spikes import load_spikes
from spike_export.engines.plan.backend import TENSORRT_RTX
from spike_export.engines.plan.bundle_identity import hash_bundle
from spike_export.engines.plan.sidecar import load_sidecar
from tests.support.forked_command import ForkedCommands, forked_commands
from tests.support.tiny.cli_models import SMALL, artifacts, call, write_corpus, write_model

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(TENSORRT_RTX.module) is None,
        reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
    ),
    pytest.mark.usefixtures("one_thread"),
]

PROGRAM = [sys.executable, "-c", "from spike_export.cli.main import main; main()"]
BUNDLE_FILES = {
    "model.onnx",
    "model.onnx.data",
    "manifest.json",
    "config.json",
    "data_loader.py",
    "generation_config.json",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def options(folder: Path, out: str) -> list[str]:
    return [
        str(folder / "model"),
        *("--out", str(folder / out)),
        *("--corpus", str(folder / "corpus.txt")),
        *SMALL,
        *("--backend", "tensorrt-rtx", "--target", "SM86"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    write_corpus(folder / "corpus.txt")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *options(folder, "engine.plan")], capture_output=True, check=False)


def test_it_ends_well_and_says_so_in_plain_lines(folder: Path, finished: subprocess.CompletedProcess[bytes]) -> None:
    assert finished.returncode == 0, finished.stderr.decode()
    assert finished.stderr == b""
    text = finished.stdout.decode()
    assert text.isascii()
    assert [line for line in text.splitlines() if not line.isprintable()] == []
    lines = text.splitlines()
    assert lines[0] == "[1/10] spikes: started"
    assert any(line.startswith("[10/10] report: done in ") for line in lines)
    run = folder / "engine.plan.run"
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert notes == list(load_recipe(run / "recipe.json").notes())
    assert lines[-4:] == [
        f"plan: {folder / 'engine.plan'}",
        f"bundle: {run / 'bundle'}",
        f"report: {run / 'report.html'}",
        f"serve it: spike-export serve {run / 'bundle'}",
    ]


@pytest.mark.usefixtures("finished")
def test_the_artifacts_belong_together(folder: Path) -> None:
    run = folder / "engine.plan.run"
    recipe, manifest = load_recipe(run / "recipe.json"), load_manifest(run / "bundle")
    assert manifest.model.checkpoint_sha256 == recipe.model.sha256
    assert recipe.model.source == "model"
    assert (recipe.corpus.samples, recipe.corpus.length, recipe.corpus.seed) == (4, 32, 0)
    assert manifest.prefix is not None
    assert manifest.prefix.token_ids == recipe.prefix_ids == load_spikes(run / "spikes_prefixed").prefix_ids
    assert manifest.linears["int8"].modules == len(recipe.modules) - len(recipe.kept())
    assert {path.name for path in (run / "bundle").iterdir()} == BUNDLE_FILES
    onnx.checker.check_model(run / "bundle" / "model.onnx", full_check=True)
    sidecar = load_sidecar(folder / "engine.plan")
    assert sidecar.bundle_sha256 == hash_bundle(run / "bundle")
    assert sidecar.targets == ("SM86",)
    assert sidecar.prefix == len(recipe.prefix_ids)
    assert sidecar.audit.readable
    assert all(module.as_planned for module in sidecar.audit.modules.values())


@pytest.mark.usefixtures("finished")
def test_the_check_shows_what_each_method_brings(folder: Path) -> None:
    run = folder / "engine.plan.run"
    check, recipe = load_check(run / "check.json"), load_recipe(run / "recipe.json")
    names = [variant.name for variant in check.variants]
    assert names[:2] == ["unquantized", "w8a8"]
    own = any(plan.per_token for plan in recipe.modules.values())
    assert names[-1].endswith("+smoothing+sample-mean" + "+per-token inputs" * own)
    assert [variant.name for variant in check.variants if variant.shipped] == names[-1:]
    assert check.corpus.name == "corpus.txt"
    assert check.gates == ()
    by_name = {variant.name: variant for variant in check.variants}
    assert by_name["unquantized"].increase == pytest.approx(0, abs=1e-3)
    # The planted spike ruins plain W8A8; what is shipped is far closer to the model.
    shipped = by_name[names[-1]]
    assert shipped.kl_divergence < by_name["w8a8"].kl_divergence / 2
    assert shipped.prefix_length == len(recipe.prefix_ids)


@pytest.mark.usefixtures("finished")
def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = (folder / "engine.plan.run" / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page
    for reference in ('src="http', 'href="http', "<script src", "<link"):
        assert reference not in page


@pytest.mark.usefixtures("finished")
def test_a_second_run_skips_everything_and_changes_no_byte(folder: Path) -> None:
    places = [folder / "engine.plan", folder / "engine.json"]
    before = [place.read_bytes() for place in places], artifacts(folder / "engine.plan.run")
    again = call(*options(folder, "engine.plan"))
    assert again.code == 0
    assert again.stages_run == ("plan", "report")
    assert "plan kept: nothing it was built from has changed" in again.out.splitlines()
    assert again.out.count(": unchanged (") == 8
    assert ([place.read_bytes() for place in places], artifacts(folder / "engine.plan.run")) == before


@pytest.mark.usefixtures("finished")
def test_a_missed_limit_says_so_and_keeps_the_plan(folder: Path) -> None:
    plan = (folder / "engine.plan").read_bytes()
    path = folder / "engine.plan.run" / "check.json"
    text = path.read_text()
    pictures = {picture: picture.read_bytes() for picture in (folder / "engine.plan.run" / "pictures").iterdir()}
    document = json.loads(text)
    for variant in document["variants"]:
        variant["cost"]["increase"] = {"mean": 0.375, "margin": 0.125}
    path.write_text(json.dumps(document))
    missed = call(*options(folder, "engine.plan"), "--max-ppl-increase", "0.4")
    path.write_text(text)
    for picture, content in pictures.items():
        picture.write_bytes(content)
    assert missed.code == 1
    assert missed.err == "spike-export: the accuracy limit was missed; see the check\n"
    assert "MISSED: max-ppl-increase: the 95 % interval ends at 0.5, limit 0.4" in missed.out
    assert "plan: not built: the accuracy limit was missed" in missed.out
    assert (folder / "engine.plan").read_bytes() == plan


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedCommands]:
    with forked_commands(tmp_path_factory.mktemp("streams")) as commands:
        yield commands


def wait_for(path: Path, process: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert Path(f"/proc/{process}").exists(), "it ended before it could be interrupted"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.usefixtures("finished")
def test_a_killed_process_is_resumed_by_the_same_command(folder: Path, commands: ForkedCommands) -> None:
    process = commands.start(options(folder, "killed.plan"))
    wait_for(folder / "killed.plan.run" / ".stages" / "recipe.json", process)
    os.kill(process, signal.SIGKILL)
    assert commands.end().code == -signal.SIGKILL
    assert not (folder / "killed.plan").exists()
    # A process like the first one: another number of threads adds up in another order, to other last digits.
    commands.start(options(folder, "killed.plan"))
    resumed = commands.end()
    assert resumed.code == 0, resumed.err
    assert "recipe" not in resumed.stages_run
    assert resumed.stages_run[-2:] == ("plan", "report")
    # TensorRT-RTX does not build the same bytes twice: the sidecar's hash, time and memory differ, and the plan's
    # stamp holds its path. The report shows them, and the command line.
    own = ("report.html", ".stages/plan.json")
    whole, killed = (artifacts(folder / f"{name}.plan.run") for name in ("engine", "killed"))
    assert set(whole) == set(killed)
    assert [name for name in whole if killed[name] != whole[name] and name not in own] == []
    changing = {"build_seconds": 0, "peak_memory": 0, "plan": None}
    first, second = (json.loads((folder / f"{name}.json").read_text()) | changing for name in ("engine", "killed"))
    assert first == second


@pytest.mark.usefixtures("finished")
def test_ctrl_c_during_the_build_keeps_the_stages_and_leaves_no_process(folder: Path, commands: ForkedCommands) -> None:
    process = commands.start(options(folder, "stopped.plan"))
    run = folder / "stopped.plan.run"
    wait_for(folder / ".stopped.plan.partial", process)
    os.kill(process, signal.SIGINT)
    stopped = commands.end()
    assert stopped.code == 130
    assert stopped.err == (
        "spike-export: interrupted; finished stages are kept, and the same command continues from there\n"
    )
    assert {path.stem for path in (run / ".stages").iterdir()} >= {"spikes", "recipe", "bundle", "check"}
    assert not (folder / ".stopped.plan.partial").exists()
    assert not (folder / "stopped.plan").exists()
