"""`--kv-cache static --capacity N` from the command line: the whole job, what runs again, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.results.check_document import load_check
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.engines.plan.backend import TENSORRT_RTX
from spike_export.engines.plan.sidecar import load_sidecar
from tests.support.tiny.cli_models import LENGTH, SMALL, call, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

STATIC = ("--kv-cache", "static", "--capacity", str(LENGTH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("static"))


@pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)
def test_the_whole_job(folder: Path) -> None:
    arguments = [
        *(folder / "model", "--out", folder / "engine.plan", "--corpus", folder / "corpus.txt", *SMALL),
        *("--no-smoothing", "--dtype", "float32"),
        *("--backend", "tensorrt-rtx", "--target", "SM86"),
    ]
    finished = call(*arguments, *STATIC)
    assert finished.code == 0, finished.err
    run = folder / "engine.plan.run"
    manifest = load_manifest(run / "bundle")
    assert (manifest.kv_cache, manifest.capacity) == ("static", LENGTH)
    assert manifest.prefix_length
    # The shipped bundle is the static one: what the check says of it is true of the dynamic one too.
    recipe, dynamic = run / "recipe.json", folder / "dynamic"
    assert call("export", folder / "model", "--recipe", recipe, "--out", dynamic).code == 0
    content = np.arange(40, 60)[None]
    expected = open_bundle(dynamic).prefill(content)
    np.testing.assert_allclose(
        open_bundle(run / "bundle").prefill(content), expected, atol=1e-5 * np.abs(expected).max()
    )
    corpus = ("--corpus", folder / "corpus.txt", *SMALL)
    checked = call("check", dynamic, "--reference", folder / "model", *corpus, "--out", folder / "dynamic.json")
    assert checked.code == 0, checked.err
    (of_dynamic,) = load_check(folder / "dynamic.json").variants
    (shipped,) = (variant for variant in load_check(run / "check.json").variants if variant.shipped)
    assert shipped.perplexity == pytest.approx(of_dynamic.perplexity, rel=1e-5)
    profiles = load_sidecar(folder / "engine.plan").profiles
    assert [profile.inputs["fresh"].max for profile in profiles] == [(1,), (0,)]
    assert profiles[0].inputs["past_key_values.0.key"].max[2] == manifest.cache_slots
    # Another capacity is another graph of the same recipe.
    again = call(*arguments, *STATIC)
    assert (again.code, again.stages_run) == (0, ("plan", "report"))
    assert "plan kept: nothing it was built from has changed" in again.out.splitlines()
    larger = call(*arguments, *STATIC[:-1], str(LENGTH + 8))
    assert (larger.code, larger.stages_run) == (0, ("bundle", "check", "plan", "report"))
    assert load_manifest(run / "bundle").capacity == LENGTH + 8


def test_export_and_check_alone(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    done = call("export", folder / "model", "--no-quantize", *STATIC, "--out", bundle)
    assert done.code == 0, done.err
    assert not (bundle / "genai_config.json").exists()
    reference = ("--reference", folder / "model", "--corpus", folder / "corpus.txt")
    assert call("check", bundle, *reference, "--length", str(LENGTH), "--max-ppl-increase", "0.001").code == 0
    line = call("check", bundle, *reference, "--length", str(LENGTH + 1)).error
    assert f"capacity is {LENGTH}, and the check feeds windows of --length {LENGTH + 1}" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kv-cache", "static"), "--kv-cache static needs --capacity N"),
        (("--capacity", "64"), "--capacity 64 needs a static cache; add --kv-cache static"),
        (("--kv-cache", "static", "--capacity", "0"), "--capacity is 0; expected at least 1"),
        (("--kv-cache", "static", "--capacity", "257"), "--capacity is 257, but the model takes 256 tokens at most"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    folder: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    assert said in call("export", folder / "model", "--no-quantize", *options, "--out", tmp_path / "b").error
    main = (folder / "model", "--out", tmp_path / "e.plan", "--corpus", folder / "corpus.txt", *SMALL)
    assert said in call(*main, "--work-dir", tmp_path / "run", *options).error
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "run" / "spikes.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "capacity is 16, and the check feeds windows of --length 32: give a --length that fits"),
        (("--length", "16", "--max-context", "17"), "max_context is 17, but the bundle's static cache holds 16 tokens"),
    ],
)
def test_a_capacity_too_small_for_a_later_stage_is_said_before_the_first(
    folder: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    main = (folder / "model", "--out", tmp_path / "e.plan", "--corpus", folder / "corpus.txt", *SMALL[:2])
    length = () if options else SMALL[2:]
    line = call(
        *main, *length, "--work-dir", tmp_path / "run", "--kv-cache", "static", "--capacity", "16", *options
    ).error
    assert said in line
    assert not (tmp_path / "run" / "spikes.json").exists()
