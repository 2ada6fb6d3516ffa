"""The pipeline's stages: run when their inputs changed, not otherwise, and resumed after a kill."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import load_recipe
from spike_export.artifacts.results.accuracy_limits import AccuracyLimits
from spike_export.artifacts.results.check_document import Check, CheckReference, CheckVariant, load_check
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.pipeline import pipeline as pipeline_module
from spike_export.pipeline.job import Job
from spike_export.pipeline.pipeline import AFTER, BEHIND, BUNDLE, CHECK, PREFIX, RECIPE, REPORT, SMOOTHING, SPIKES
from spike_export.pipeline.run_directory import RunDirectory
from spike_export.report import page as html_report
from tests.support.killed_runs import job, pipeline_of, run_to_the_report
from tests.support.tiny.checkpoints import BOS, PLANTED_MODULE
from tests.support.tiny.cli_models import artifacts, corpus_text, write_corpus, write_model

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

CALIBRATION = {SPIKES, PREFIX, BEHIND, SMOOTHING, AFTER, RECIPE}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus, one undisturbed run and one that was killed before each of its renames."""
    folder = tmp_path_factory.mktemp("pipeline")
    model, corpus = write_model(folder / "model"), write_corpus(folder / "corpus.txt")
    command = [sys.executable, "-m", "tests.support.killed_runs", model, corpus, folder / "whole", folder / "killed"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "deaths.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, with its model and corpus beside it."""
    for name in ("whole", "model"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "corpus.txt", tmp_path)
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in artifacts(folder).items()}


def stages_run(work: Job, *, force: bool = False) -> set[str]:
    """Run a job; return the stages that were not skipped."""
    console = Console(file=io.StringIO(), force_terminal=False)
    run_to_the_report(pipeline_of(work, console, force))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return {line.split("] ")[1].split(":")[0] for line in lines if line.endswith(": started")}


def again(folder: Path, **options: Any) -> set[str]:
    return stages_run(job(folder / "model", folder / "corpus.txt", folder / "whole", **options))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the check's forward passes and the report, where only the order of the stages is of interest."""
    check = Check(
        reference=CheckReference(perplexity=10.0),
        variants=(CheckVariant(name="x", perplexity=11.0, increase=0.1, shipped=True),),
    )
    monkeypatch.setattr(pipeline_module, "check_variants", lambda *_: check)
    monkeypatch.setattr(html_report, "write_report", lambda run, **_: run)


def test_the_planted_spike_gives_every_stage_work(place: Path) -> None:
    recipe = load_recipe(place / "whole" / "recipe.json")
    assert recipe.prefix_ids[0] == BOS
    assert recipe.search.curve
    assert {path.name for path in (place / "whole" / ".stages").iterdir()} == {
        "spikes.json",
        "prefix.json",
        "spikes-behind-the-prefix.json",
        "smoothing.json",
        "spikes-after-smoothing.json",
        "recipe.json",
        "recipe.json.sha256",
        "bundle.json",
        "check.json",
    }


def test_a_run_killed_around_every_artifact_ends_like_an_undisturbed_one(place: Path) -> None:
    whole, killed = artifacts(place / "whole"), artifacts(place / "killed")
    died_before = set((place / "deaths.txt").read_text().splitlines())
    assert died_before >= {name for name in whole if not name.startswith("bundle/")} | {"bundle"}
    assert {"smoothing.json", "spikes_smoothed.safetensors", "spikes_smoothed.json"} <= died_before
    for stem in ("spikes", "spikes_prefixed", "spikes_smoothed"):  # six windows in parts of four
        assert {f".{stem}.parts/000000.json", f".{stem}.parts/000004.safetensors"} <= died_before
    assert set(killed) == set(whole)  # nothing lost, no leftovers
    assert [name for name in whole if killed[name] != whole[name]] == []


