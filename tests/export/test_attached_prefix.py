"""A prefix that lives in attention instead of the cache: the same numbers, and a cache of the caller's tokens only."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.recipe import Dtype, save_recipe
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.build_profiles import GraphInput, make_profiles, resolve_limits
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.files.model_files import GENAI
from spike_export.export.graph_plan import PrefixHome
from tests.support.built_plans import build_plan
from tests.support.tiny.cli_models import call, write_model
from tests.support.tiny.models import CachedSession, TinyModel, input_scales, tiny_llama, tiny_recipe

PREFIX = (1, 7, 12)
TOKENS = np.random.default_rng(3).integers(3, 99, (2, 17))


def export(
    folder: Path, model: TinyModel, prefix_in: PrefixHome, *, int8: bool = False, dtype: Dtype = "float32"
) -> Manifest:
    scales = input_scales(model, TOKENS)
    kept: dict[str, Dtype] = {} if int8 else dict.fromkeys(scales, "float32")
    recipe = tiny_recipe(model.checkpoint, scales, kept=kept, prefix=PREFIX)
    return export_bundle(model.checkpoint, recipe, ExportOptions(dtype, prefix_in=prefix_in), folder)


def both(tmp_path: Path, model: TinyModel, *, int8: bool = False) -> tuple[CachedSession, CachedSession]:
    for place in ("cache", "attention"):
        export(tmp_path / place, model, place, int8=int8)
    return CachedSession(tmp_path / "cache"), CachedSession(tmp_path / "attention")


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    # The same float32 operands in the same order, but attention may split its blocks elsewhere.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("chunks", [(17,), (9, 8), (5, 1, 1, 10)], ids=str)
@pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
def test_logits_are_those_of_the_cached_prefix(tmp_path: Path, chunks: tuple[int, ...], window: int | None) -> None:
    cached, attached = both(tmp_path, tiny_llama(sliding_window=window))
    expected = cached.run(TOKENS)
    assert_same(attached.run(TOKENS, chunks), expected)
    assert attached.cache[0].shape[2] == TOKENS.shape[1]
    assert cached.cache[0].shape[2] == TOKENS.shape[1] + len(PREFIX)
    for own, longer in zip(attached.cache, cached.cache, strict=True):
        assert_same(own, longer[:, :, len(PREFIX) :])


def test_the_prefix_counts(tmp_path: Path) -> None:
    """Were the prefix left out, the comparison with the cached one would have to fail."""
    model = tiny_llama()
    export(tmp_path / "attached", model, "attention")
    plain = tiny_recipe(model.checkpoint, {}, kept=dict.fromkeys(input_scales(model, TOKENS), "float32"))
    export_bundle(model.checkpoint, plain, ExportOptions("float32"), tmp_path / "plain")
    logits = [CachedSession(tmp_path / name).run(TOKENS) for name in ("attached", "plain")]
    assert np.abs(logits[0] - logits[1]).max() > 0.01 * np.abs(logits[1]).max()


def test_int8_and_left_padding(tmp_path: Path) -> None:
    cached, attached = both(tmp_path, tiny_llama(), int8=True)
    mask = np.ones_like(TOKENS)
    mask[1, :6] = 0
    for session in (cached, attached):
        session.reset(2)
    expected, found = cached.step(TOKENS, mask), attached.step(TOKENS, mask)
    assert_same(found[0], expected[0])
    assert_same(found[1, 6:], expected[1, 6:])
    longer = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    assert_same(attached.step(TOKENS[:, :1], longer), cached.step(TOKENS[:, :1], longer))


def genai_type(bundle: Path) -> str:
    return str(json.loads((bundle / "genai_config.json").read_text())["model"]["type"])


def test_what_the_bundle_says(tmp_path: Path) -> None:
    model = tiny_llama()
    cached, attached = (export(tmp_path / place, model, place) for place in ("cache", "attention"))
    assert cached.prefix is not None
    assert attached.prefix is not None
    assert (cached.prefix.in_cache, cached.cached_prefix_length) == (True, 3)
    assert (attached.prefix.in_cache, attached.cached_prefix_length) == (False, 0)
    assert "--prefix-in attention" in cached.unsupported[GENAI]
    assert genai_type(tmp_path / "cache") == f"none: {cached.unsupported[GENAI]}"
    assert attached.unsupported == {}
    assert genai_type(tmp_path / "attention") == "llama"
    unquantized = export_bundle(model.checkpoint, None, ExportOptions(), tmp_path / "plain")
    assert (unquantized.unsupported, unquantized.cached_prefix_length) == ({}, 0)


def test_profiles_of_a_plan_take_the_callers_own_cache(tmp_path: Path) -> None:
    manifest = export(tmp_path / "b", tiny_llama(), "attention")
    limits = resolve_limits(BuildOptions(), manifest.cached_prefix_length, manifest.max_position_embeddings)
    past = GraphInput("past_key_values.0.key", (None, 2, None, 16))
    (decode,) = make_profiles([past], ["decode"], limits)
    assert decode.shapes[past.name].smallest[2] == 1
    assert decode.shapes[past.name].largest[2] == 127


@pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)
def test_a_plan_runs_every_linear_as_planned(tmp_path: Path) -> None:
    export(tmp_path / "b", tiny_llama(), "attention", int8=True, dtype="float16")
    machine = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
    result = build_plan(tmp_path / "b", tmp_path / "engine.plan", BuildOptions(targets=("SM86",)), environment=machine)
    assert result.audit.readable
    assert result.deviations == ()
    assert result.sidecar.prefix == 0


def test_the_command_says_where_the_prefix_lives(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    scales = dict.fromkeys(linears(checkpoint.config), 0.05)
    save_recipe(tiny_recipe(checkpoint, scales, prefix=PREFIX), tmp_path / "recipe.json")
    options = ("--recipe", tmp_path / "recipe.json", "--prefix-in", "attention", "--out", tmp_path / "b", "--quiet")
    exported = call("export", folder, *options)
    assert (exported.code, exported.out, exported.err) == (0, "", "")
    manifest = load_manifest(tmp_path / "b")
    assert manifest.prefix is not None
    assert not manifest.prefix.in_cache
