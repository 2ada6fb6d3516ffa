"""Head and last-token logits from the command line to the check."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import load_recipe
from spike_export.artifacts.results.check_document import load_check
from tests.support.killed_runs import job, pipeline_of, run_to_the_report
from tests.support.tiny.cli_models import SMALL, call, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("head"))
    head = ("--head", "int8-per-token-dynamic", "--no-smoothing")
    command = ("calibrate", folder / "model", "--work-dir", folder / "run", "--corpus", folder / "corpus.txt")
    done = call(*command, *SMALL, *head)
    assert done.code == 0, done.err
    return folder


def test_the_recipe_holds_the_head_and_export_obeys(folder: Path) -> None:
    recipe = folder / "run" / "recipe.json"
    assert load_recipe(recipe).scheme.head == "int8-per-token-dynamic"
    out = folder / "bundle"
    done = call("export", folder / "model", "--recipe", recipe, "--logits", "last", "--dtype", "float32", "--out", out)
    assert done.code == 0, done.err
    manifest = load_manifest(out)
    assert manifest.head is not None
    assert (manifest.head.format, manifest.logits) == ("int8", "last")
    edited = folder / "edited.json"
    edited.write_text(recipe.read_text().replace("int8-per-token-dynamic", "int8-weights"))
    assert call("export", folder / "model", "--recipe", edited, "--out", folder / "other").code == 0
    other = load_manifest(folder / "other")
    assert other.head is not None
    assert (other.head.format, other.logits) == ("float32+int8-weights", "all")


def test_a_last_token_bundle_is_checked_like_any_other(folder: Path) -> None:
    corpus = ("--corpus", folder / "corpus.txt", *SMALL[2:])
    perplexities = []
    for logits in ("all", "last"):
        out = folder / logits
        recipe = ("--recipe", folder / "run" / "recipe.json", "--dtype", "float32", "--logits", logits)
        assert call("export", folder / "model", *recipe, "--out", out).code == 0
        checked = call("check", out, "--reference", folder / "model", *corpus)
        assert checked.code == 0, checked.out + checked.err
        perplexities.append([each.perplexity for each in load_check(folder / f"{logits}.check.json").variants])
    assert perplexities[0] == perplexities[1]


def test_inspect_explains_the_head(folder: Path) -> None:
    assert "head: int8-per-token-dynamic" in call("inspect", folder / "run").out.splitlines()
    explained = json.loads(call("inspect", folder / "run", "--json", "--explain", "lm_head").out)
    assert explained["lm_head"]["precision"] == "int8"
    assert "int8-per-token-dynamic, asked for" in explained["lm_head"]["why"]


def test_an_unknown_head_is_refused(folder: Path) -> None:
    recipe = folder / "run" / "recipe.json"
    broken = folder / "broken.json"
    broken.write_text(recipe.read_text().replace("int8-per-token-dynamic", "int4"))
    done = call("export", folder / "model", "--recipe", broken, "--out", folder / "never")
    assert done.code == 2
    assert "scheme.head" in done.err


def test_the_job_checks_what_the_head_costs_and_the_page_names_it(folder: Path) -> None:
    work = job(folder / "model", folder / "corpus.txt", folder / "job", samples=4, head="int8-weights", smoothing=False)
    pipeline = pipeline_of(replace(work, logits="last"))
    run_to_the_report(pipeline)
    check = load_check(folder / "job" / "check.json")
    *_, before, shipped = check.variants
    assert shipped.shipped
    assert shipped.name == f"{before.name}+head int8-weights"
    assert (before.head, shipped.head) == ("float16", "float32+int8-weights")
    # The rest is alike; the paper's variants have a head that is not quantized.
    assert (before.int8_linears, before.prefix_length) == (shipped.int8_linears, shipped.prefix_length)
    assert {each.head for each in check.variants[:-1]} == {"float16"}
    assert 0 < abs(shipped.perplexity / before.perplexity - 1) < 0.02
    assert load_manifest(folder / "job" / "bundle").logits == "last"
    page = (folder / "job" / "report.html").read_text(encoding="utf-8")
    assert "<dt>Head</dt>" in page
    assert "int8-weights" in page
    # Other logits are another bundle of the same recipe.
    again = pipeline_of(work)
    again.calibrate()
    again.export(load_recipe(folder / "job" / "recipe.json"))
    assert load_manifest(folder / "job" / "bundle").logits == "all"


def test_the_smoothing_of_the_head_goes_from_calibration_to_the_bundle(folder: Path) -> None:
    command = ("calibrate", folder / "model", "--work-dir", folder / "smoothed", "--corpus", folder / "corpus.txt")
    done = call(*command, *SMALL, "--head", "int8-per-token-dynamic")
    assert done.code == 0, done.err
    recipe = load_recipe(folder / "smoothed" / "recipe.json")
    assert recipe.search.head[0].verdict == "chosen"
    explained = json.loads(call("inspect", folder / "smoothed", "--json", "--explain", "lm_head").out)["lm_head"]
    best = recipe.search.head[0]
    plan = recipe.head_smoothing
    assert explained["smoothing"].startswith("none" if plan is None else f"{plan.form} {plan.parameter} on the final")
    assert f"{best.divergence:.4f}, without smoothing" in explained["smoothing"]
    text = call("inspect", folder / "smoothed").out
    assert "smoothing candidates of the head's input" in text
    assert all(each.name in text for each in recipe.search.head)
    unsmoothed = json.loads(call("inspect", folder / "run", "--json", "--explain", "lm_head").out)["lm_head"]
    assert unsmoothed["smoothing"] == "none"