@pytest.mark.parametrize("survived", [1, 2, 3])
def test_a_pass_goes_on_behind_the_last_part_it_stored(
    copied: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """Three passes of two parts each, and the pass dies in its second part."""
    expected = digests(copied / "whole")
    shutil.rmtree(copied / "whole")
    work = job(copied / "model", copied / "corpus.txt", copied / "whole")
    measure, measured = Calibration.measure_windows, [0]
    rows: list[list[int]] = []

    def counted(self: Calibration, content: Any, sample_ids: Any, *more: Any) -> SpikeStatistics:
        # A pass: competitions measure without a transform, or all their windows at once.
        if len(more) > 1 and len(sample_ids) <= 4:
            measured[0] += 1
            if measured[0] == 2 * survived:
                raise KeyboardInterrupt
            rows.append(sample_ids.tolist())
        return measure(self, content, sample_ids, *more)

    monkeypatch.setattr(Calibration, "measure_windows", counted)
    with pytest.raises(KeyboardInterrupt):
        pipeline_of(work).calibrate()
    assert rows == [[0, 1, 2, 3], [4, 5]] * (survived - 1) + [[0, 1, 2, 3]]
    rows.clear()
    pipeline_of(work).calibrate()
    assert rows == [[4, 5]] + [[0, 1, 2, 3], [4, 5]] * (3 - survived)
    calibrated = digests(copied / "whole")
    assert {"spikes_smoothed.safetensors", "smoothing.json", "recipe.json"} < calibrated.keys()
    assert calibrated.items() <= expected.items()


def test_a_second_run_changes_nothing_and_only_writes_the_report(copied: Path) -> None:
    before = artifacts(copied / "whole")
    assert again(copied) == {REPORT}
    assert artifacts(copied / "whole") == before


def test_force_runs_all_again_to_the_same_bytes(copied: Path) -> None:
    before = artifacts(copied / "whole")
    work = job(copied / "model", copied / "corpus.txt", copied / "whole")
    assert stages_run(work, force=True) == {*CALIBRATION, BUNDLE, CHECK, REPORT}
    assert artifacts(copied / "whole") == before


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, {*CALIBRATION, BUNDLE, CHECK}),  # other windows
        ({"samples": 3}, {*CALIBRATION, BUNDLE, CHECK}),
        ({"length": 24}, {*CALIBRATION, BUNDLE, CHECK}),
        ({"dtype": "float32"}, {RECIPE, BUNDLE, CHECK}),  # nothing is measured in this precision
        ({"qfep": False}, {SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),  # the plain statistics are there
        ({"prefix_length": 1}, {PREFIX, SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
        ({"max_fp16_modules": 3}, {RECIPE, BUNDLE, CHECK}),  # prefixes and smoothings compete with nothing kept
        ({"qfem": False}, {RECIPE, BUNDLE, CHECK}),
        ({"alpha": 1e9}, {RECIPE, BUNDLE, CHECK}),
        ({"max_fp16_share": 0.0}, {RECIPE}),  # the same modules are chosen: the recipe is the same
        ({"tolerance": 0.0051}, {RECIPE}),
        ({"activation_range": "max"}, {PREFIX, SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
        ({"smoothing": False}, {PREFIX, RECIPE, BUNDLE, CHECK}),  # nothing is searched
        # Value heads are rotated without smoothing too.
        ({"smoothing": False, "activation_range": "mse"}, {PREFIX, SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
        ({"rotation": "always"}, {SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
        # The competition ends at every input too: only its candidates, which are in the recipe, are others.
        ({"hadamard": "always"}, {SMOOTHING, RECIPE, BUNDLE, CHECK}),
        ({"hadamard": "down_proj"}, {SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
        ({"value_rotation": "never"}, {SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
        ({"activations": "per-token"}, {PREFIX, SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}),
    ],
)
def test_a_changed_option_runs_what_depends_on_it(copied: Path, changes: dict[str, Any], expected: set[str]) -> None:
    # What stands behind the prefix is done again where the competition ends otherwise.
    before = load_recipe(copied / "whole" / "recipe.json").prefix_ids
    ran = again(copied, **changes)
    after = load_recipe(copied / "whole" / "recipe.json").prefix_ids
    moved = {SMOOTHING, AFTER} if after != before and changes.get("smoothing", True) else set()
    moved |= {BEHIND} if after not in ((), before) else set()
    assert ran == expected | moved | {REPORT}
    assert again(copied, **changes) == {REPORT}


@pytest.mark.usefixtures("unchecked")
def test_another_text_runs_everything(copied: Path) -> None:
    write_corpus(copied / "corpus.txt", seed=1)
    assert again(copied) == {*CALIBRATION, BUNDLE, CHECK, REPORT}


@pytest.mark.usefixtures("unchecked")
def test_another_configuration_of_the_same_weights_runs_everything(copied: Path) -> None:
    path = copied / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    assert again(copied) >= {SPIKES, PREFIX, SMOOTHING, RECIPE, BUNDLE, CHECK, REPORT}


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.usefixtures("unchecked")
def test_windows_inside_documents_depend_on_where_documents_end(copied: Path) -> None:
    first, second, third = (corpus_text(seed)[:600] for seed in range(3))
    corpus = jsonl(copied / "mine.jsonl", [{"text": first}, {"text": second}, {"text": third}])
    packed, inside = (job(copied / "model", corpus, copied / "whole", windows=kind) for kind in ("packed", "documents"))
    assert SPIKES in stages_run(packed)
    jsonl(corpus, [{"text": f"{first}\n\n{second}"}, {"text": third}])
    assert stages_run(packed) == {REPORT}
    assert SPIKES in stages_run(inside)
    assert load_recipe(copied / "whole" / "recipe.json").corpus.windows == "documents"
    assert stages_run(inside) == {REPORT}
    jsonl(corpus, [{"text": first}, {"text": f"{second}\n\n{third}"}])
    assert SPIKES in stages_run(inside)


@pytest.mark.usefixtures("unchecked")
def test_another_chat_template_is_another_corpus(copied: Path) -> None:
    corpus = jsonl(copied / "chats.jsonl", [{"messages": [{"role": "user", "content": corpus_text()}]}])
    plain = job(copied / "model", corpus, copied / "whole")
    work = replace(plain, corpus=replace(plain.corpus, chat_template=True))
    template = copied / "model" / "chat_template.jinja"
    template.write_text("{{ bos_token }}Q: {{ messages[0].content }}")
    assert SPIKES in stages_run(work)
    recipe = load_recipe(copied / "whole" / "recipe.json")
    assert recipe.corpus.name == "chats.jsonl (chat template)"
    # The template's own BOS is gone: every window gets one anyway.
    assert recipe.corpus.sha256 == hashlib.sha256(f"Q: {corpus_text()}".encode()).hexdigest()
    assert stages_run(work) == {REPORT}
    template.write_text("{{ bos_token }}User: {{ messages[0].content }}")
    assert SPIKES in stages_run(work)


@pytest.mark.usefixtures("unchecked")
def test_another_generation_configuration_reaches_the_bundle(copied: Path) -> None:
    (copied / "model" / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert BUNDLE in again(copied)
    written = json.loads((copied / "whole" / "bundle" / "generation_config.json").read_text())
    assert written["temperature"] == 0.5


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.usefixtures("unchecked")
def test_a_bundle_that_lost_a_file_is_written_again(copied: Path, name: str) -> None:
    lost = copied / "whole" / "bundle" / name
    content = lost.read_bytes()
    lost.unlink()
    assert again(copied) == {BUNDLE, REPORT}
    assert lost.read_bytes() == content


@pytest.mark.usefixtures("unchecked")
def test_a_foreign_folder_named_bundle_is_not_replaced(copied: Path) -> None:
    shutil.rmtree(copied / "whole" / "bundle")
    (copied / "whole" / "bundle").mkdir()
    precious = copied / "whole" / "bundle" / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(pipeline_module.ArtifactError, match="bundle: exists and is not a bundle"):
        again(copied)
    assert precious.read_text() == "years of work"


def test_a_limit_is_applied_without_measuring_again(copied: Path) -> None:
    work = job(copied / "model", copied / "corpus.txt", copied / "whole")
    path = copied / "whole" / "check.json"
    found = {"mean": 0.2, "margin": 0.05}
    edited(path, lambda check: [part["cost"].update(increase=found) for part in check["variants"] + check["texts"]])
    for limit, passed in ((0.24, False), (0.26, True)):
        limited = Job(**{**vars(work), "limits": AccuracyLimits(limit)})
        before = load_check(copied / "whole" / "check.json").variants
        assert stages_run(limited) == {REPORT}
        check = load_check(copied / "whole" / "check.json")
        assert check.variants == before
        assert [(gate.limit, gate.passed) for gate in check.gates] == [(limit, passed)] * 2
        assert [gate.name for gate in check.gates] == ["max-ppl-increase", "max-ppl-increase, Python source"]


def edited(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_an_edited_recipe_is_obeyed(copied: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    recipe = copied / "whole" / "recipe.json"
    assert load_recipe(recipe).modules[name].precision == "int8"
    kept_before = len(load_recipe(recipe).kept())
    edited(recipe, lambda document: document["modules"].update({name: {"precision": "float16", "reason": "by hand"}}))
    text = recipe.read_text()
    assert again(copied) == {BUNDLE, CHECK, REPORT}
    assert recipe.read_text() == text
    assert load_manifest(copied / "whole" / "bundle").linears["float16"].modules == kept_before + 1
    shipped = load_check(copied / "whole" / "check.json").shipped
    assert shipped is not None
    assert shipped.kept_linears == kept_before + 1


def test_an_edited_precision_of_the_rest_is_obeyed(copied: Path) -> None:
    recipe = copied / "whole" / "recipe.json"
    edited(recipe, lambda document: document["scheme"].update(unquantized="float32"))
    assert again(copied) == {BUNDLE, CHECK, REPORT}
    assert load_manifest(copied / "whole" / "bundle").dtype == "float32"
    assert load_check(copied / "whole" / "check.json").dtype == "float32"


def test_a_prefix_put_in_by_hand_is_checked_behind_its_own_statistics(copied: Path) -> None:
    recipe = copied / "whole" / "recipe.json"
    by_hand = [BOS, 77]
    assert len(load_recipe(recipe).prefix_ids) != len(by_hand)
    edited(recipe, lambda document: document["prefix"].update(token_ids=by_hand))
    assert again(copied) == {BUNDLE, CHECK, REPORT}
    prefix = load_manifest(copied / "whole" / "bundle").prefix
    assert prefix is not None
    assert list(prefix.token_ids) == by_hand
    lengths = {v.name: v.prefix_length for v in load_check(copied / "whole" / "check.json").variants}
    assert lengths["w8a8"] == 0
    assert {length for name, length in lengths.items() if "qfep" in name} == {len(by_hand)}


def test_a_bfloat16_module_put_in_by_hand_is_checked_in_float32(copied: Path) -> None:
    recipe = copied / "whole" / "recipe.json"
    edited(recipe, lambda document: document["modules"].update({PLANTED_MODULE: {"precision": "bfloat16"}}))
    again(copied)
    check = load_check(copied / "whole" / "check.json")
    assert check.dtype == "float32"
    assert check.note is not None
    assert "bfloat16" in check.note


@pytest.mark.usefixtures("unchecked")
def test_a_stage_killed_between_artifact_and_stamp_is_not_taken_for_the_previous_run(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / "whole" / "recipe.json").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "mark_done", killed)
        with pytest.raises(KeyboardInterrupt):
            again(copied, dtype="float32")
    assert (copied / "whole" / "recipe.json").read_bytes() != before
    # The options of the run before: its stamp must not vouch for the other recipe.
    assert RECIPE in again(copied)
    assert (copied / "whole" / "recipe.json").read_bytes() == before


def test_leftovers_of_a_killed_write_are_harmless(copied: Path) -> None:
    before = artifacts(copied / "whole")
    (copied / "whole" / ".recipe.json.partial").write_text('{"half": ')
    (copied / "whole" / ".bundle.partial").mkdir()
    (copied / "whole" / ".bundle.partial" / "model.onnx.data").write_bytes(b"half")
    (copied / "whole" / ".bundle.retired").mkdir()
    assert again(copied) == {REPORT}
    work = job(copied / "model", copied / "corpus.txt", copied / "whole")
    stages_run(work, force=True)
    assert artifacts(copied / "whole") == before


def test_without_quantization_nothing_is_calibrated(copied: Path) -> None:
    work = job(copied / "model", copied / "corpus.txt", copied / "plain", dtype="float32")
    assert stages_run(Job(**{**vars(work), "quantize": False})) == {BUNDLE, CHECK, REPORT}
    check = load_check(copied / "plain" / "check.json")
    assert [variant.name for variant in check.variants] == ["unquantized"]
    assert check.shipped is not None
    # float32 against transformers' float32: what remains is the order of summation.
    assert check.shipped.increase == pytest.approx(0, abs=1e-5)
    assert check.shipped.kl_divergence == pytest.approx(0, abs=1e-8)
