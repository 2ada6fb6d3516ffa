"""What a build is asked for reaches the builder's configuration."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.build.compiler import (
    CompileSettings,
    apply_features,
    attach_timing_cache,
    save_timing_cache,
)
from spike_export.engines.plan.backend import TENSORRT, TENSORRT_RTX, PlanFeature


@pytest.fixture
def trt() -> Any:
    if importlib.util.find_spec(TENSORRT_RTX.module) is None:
        pytest.skip(f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}")
    return importlib.import_module(TENSORRT_RTX.module)


def settings(*features: PlanFeature, **more: Any) -> CompileSettings:
    return CompileSettings(TENSORRT, (), (), 3, frozenset(features), **more)


@pytest.mark.parametrize(
    ("features", "flags"),
    [
        ((), set()),
        (("refit",), {"REFIT"}),
        (("strip_weights",), {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        (("strip_weights", "refit"), {"STRIP_PLAN", "REFIT"}),
        (("weight_streaming", "version_compatible"), {"WEIGHT_STREAMING", "VERSION_COMPATIBLE"}),
    ],
)
def test_features_are_flags_of_the_builder(trt: Any, features: tuple[PlanFeature, ...], flags: set[str]) -> None:
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    before = set(raised(trt, config))
    apply_features(trt, config, settings(*features))
    assert set(raised(trt, config)) - before == flags


def raised(trt: Any, config: Any) -> Iterator[str]:
    return (name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag))


class FakeConfig:
    """A configuration that remembers; `fits` says whether a timing cache is of this GPU and version."""

    def __init__(self, fits: bool = True) -> None:
        self.fits = fits
        self.attached: list[bytes] = []
        self.hardware_compatibility_level: object = None

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.attached.append(cache)
        return self.fits or cache == b""


def test_a_hardware_level_is_set(trt: Any) -> None:
    for asked, level in (("ampere-plus", "AMPERE_PLUS"), ("same-compute-capability", "SAME_COMPUTE_CAPABILITY")):
        config = FakeConfig()
        apply_features(trt, config, settings(hardware_compatible=asked))
        assert config.hardware_compatibility_level == getattr(trt.HardwareCompatibilityLevel, level)


def test_a_timing_cache_is_read_when_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    config = FakeConfig()
    assert attach_timing_cache(config, settings()) is None
    assert attach_timing_cache(config, settings(timing_cache=path)) == b""
    path.write_bytes(b"known")
    assert attach_timing_cache(config, settings(timing_cache=path)) == b"known"
    assert config.attached == [b"", b"known"]


class _Cache:
    def serialize(self) -> bytes:
        return b"known"


def test_what_another_build_has_half_written_stays(tmp_path: Path) -> None:
    half = tmp_path / ".cache.partial"
    half.write_bytes(b"half")
    save_timing_cache(_Cache(), tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == b"known"
    assert half.read_bytes() == b"half"


def test_a_timing_cache_of_another_gpu_or_version_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"foreign")
    config = FakeConfig(fits=False)
    assert attach_timing_cache(config, settings(timing_cache=path)) == b""
    assert config.attached == [b"foreign", b""]


def test_a_timing_cache_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot read the timing cache: Is a directory"):
        attach_timing_cache(FakeConfig(), settings(timing_cache=tmp_path))
